"""However models are stored, a merge loads as what torch makes of the same models.

A few architectures, whose base and tunes are drawn apart in all that public checkpoints
differ in: names of modules or of the hub, prefixes on or off, wrappers, a head that is
stored, left out or stored alone, old buffers, projections in one tensor, dtype, shards,
pickles, adapters, rows of the vocabulary. What transformers loads of the output is the
formula on what the models are, to the last tensor.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

import m3jax

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
save_file = pytest.importorskip("safetensors.torch").save_file

State = dict[str, Any]  # tensors by name
ALL = {**architectures.CAUSAL, **architectures.OTHERS}
# Whose tensors transformers 5 stores under other names than its modules have; whose
# head is tied by default; whose base model's prefix is off on the hub.
FAMILIES = (
    "llama",
    "qwen2_tied",
    "gemma",
    "gpt2",
    "qwen3_moe",
    "mixtral",
    "phi3",
    "bert",
)
WHO = ("base", "a", "b")
LORA = {"llama": "self_attn.q_proj", "gpt2": "attn.c_attn", "phi3": "self_attn.o_proj"}
TOLERANCE = 2e-6  # of weights below 1, float32; and what 16 bits' sums add


@functools.cache
def model_of(family: str, extra: int = 0) -> Any:
    """A model, with so many rows more than its vocabulary has."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    cls_name, fields = ALL[family]
    cls = getattr(transformers, cls_name)
    torch.manual_seed(0)
    fields = {**fields, "num_hidden_layers": 1} if "n_layer" not in fields else fields
    fields = {**fields, "vocab_size": fields["vocab_size"] + extra}
    return cls(cls.config_class(**fields)).float().eval()


@functools.cache
def truth(family: str, who: str) -> State:
    """All tensors of a model by the names of its modules."""
    generator = seeded(WHO.index(who))
    model = model_of(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return {name: own.clone() for name, own in model.state_dict().items()}


def ties(family: str) -> dict[str, str]:
    return dict(model_of(family).all_tied_weights_keys)


def as_stored(model: Any, state: State, original: bool) -> State:
    """The tensors as `save_pretrained` writes them, in the hub's layout or its own."""
    model.load_state_dict(state)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_original_format=original)
        from safetensors.torch import load_file

        return load_file(f"{folder}/model.safetensors")


# ------------------------------------------------ what checkpoints differ in


def head(draw: Callable, family: str, tensors: State) -> State:
    """A tied head is left out, stored as a copy, or stored in its embedding's place."""
    how = draw(st.sampled_from(["left out", "a copy", "alone"]))
    for alias, original in ties(family).items():
        if original in tensors and alias not in tensors and how != "left out":
            tensors = {**tensors, alias: tensors[original].clone()}
            if how == "alone" and len(ties(family)) == 1:
                del tensors[original]
    return tensors


def prefixes(draw: Callable, family: str, tensors: State) -> State:
    """The base model's prefix off, as on the hub; or a wrapper's in front of all."""
    own = f"{model_of(family).base_model_prefix}."
    how = draw(st.sampled_from(["as they are", "off", "_orig_mod.", "module."]))
    if how == "off":
        return {name.removeprefix(own): value for name, value in tensors.items()}
    put = "" if how == "as they are" else how
    return {put + name: value for name, value in tensors.items()}


def buffers(draw: Callable, tensors: State) -> State:
    """What programs of 2023 stored beside the weights."""
    if not draw(st.booleans()):
        return tensors
    layer = next((n for n in tensors if "attn.c_attn.weight" in n), None)
    if layer is not None:
        mask = torch.ones(1, 1, 4, 4).tril()
        return {**tensors, layer.replace("c_attn.weight", "bias"): mask}
    layer = next((n for n in tensors if "self_attn.q_proj.weight" in n), None)
    if layer is None:
        return tensors
    name = layer.replace("q_proj.weight", "rotary_emb.inv_freq")
    return {**tensors, name: torch.ones(2)}


def fused(draw: Callable, tensors: State) -> State:
    """q, k and v in one tensor, and gate and up; or apart, as the case may be."""
    if not draw(st.booleans()):
        return tensors
    made = dict(tensors)
    for name in tensors:
        if name.endswith("self_attn.q_proj.weight"):
            parts = [name.replace("q_proj", f"{own}_proj") for own in "qkv"]
            made[name.replace("q_proj", "qkv_proj")] = torch.cat(
                [made.pop(part) for part in parts]
            )
        elif name.endswith("mlp.gate_up_proj.weight"):
            halves = made.pop(name).chunk(2)
            for part, half in zip(("gate", "up"), halves, strict=True):
                made[name.replace("gate_up", part)] = half.contiguous()
    return made


def write(draw: Callable, folder: Path, tensors: State) -> None:
    """One file or two, of safetensors or a pickle, with an index or without."""
    pickled = draw(st.booleans())
    stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    put = (
        torch.save
        if pickled
        else lambda own, path: save_file(
            {n: t.contiguous() for n, t in own.items()}, path, {"format": "pt"}
        )
    )
    layout = draw(st.sampled_from(["one file", "an index", "no index"]))
    if layout == "one file":
        put(tensors, folder / f"{stem}.{suffix}")
        return
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"{stem}-0000{i}-of-00002.{suffix}"
        put({name: tensors[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    if layout == "an index":
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / f"{stem}.{suffix}.index.json").write_text(text)


def store(draw: Callable, folder: Path, family: str, who: str, extra: int = 0) -> State:
    """Writes a model in some way, with so many rows more than its vocabulary has.

    Returns:
      What it is, rounded to the dtype in which it was written.
    """
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    state = grown(family, truth(family, who), extra)
    known = {name: rounded(own, dtype) for name, own in state.items()}
    tensors = as_stored(model_of(family, extra), state, draw(st.booleans()))
    tensors = {name: rounded(own, dtype) for name, own in tensors.items()}
    tensors = buffers(draw, head(draw, family, tensors))
    tensors = tensors if who == "base" else fused(draw, tensors)
    tensors = prefixes(draw, family, tensors)
    folder.mkdir()
    write(draw, folder, tensors)
    model = model_of(family, extra)
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    by_default = type(model.config)().tie_word_embeddings
    if config["tie_word_embeddings"] == by_default and draw(st.booleans()):
        del config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    return known


def rounded(tensor: Any, dtype: Any) -> Any:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def store_adapter(draw: Callable, folder: Path, family: str, base: State) -> State:
    """Writes a LoRA adapter as PEFT does, and returns the base with it."""
    rank, alpha = draw(st.integers(1, 3)), 5
    generator = seeded(rank)
    made, tensors = dict(base), {}
    target = LORA[family]
    for name, weight in base.items():
        if not name.endswith(f"{target}.weight"):
            continue
        weight = weight.float()
        rows, columns = weight.shape if family != "gpt2" else weight.shape[::-1]
        a = 0.1 * torch.randn(rank, columns, generator=generator)
        b = 0.1 * torch.randn(rows, rank, generator=generator)
        module = "base_model.model." + name.removesuffix(".weight")
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        change = alpha / rank * (b @ a)
        made[name] = weight + (change.T if family == "gpt2" else change)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": [target.rpartition(".")[2]],
        "fan_in_fan_out": family == "gpt2",
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return made


# ------------------------------------------------------------ and what comes out


def embedding(family: str) -> str:
    model = model_of(family)
    weight = model.get_input_embeddings().weight
    every = model.state_dict(keep_vars=True).items()
    return next(name for name, own in every if own is weight)


def words_of(family: str) -> set[str]:
    """The tensors with a row for each token."""
    model = model_of(family)
    head = model.get_output_embeddings()
    of_head = [] if head is None else [id(own) for own in head.parameters()]
    every = model.state_dict(keep_vars=True).items()
    return {
        *(name for name, own in every if id(own) in of_head),
        *(embedding(family), *ties(family), *ties(family).values()),
    }


def grown(family: str, tensors: State, extra: int) -> State:
    """With rows of more tokens, the same ones for a head as for its embedding."""
    rows = {
        name: 0.1 * torch.randn(extra, *own.shape[1:], generator=seeded(extra))
        for name, own in tensors.items()
        if name in words_of(family)
    }
    return tensors | {n: torch.cat([tensors[n], own]) for n, own in rows.items()}


def fitted(family: str, states: list[State], policy: str) -> list[State]:
    """All with the same number of rows, by rows."""
    counts = [len(state[embedding(family)]) for state in states]
    made = [dict(state) for state in states]
    for state in made:
        for name in words_of(family) & state.keys():
            own = state[name]
            if policy == "truncate":
                state[name] = own[: min(counts)]
            else:
                mean = own.double().mean(0, keepdim=True).to(own.dtype)
                state[name] = torch.cat([own, *[mean] * (max(counts) - len(own))])
    return made


def seeded(seed: int) -> Any:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=12)
@given(data=st.data())
def test_a_merge_loads_as_torch_makes_it(data: Any) -> None:
    draw = data.draw
    family = draw(st.sampled_from(FAMILIES))
    adapted = family in LORA and draw(st.booleans())
    method = draw(st.sampled_from(["average", "task_arithmetic"]))
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        base = store(draw, root / "base", family, "base")
        a = store(draw, root / "a", family, "a")
        extra = 0 if adapted else draw(st.integers(0, 2))
        b = (
            store_adapter(draw, root / "b", family, base)
            if adapted
            else store(draw, root / "b", family, "b", extra)
        )
        policy = draw(st.sampled_from(["mean", "truncate"])) if extra else "error"
        if extra:
            base, a, b = fitted(family, [base, a, b], policy)
        recipe = m3jax.Recipe(
            method=method,
            mixup=m3jax.Mixup(alpha=None),
            dtype="float32",
            vocabulary=policy,
        )
        m3jax.merge(root / "base", [root / "a", root / "b"], root / "out", recipe)
        event(f"{family}, {method}{', an adapter' * adapted}, vocabulary {policy}")
        wide = [{name: t.float() for name, t in own.items()} for own in (base, a, b)]
        wanted = {
            name: (wide[1][name] + wide[2][name]) / 2
            if method == "average"
            else wide[1][name] + wide[2][name] - wide[0][name]
            for name, own in base.items()
            if own.is_floating_point()
        }
        loaded, info = type(model_of(family)).from_pretrained(
            root / "out", output_loading_info=True, dtype=torch.float32
        )
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            # A base's old buffer is unexpected to architectures that never had it.
            names = [str(key) for key in info[kind]]
            assert all(name.endswith("rotary_emb.inv_freq") for name in names), names
        found = loaded.state_dict()
        for name, own in wanted.items():
            torch.testing.assert_close(
                found[name],
                own,
                rtol=1e-6,
                atol=TOLERANCE,
                msg=lambda why, name=name: f"{name}: {why}",
            )
