"""Adapters in the place of models, beside peft's own merge and NumPy's."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from checkpoints import digest, encode, read, write
from command_line import Run
from test_torch_file import pickled_tensors

import m3jax
from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.folder import open_checkpoint
from m3jax.checkpoints.source import Array, read_whole
from m3jax.checkpoints.sources import lora

OFF = "--config.mixup.alpha=None"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
MODULE = "model.layers.0.self_attn.q_proj"


def adapter(folder: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    named = {f"base_model.model.{name}": own for name, own in tensors.items()}
    (folder / "adapter_model.safetensors").write_bytes(encode(named))
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def pair(rank: int, rows: int, columns: int, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    a = generator.normal(0, 1, (rank, columns)).astype(np.float32)
    b = generator.normal(0, 1, (rows, rank)).astype(np.float32)
    return {f"{MODULE}.lora_A.weight": a, f"{MODULE}.lora_B.weight": b}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base of two tensors and an adapter of one, in the current folder."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(7)
    tensors = {
        f"{MODULE}.weight": generator.normal(0, 1, (6, 5)).astype(np.float32),
        "model.norm.weight": np.ones(5, np.float32),
    }
    write(tmp_path / "base", tensors, {"model_type": "llama"})
    adapter(tmp_path / "a", pair(2, 6, 5))
    return tmp_path


# ------------------------------------------------------------------- the product


@pytest.mark.parametrize("rank", [1, 2, 7, 64])
@pytest.mark.parametrize("transposed", [False, True])
def test_any_range_of_a_product_has_the_same_bits(
    rank: int, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "_PART", 100)
    generator = np.random.default_rng(rank)
    left = np.ldexp(generator.normal(size=(23, rank)), generator.integers(-9, 9, rank))
    right = np.ldexp(generator.normal(size=(31, rank)), generator.integers(-9, 9, rank))
    theta = generator.normal(size=(23, 31)).astype(np.float32)
    left, right = left.astype(np.float32), right.astype(np.float32)

    def factor(values: np.ndarray) -> lora.Factor:
        stored = np.ascontiguousarray(values.T) if transposed else values
        return lora.Factor(Array(stored, "x"), transposed, "x")

    source = lora.Adapted(Array(theta, "x"), factor(left), factor(right), 0.3, "x")
    exact = theta + 0.3 * (left.astype(np.longdouble) @ right.astype(np.longdouble).T)
    whole = read_whole(source)
    scale = np.abs(left).max(1, keepdims=True) * np.abs(right).max(1)
    assert (np.abs(whole - exact) <= 6e-8 * np.abs(exact) + rank * scale * 2**-40).all()
    for start, stop in [(0, 1), (30, 64), (31, 62), (5, 700), (712, 713)]:
        run = np.empty(stop - start, np.float32)
        source.read_into(run, start)
        assert run.tobytes() == whole.reshape(-1)[start:stop].tobytes()


def test_the_order_of_summation_does_not_show() -> None:
    """The columns of a product may be added in any order, to the last bit."""
    generator = np.random.default_rng(3)
    left, right = generator.normal(size=(2, 40, 300)).astype(np.float32).astype(float)
    order = generator.permutation(300)
    once = lora.product(lora.split(left), lora.split(right))
    again = lora.product(lora.split(left[:, order]), lora.split(right[:, order]))
    assert once.tobytes() == again.tobytes()
    np.testing.assert_allclose(once, left @ right.T, rtol=0, atol=300 * 2**-40)


# --------------------------------------------------------------------- beside peft


def _model(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    common = {"vocab_size": 37, "bos_token_id": None, "eos_token_id": None}
    if kind == "gpt2":
        config = transformers.GPT2Config(
            n_embd=16, n_layer=2, n_head=2, n_positions=16, **common
        )
        return transformers.GPT2LMHeadModel(config)
    config = transformers.Qwen2Config(  # has biases
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=kind == "tied",
        **common,
    )
    return transformers.Qwen2ForCausalLM(config)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "regex": {"target_modules": r".*\.layers\.[02]\.mlp\.(up|down)_proj"},
    "all_linear": {"target_modules": "all-linear", "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "o_proj", "down_proj"],
        "rank_pattern": {"down_proj": 5, r"layers.1.self_attn.q_proj": 3},
        "alpha_pattern": {"down_proj": 1, "o_proj": 7.5},
    },
    "rank_pattern_rslora": {
        "target_modules": ["up_proj", "k_proj"],
        "rank_pattern": {"^model.layers.0.mlp.up_proj": 6},
        "use_rslora": True,
    },
    "layers": {
        "target_modules": ["gate_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "excluded": {"target_modules": ["q_proj"], "exclude_modules": r".*\.1\..*"},
    "dora": {"target_modules": ["k_proj", "gate_proj"], "use_dora": True},
    "dora_embedding": {"target_modules": ["embed_tokens"], "use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "bias_all": {"target_modules": ["q_proj"], "bias": "all"},
    "bias_lora_only": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "lora_bias": {"target_modules": ["q_proj"], "lora_bias": True},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 11, 36]},
    "head": {"target_modules": ["lm_head"]},
    "tied_embedding": {"target_modules": ["embed_tokens"]},
    "gpt2": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    "gpt2_dora": {"target_modules": ["c_attn", "c_proj"], "use_dora": True},
    "gpt2_square": {"target_modules": r".*attn\.c_proj", "fan_in_fan_out": True},
    "gpt2_embedding": {"target_modules": ["wte"], "fan_in_fan_out": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_agrees_with_peft(name: str, tmp_path: Path) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    kind = name.partition("_")[0]
    torch.manual_seed(len(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _model(kind)
        with torch.no_grad():
            for own in model.parameters():
                own.copy_(torch.randn(own.shape) * 0.3)
        model.save_pretrained(tmp_path / "base")
        tuned = peft.get_peft_model(
            model, peft.LoraConfig(r=4, lora_alpha=6, **OPTIONS[name])
        )
        with torch.no_grad():
            for own in tuned.parameters():
                if own.requires_grad:
                    own.copy_(torch.randn(own.shape) * 0.3)
        tuned.save_pretrained(tmp_path / "a")
        expected = tuned.merge_and_unload().state_dict()
    with open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'a'}") as merged:
        got = {own: read_whole(source) for own, source in merged.tensors.items()}
    assert set(expected) - set(got) <= {"lm_head.weight"}
    assert set(got) <= set(expected)
    moved = 0
    base = read(tmp_path / "base")
    for own, values in got.items():
        wanted = expected[own].numpy()
        np.testing.assert_allclose(values, wanted, rtol=2e-6, atol=2e-6, err_msg=own)
        moved += not np.array_equal(values, base[own])
    assert moved


# ------------------------------------------------------------------ as users call it


def test_wherever_a_model_is_named(here: Path, run: Run) -> None:
    expected = read(here / "base")
    ab = pair(2, 6, 5)
    change = 2.0 * ab[f"{MODULE}.lora_B.weight"] @ ab[f"{MODULE}.lora_A.weight"]
    expected[f"{MODULE}.weight"] = expected[f"{MODULE}.weight"] + change
    for i, model in enumerate(
        ["a", "base+a", "a/adapter_model.safetensors", str(here / "base") + "+a"]
    ):
        ran = run("merge", "--base=base", f"--models={model}", f"--output=o{i}", OFF)
        assert ran.code == 0, ran.err
        assert f"{model.rpartition('+')[2]}: a LoRA adapter of rank 2" in ran.err
        got = read(here / f"o{i}")
        for name, own in expected.items():
            np.testing.assert_allclose(got[name], own, rtol=1e-6, atol=1e-6)
    loaded = m3jax.load("base+a")["model"]["layers"]["0"]["self_attn"]["q_proj"]
    assert np.asarray(loaded["weight"]).tobytes() == got[f"{MODULE}.weight"].tobytes()
    assert run("diff", "base", "base+a", "--exit_code").code == 1
    assert run("diff", "o0", "base+a", "--exit_code").code == 0
    assert "adapter" in run("inspect", "a").out


def test_the_base_it_names_itself(here: Path, run: Run) -> None:
    adapter(here / "a", pair(2, 6, 5), base_model_name_or_path="base")
    assert run("merge", "--models=a", "--output=out", OFF).code == 0
    adapter(here / "a", pair(2, 6, 5), base_model_name_or_path="org/other")
    ran = run("merge", "--base=base", "--models=a", "--output=out2", OFF)
    assert "it says it was made for 'org/other'" in ran.err
    ran = run("merge", "--models=a", "--output=out3", OFF)
    assert ran.code == 3
    assert "org/other" in ran.error
    assert "it is the base of the adapter a" in ran.error


def test_the_record_makes_the_same_bytes(here: Path, run: Run) -> None:
    flags = ("--base=base", "--models=a,base", "--config.mixup.alpha=0.4", "--seed=3")
    for model in ("1", "2"):
        assert run("merge", *flags, f"--output={model}").code == 0
        flags = ("--config=1/m3jax.json",)
    assert digest(here / "1") == digest(here / "2")
    assert run("verify", "1").code == 0


def test_chunks_executors_and_dtypes(here: Path, run: Run) -> None:
    """bfloat16 in, one rounding at the end."""
    tensors = {n: t.astype("bfloat16") for n, t in read(here / "base").items()}
    write(here / "narrow", tensors, {})
    flags = ("--base=narrow", "--models=a,narrow", OFF, "--config.mixup.ratios=None")
    for i, more in enumerate([(), ("--chunk_size=1024",), ("--executor=sharded",)]):
        assert run("merge", *flags, f"--output=o{i}", *more).code == 0
    weights = [(here / f"o{i}" / "model.safetensors").read_bytes() for i in range(3)]
    assert weights[0] == weights[1] == weights[2]
    theta = tensors[f"{MODULE}.weight"].astype(np.float64)
    ab = {n: t.astype(np.float64) for n, t in pair(2, 6, 5).items()}
    change = 2.0 * ab[f"{MODULE}.lora_B.weight"] @ ab[f"{MODULE}.lora_A.weight"]
    got = read(here / "o0")[f"{MODULE}.weight"]
    assert got.dtype == "bfloat16"
    assert np.array_equal(got, (theta + change / 2).astype("bfloat16"))


def test_a_head_of_its_own_where_the_base_is_tied(here: Path, run: Run) -> None:
    embedding = np.arange(12, dtype=np.float32).reshape(4, 3)
    tied = {"model.embed_tokens.weight": embedding}
    write(here / "tied", tied, {"tie_word_embeddings": True, "vocab_size": 4})
    head = {
        "lm_head.lora_A.weight": np.ones((1, 3), np.float32),
        "lm_head.lora_B.weight": np.ones((4, 1), np.float32),
    }
    adapter(here / "h", head, r=1, lora_alpha=1, target_modules=["lm_head"])
    passthrough = "--config.method=passthrough"
    ran = run("merge", "--models=tied+h", "--output=out", OFF, passthrough)
    assert ran.code == 0, ran.err
    got = read(here / "out")
    assert np.array_equal(got["model.embed_tokens.weight"], embedding)
    assert np.array_equal(got["lm_head.weight"], embedding + 1)
    config = json.loads((here / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


def test_a_tokenizer_of_its_own_is_the_models(here: Path, run: Run) -> None:
    for folder, content in (("base", "{}"), ("a", "{}")):
        (here / folder / "tokenizer.json").write_text(content)
    (here / "base" / "generation_config.json").write_text('{"top_k": 5}')
    with open_checkpoint("base+a") as own:
        assert len(own.notes) == 1
    other = '{"added_tokens": []}'
    (here / "a" / "tokenizer.json").write_text(other)
    (here / "a" / "chat_template.jinja").write_text("mine")
    with open_checkpoint("base+a") as own:
        assert "has a tokenizer of its own, which counts as" in own.notes[1]
    passed = ("merge", OFF, "--config.method=passthrough", "--output=alone")
    assert run(*passed, "--models=base+a").code == 0
    merged = ("merge", "--base=base", "--models=a,base", OFF)
    assert run(*merged, "--output=bases").code == 0
    assert run(*merged, "--output=its", "--tokenizer_from=a").code == 0
    for output, text, template in (
        ("alone", other, True),
        ("bases", "{}", False),
        ("its", other, True),
    ):
        assert (here / output / "tokenizer.json").read_text() == text
        assert (here / output / "chat_template.jinja").exists() == template
        assert (here / output / "generation_config.json").exists()


def test_names_with_another_beginning(here: Path) -> None:
    stripped = {n.removeprefix("model."): t for n, t in read(here / "base").items()}
    write(here / "short", stripped, {})
    short = {n.removeprefix("model."): t for n, t in pair(2, 6, 5).items()}
    adapter(here / "s", short)
    for one in ("base+s", "short+a", "short+s"):
        with open_checkpoint(one) as own, open_checkpoint("base+a") as other:
            pairs = zip(own.tensors.values(), other.tensors.values(), strict=True)
            assert all(np.array_equal(read_whole(x), read_whole(y)) for x, y in pairs)


def test_a_model_with_a_left_over_adapter_is_a_model(here: Path, run: Run) -> None:
    adapter(here / "base", pair(2, 6, 5))
    assert run("merge", "--base=base", "--models=base", "--output=out", OFF).code == 0
    assert np.array_equal(
        read(here / "out")[f"{MODULE}.weight"],
        safetensors.numpy.load_file(here / "base" / "model.safetensors")[
            f"{MODULE}.weight"
        ],
    )


def test_modules_that_the_config_does_not_target_are_passed_over(here: Path) -> None:
    """As peft does, and with a note."""
    other = {n.replace("q_proj", "k_proj"): t for n, t in pair(2, 9, 9).items()}
    adapter(here / "a", pair(2, 6, 5) | other)
    with open_checkpoint("base+a") as own:
        assert "1 modules passed over" in " ".join(own.notes)
        got = read_whole(own.tensors[f"{MODULE}.weight"])
    assert not np.array_equal(got, read(here / "base")[f"{MODULE}.weight"])
    adapter(here / "a", pair(2, 6, 5), target_modules=["v_proj"])
    with pytest.raises(CheckpointError, match="holds no tensor that adapter_config"):
        open_checkpoint("base+a")


@pytest.mark.parametrize(
    "config, message",
    [
        ({"peft_type": "IA3"}, "only LORA is read; merge it into its base first"),
        ({"r": 3}, r"lora_A.weight' has shape \[2, 5\], where .* gives the rank 3"),
        ({"r": -1}, "r = -1: needs a positive integer"),
        ({"lora_alpha": "x"}, "lora_alpha = 'x': needs a number"),
        ({"target_modules": "(["}, "no regular expression"),
        ({"target_modules": "a" * 9999}, "longer than 2000"),
        ({"init_lora_weights": "pissa_niter_4"}, "other weights than the base's own"),
        ({"use_qalora": True}, "use_qalora = True: an adapter with this field"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"use_dora": True}, "has no lora_magnitude_vector"),
        ({"use_dora": "yes"}, "needs true or false"),
        ({"rank_pattern": [1]}, "needs an object"),
        ({"layers_to_transform": "all"}, "needs numbers of layers"),
    ],
)
def test_refuses(config: dict[str, Any], message: str, here: Path) -> None:
    adapter(here / "a", pair(2, 6, 5), **config)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint("base+a")


def test_a_pickled_adapter_is_the_same(here: Path) -> None:
    named = {f"base_model.model.{n}": t for n, t in pair(2, 6, 5).items()}
    described = {
        n: (t.reshape(-1), 0, t.shape, (t.shape[1], 1)) for n, t in named.items()
    }
    with open_checkpoint("base+a") as checkpoint:
        expected = read_whole(checkpoint.tensors[f"{MODULE}.weight"])
    (here / "a" / "adapter_model.safetensors").unlink()
    (here / "a" / "adapter_model.bin").write_bytes(pickled_tensors(described))
    with open_checkpoint("base+a") as checkpoint:
        made = read_whole(checkpoint.tensors[f"{MODULE}.weight"])
    np.testing.assert_array_equal(made, expected)


def test_refuses_what_does_not_fit(here: Path, run: Run) -> None:
    def said(model: str) -> str:
        ran = run("merge", "--base=base", f"--models={model}", "--output=out", OFF)
        assert ran.code == 3
        assert not (here / "out").exists()
        return ran.error

    adapter(here / "w", pair(2, 6, 4))
    assert "is for a weight of shape [6, 4], base has [6, 5]" in said("w")
    other = {n.replace("q_proj", "k_proj"): t for n, t in pair(2, 6, 5).items()}
    adapter(here / "k", other, target_modules=["k_proj"])
    assert "changes 1 tensors that base does not have" in said("k")
    adapter(here / "model", {"model.norm.weight": np.ones(5, np.float32)})
    assert "holds no lora_A and lora_B, so it is no adapter" in said("model")
    half = pair(2, 6, 5)
    half.pop(f"{MODULE}.lora_B.weight")
    adapter(here / "half", half)
    assert "has no lora_B" in said("half")
    wrong = pair(2, 6, 5)
    wrong[f"{MODULE}.lora_B.weight"][0, 0] = math.nan
    adapter(here / "nan", wrong)
    assert "holds NaN or infinity" in said("nan")
    cut = adapter(here / "cut", pair(2, 6, 5)) / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-3])
    assert "cut off" in said("cut")
    (here / "a" / "adapter_model.safetensors").rename(here / "a" / "adapter_model.bin")
    assert "so it is no file of torch.save" in said("a")
    assert "base: has no adapter_config.json" in said("base+base")
    assert "nowhere: no such file or folder" in said("base+nowhere")
    (here / "a" / "adapter_config.json").write_text("[]")
    assert "not a JSON object" in said("base+a")
    (here / "a" / "adapter_model.bin").unlink()
    assert "and has no adapter_model.safetensors; fetch it again" in said("a")
