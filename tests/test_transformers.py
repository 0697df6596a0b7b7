"""transformers loads every output, and it computes what the merge in torch computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from grids import thin

import m3jax

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

METHODS = ("average", "task_arithmetic", "ties")  # those that are written here
SEED = 3
VOCABULARY = 61
RATES = (0.4, 0.2)
TOLERANCE = 1e-5  # of logits between 0.1 and 1
WORDS = ["[UNK]", "merge", "models", "mixup", "ratio"]

State = dict[str, Any]  # torch tensors by name


@pytest.fixture(scope="module", params=["head", "tied"])
def models(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama and two fine-tuned ones, saved by transformers, with a tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=23,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.2,
        tie_word_embeddings=request.param == "tied",
        dtype="float32",
    )
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("a", "b"):
        model.load_state_dict(
            {
                key: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
                for key, tensor in start.items()
            }
        )
        model.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize(
    ("method", "drawn"), thin(METHODS, [(), ("m3",), ("dare",), ("m3", "dare")])
)
def test_logits(method: str, drawn: tuple[str, ...], models: Path, tmp_path: Path):
    m3, dare = "m3" in drawn, "dare" in drawn
    recipe = m3jax.Recipe(
        method=method,
        mixup=m3jax.Mixup(alpha=0.5 if m3 else None),
        scaling=0.7,
        dare=m3jax.Dare(drop_rate=RATES if dare else None),
        max_shard_size="20KB" if m3 else "5GB",
    )
    output = tmp_path / "merged"
    m3jax.merge(
        models / "base", [models / "a", models / "b"], output, recipe, seed=SEED
    )
    ratios = json.loads((output / "m3jax.json").read_text())["ratios"]
    states = [load(models / name).state_dict() for name in ("base", "a", "b")]
    expected = load(models / "base")
    expected.load_state_dict(
        merge_in_torch(method, *states, ratios=ratios and ratios[""], dare=dare)
    )
    merged = load(output)
    tokens = torch.randint(VOCABULARY, (3, 11), generator=torch.manual_seed(1))
    with torch.no_grad():
        ours, theirs = merged(tokens).logits, expected(tokens).logits
        before = load(models / "base")(tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)
    assert (ours - before).abs().max() > 1000 * TOLERANCE, "the merge changed the model"


def test_bfloat16(models: Path, tmp_path: Path):
    """What torch rounds once from float32 is what m3jax writes."""
    for name in ("base", "a", "b"):
        load(models / name).to(torch.bfloat16).save_pretrained(tmp_path / name)
    recipe = m3jax.Recipe(mixup=m3jax.Mixup(ratios=(0.75, 0.25)))
    output = tmp_path / "merged"
    folders = [tmp_path / "a", tmp_path / "b"]
    m3jax.merge(tmp_path / "base", folders, output, recipe)
    merged = transformers.AutoModelForCausalLM.from_pretrained(output)
    assert merged.dtype == torch.bfloat16
    a, b = (load(folder).state_dict() for folder in folders)
    for name, tensor in merged.state_dict().items():
        expected = (0.75 * a[name] + 0.25 * b[name]).to(torch.bfloat16)
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0)


def test_side_files(models: Path, tmp_path: Path):
    output = tmp_path / "merged"
    m3jax.merge(models / "base", [models / "a", models / "b"], output)
    config = transformers.AutoConfig.from_pretrained(output)
    original = transformers.AutoConfig.from_pretrained(models / "base")
    wanted = original.to_dict() | {"_name_or_path": None}
    assert config.to_dict() | {"_name_or_path": None} == wanted
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    assert tokenizer("merge models by mixup")["input_ids"] == [1, 2, 0, 3]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "mixup ratio"}], tokenize=False
    )
    assert chat == "user mixup ratio"
    generation = transformers.GenerationConfig.from_pretrained(output)
    assert generation.eos_token_id == original.eos_token_id


def load(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    )


def write_tokenizer(folder: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(
            {word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"
        )
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]"
    )
    fast.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}"
    )
    fast.save_pretrained(folder)


def merge_in_torch(
    method: str,
    base: State,
    *models: State,
    ratios: list[float] | None,
    dare: bool,
) -> State:
    """The same merge, written for torch. A tied head is its embedding."""
    names = [name for name in base if name != "lm_head.weight" or not tied(base)]
    models = [dict(model) for model in models]
    if dare:
        for i, (model, rate) in enumerate(zip(models, RATES, strict=True)):
            kept_share = 1 - round(rate * 65536) / 65536
            for name in names:
                shape = base[name].shape
                mask = reference.plain_jax_mask(SEED, i, name, shape, rate)
                delta = (model[name] - base[name]) / kept_share
                delta[torch.from_numpy(np.ascontiguousarray(mask))] = 0
                model[name] = base[name] + delta
    deltas = [
        torch.cat([(model[name] - base[name]).flatten() for name in names])
        for model in models
    ]
    if method == "average":
        merged = sum(w * d for w, d in zip(ratios or [0.5, 0.5], deltas, strict=True))
    elif method == "task_arithmetic":
        total = sum(w * d for w, d in zip(ratios or [1, 1], deltas, strict=True))
        merged = 0.7 * total
    else:
        merged = 0.7 * ties_in_torch(torch.stack(deltas), ratios or [1, 1])
    parts = torch.split(merged, [base[name].numel() for name in names])
    state = {
        name: base[name] + part.view_as(base[name])
        for name, part in zip(names, parts, strict=True)
    }
    if tied(base):
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


def ties_in_torch(deltas: Any, ratios: list[float]) -> Any:
    for delta in deltas:
        threshold = torch.kthvalue(delta.abs(), delta.numel() // 2).values
        delta[delta.abs() < threshold] = 0
    signs = torch.sign(deltas.sum(dim=0))
    signs[signs == 0] = torch.sign(signs.sum())
    survives = deltas * signs > 0
    weights = torch.tensor(ratios)[:, None] * survives
    total = weights.sum(dim=0)
    return (weights * deltas).sum(dim=0) / torch.where(total > 0, total, 1)


def tied(state: State) -> bool:
    return torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
