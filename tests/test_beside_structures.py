"""Random YAML over models of many architectures, merged by mergekit and by m3jax.

    M3JAX_MERGEKIT=PYTHON M3JAX_CASES=200 python -m pytest \\
        tests/test_beside_structures.py

Architectures, tied heads, dtypes, slices, tokenizers and their options are drawn by
case number, together: `test_beside_mergekit` has the methods' own parameters.
docs/MERGEKIT.md records how many agreed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import beside
import checkpoints
import jax
import numpy as np
import pytest
import yaml
from command_line import Run
from test_mergekit import _fused
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CASES = int(os.environ.get("M3JAX_CASES", "40"))
FIRST = int(os.environ.get("M3JAX_FIRST", "0"))
LAYERS = 4
NAMES = ("base", "a", "b", "c")
_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 12}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "llama_tied": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 4, "tie_word_embeddings": True},
    "gemma": {"head_dim": 4},
    "gemma2": {"head_dim": 4},
    "gemma3_text": {"head_dim": 4},
    "gpt2": {"n_embd": 16, "n_layer": LAYERS, "n_head": 4, "n_positions": 64},
    "phi": {},
    "phi3": {},
    "starcoder2": {},
    "stablelm": {},
    "granite": {},
    "olmo2": {},
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 3, "head_dim": 4, **_EXPERTS},
}
_FLAT = {"nuslerp_flatten": "word", "nuslerp_row_wise": "word"}
# Methods whose result no tie decides: also for bfloat16 and float16.
_SMOOTH: dict[str, tuple[dict[str, Any], dict[str, Any], str, tuple[int, int]]] = {
    "linear": ({"weight": (0.1, 2)}, {"normalize": bool}, "maybe", (1, 3)),
    "slerp": ({}, {"t": (0, 1)}, "listed", (1, 1)),
    "nuslerp": ({"weight": (0.1, 1)}, _FLAT, "maybe", (2, 2)),
    "multislerp": ({"weight": (0.1, 1)}, {}, "maybe", (2, 3)),
    "karcher": ({}, {}, "no", (2, 3)),
    "passthrough": ({"scale": (0.5, 2)}, {}, "no", (1, 1)),
    "task_arithmetic": ({"weight": (-1, 2)}, {"lambda": (0.5, 1.5)}, "yes", (1, 3)),
    "model_stock": ({}, {"filter_wise": "word"}, "yes", (2, 3)),
}
_SHARP: dict[str, tuple[dict[str, Any], dict[str, Any], str, tuple[int, int]]] = {
    "ties": ({"weight": (0.1, 1), "density": (0.2, 1)}, {}, "yes", (1, 3)),
    "breadcrumbs": (
        {"weight": (0.1, 1), "density": (0.3, 0.8), "gamma": (0.01, 0.1)},
        {},
        "yes",
        (1, 3),
    ),
    "sce": ({}, {"select_topk": (0.2, 1)}, "yes", (2, 3)),
    "ram": ({}, {}, "yes", (2, 3)),
    "nearswap": ({}, {"t": (0.001, 0.05)}, "yes", (1, 1)),
}
METHODS = _SMOOTH | _SHARP
_OF_EXPERTS = ("mixtral", "qwen3_moe")
# mergekit leaves the layers' kinds as they are, and m3jax lets a template's end of a
# turn end a text; without a base_model mergekit takes any model's tokenizer.
_IGNORED = {"transformers_version", "layer_types"}
_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def _tokenizer(path: Path, letters: str, pairs: list[str], added: list[str]) -> int:
    """Writes a tokenizer.json of bytes that knows these; how many tokens it has."""
    words = ["<unk>", "<s>", "</s>", *letters, *pairs]
    vocabulary = {own: i for i, own in enumerate(words)}
    merges = [(own[:-1], own[-1]) for own in pairs]
    own = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    own.add_special_tokens(["<unk>", "<s>", "</s>"])
    own.add_tokens([AddedToken(token, normalized=False) for token in added])
    own.save(str(path))
    return own.get_vocab_size()


def _make_models(folder: Path) -> dict[str, str]:
    """Models of every architecture; why some could not be made, by name."""
    files = {name: str(folder / f"{name}.json") for name in ("same", "more", "other")}
    sizes = {
        "same": _tokenizer(Path(files["same"]), "Ġabcdefghij", ["ab", "abc"], []),
        "more": _tokenizer(
            Path(files["more"]), "Ġabcdefghij", ["ab", "abc"], ["<|im_end|>", "<x>"]
        ),
        "other": _tokenizer(
            Path(files["other"]), "jihgfedcbaĠklm", ["ab", "ki", "kij"], ["<y>", "<x>"]
        ),
    }
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    given: dict[str, Any] = {}
    for arch, fields in ARCHITECTURES.items():
        config = {"model_type": arch, **_SIZES, **fields}
        for seed, name in enumerate(NAMES):
            given[str(folder / arch / name)] = {"config": config, "seed": seed}
    for arch in ("llama", "llama_tied", "gpt2"):
        for seed, name in enumerate(NAMES):
            kind = ("same", "same", "more", "other")[seed]
            rows = sizes[kind] + 5 * (name == "c")
            config = {"model_type": arch, **_SIZES, **ARCHITECTURES[arch]}
            given[str(folder / f"{arch}_tokens" / name)] = {
                "config": {**config, "vocab_size": rows},
                "seed": seed,
                "tokenizer": files[kind],
                "special": {
                    **special,
                    **({"chat_template": _TEMPLATE} if name == "b" else {}),
                },
            }
    for dtype in ("bfloat16", "float16"):
        for seed, name in enumerate(NAMES):
            given[str(folder / f"llama_{dtype}" / name)] = {
                "config": {"model_type": "llama", **_SIZES},
                "seed": seed,
                "dtype": dtype,
            }
    return dict(
        line.split(" ", 1) for line in beside.make_models(given).splitlines() if line
    )


def _value(random: np.random.Generator, limits: Any) -> Any:
    def plain() -> Any:
        if limits == "word" or (limits is bool and random.random() < 0.5):
            return bool(random.integers(2))
        if limits is bool:
            return [bool(own) for own in random.integers(0, 2, random.integers(1, 6))]
        count = int(random.integers(2, 5)) if random.random() < 0.3 else 1
        points = [round(float(own), 3) for own in random.uniform(*limits, count)]
        return points if count > 1 else points[0]

    if random.random() < 0.25:
        words = ["mlp", "attn", "q_proj", "norm", "layers.1.", "lm_head", "h.0"]
        some = [str(own) for own in random.choice(words, 2, replace=False)]
        rules = [{"filter": own, "value": plain()} for own in some]
        return [*rules, {"value": plain()}]
    return plain()


def _document(case: int) -> dict[str, Any]:
    random = np.random.default_rng(case)

    def chance(share: float) -> bool:
        return bool(random.random() < share)

    archs = [*ARCHITECTURES, *["llama_bfloat16", "llama_float16"] * 2]
    archs += ["llama_tokens", "llama_tied_tokens", "gpt2_tokens"] * 5
    arch = str(random.choice(archs))
    tokens, halves = arch.endswith("_tokens"), arch.endswith("float16")
    dtype = str(random.choice(["float32", "float32", "bfloat16", "float16", "none"]))
    smooth = halves or tokens or dtype in ("bfloat16", "float16")
    name = str(random.choice(list(_SMOOTH if smooth else METHODS)))
    if arch in _OF_EXPERTS:  # mergekit merges those of a layer as one tensor
        name = str(random.choice(["linear", "task_arithmetic", "passthrough"]))
    each, shared, base, (low, high) = METHODS[name]
    count = int(random.integers(low, high + 1))
    named = [str(own) for own in random.choice(NAMES[1:], count, replace=False)]
    with_base = base in ("yes", "listed") or (base == "maybe" and chance(0.5))
    listed = base == "listed" or (with_base and chance(0.3))

    def model(own: str) -> str:
        return f"{arch}/{own}"

    def source(own: str) -> dict[str, Any]:
        values = {key: _value(random, limits) for key, limits in each.items()}
        return {"model": model(own), **({"parameters": values} if values else {})}

    document: dict[str, Any] = {"merge_method": name}
    if dtype != "none":
        document["dtype"] = dtype
    if chance(0.3):
        out = ["float32", "bfloat16", "float16"]
        document["out_dtype"] = str(random.choice(out))
    if with_base:
        document["base_model"] = model("base")
    values = {key: _value(random, limits) for key, limits in shared.items()}
    if values:
        document["parameters"] = values
    every = [*(["base"] if listed else []), *named]
    if tokens:
        known = dict.fromkeys([*every, *["base"] * with_base])
        document |= _tokens(random, arch, [*known], with_base)
    if chance(0.5):
        document["models"] = [source(own) for own in every]
        if chance(0.2):
            document["modules"] = {"default": {"models": document.pop("models")}}
        return document
    if with_base and not listed:
        every = ["base", *every]
    document["slices"] = []
    shifted = name == "passthrough" or chance(0.3)
    for _ in range(int(random.integers(1, 4))):
        length = int(random.integers(1, LAYERS + 1))
        first = int(random.integers(0, LAYERS - length + 1))
        sources = []
        for own in every:
            if shifted:
                first = int(random.integers(0, LAYERS - length + 1))
            sources.append({**source(own), "layer_range": [first, first + length]})
        part: dict[str, Any] = {"sources": sources}
        if values and chance(0.4):
            part["parameters"] = {k: _value(random, shared[k]) for k in values}
        document["slices"].append(part)
    return document


def _tokens(
    random: np.random.Generator, arch: str, models: list[str], has_base: bool
) -> dict[str, Any]:
    """What the document says of tokenizers."""
    own = [f"{arch}/{name}" for name in models]
    source = str(random.choice(["union", *["base"] * has_base, *own]))
    found: dict[str, Any] = {"source": source}
    if random.random() < 0.4:
        found["pad_to_multiple_of"] = int(random.choice([2, 7, 16]))
    if random.random() < 0.4:
        donor = str(random.choice(own))
        kinds = [
            {"source": donor, "force": bool(random.integers(2))},
            {"source": {"kind": "zero"}},
            {"source": {"kind": "model_token", "model": donor, "token": "</s>"}},
            {"source": {"kind": "model_token", "model": donor, "token_id": 4}},
        ]
        token = str(random.choice(["a", "</s>", "ab"]))
        found["tokens"] = {token: kinds[int(random.integers(len(kinds)))]}
    document: dict[str, Any] = {"tokenizer": found}
    if random.random() < 0.3:
        document["chat_template"] = str(random.choice(["auto", "chatml", "llama3"]))
    return document


def _by_token(folder: Path) -> dict[str, int]:
    return dict(Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(True))


def _template(folder: Path) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text()
    file = folder / "tokenizer_config.json"
    return json.loads(file.read_text()).get("chat_template") if file.exists() else None


def _differences(case: str, document: Mapping[str, Any]) -> list[Any]:
    """In what the two outputs differ."""
    ours, theirs = (checkpoints.read(Path(f"{case}.{o}")) for o in ("ours", "theirs"))
    found: list[Any] = []
    ours = _fused(ours)
    if set(ours) != set(theirs):
        return [("names", sorted(set(ours) ^ set(theirs))[:4])]
    configs = [
        json.loads(Path(f"{case}.{own}/config.json").read_text())
        for own in ("ours", "theirs")
    ]
    ignored = _IGNORED | ({"eos_token_id"} if "chat_template" in document else set())
    for key in sorted({*configs[0], *configs[1]} - ignored):
        one, two = (own.get(key, "nothing") for own in configs)
        if one != two:
            found.append((key, one, two))
    ids = (
        [_by_token(Path(f"{case}.{o}")) for o in ("ours", "theirs")]
        if ("tokenizer" in document)
        else []
    )
    templates = [_template(Path(f"{case}.{own}")) for own in ("ours", "theirs")]
    chosen = "base_model" in document and "chat_template" not in document
    if ids and chosen and templates[0] != templates[1]:
        found.append(("template", *templates))
    if ids and set(ids[0]) != set(ids[1]):
        found.append(("tokens", sorted(set(ids[0]) ^ set(ids[1]))))
        return found
    dtypes = {document.get("dtype"), document.get("out_dtype")}
    half = bool(dtypes & {"bfloat16", "float16"}) or "float16/" in json.dumps(document)
    for name, own in ours.items():
        wanted = theirs[name]
        if own.dtype != wanted.dtype or own.shape != wanted.shape:
            found.append((name, own.dtype, wanted.dtype, own.shape, wanted.shape))
            continue
        if ids and own.shape[0] > max(ids[0].values()) and own.shape[0] < 100:
            is_rows = any(k in name for k in ("embed_tokens", "lm_head", "wte"))
            if is_rows:
                order = sorted(ids[0])
                own, wanted = (
                    np.concatenate([x[[i[t] for t in order]], x[max(i.values()) + 1 :]])
                    for x, i in ((own, ids[0]), (wanted, ids[1]))
                )
        own, wanted = own.astype(np.float64), wanted.astype(np.float64)
        least = 5e-3 if document["merge_method"] == "model_stock" else 2e-3
        limits = {"rtol": 2e-6, "atol": 1e-6}
        if half:  # mergekit rounds at every step
            limits = {"rtol": 2e-2, "atol": least}
        near = np.isclose(own, wanted, **limits)
        if not near.all():
            away = float(np.abs(own - wanted).max())
            found.append((name, int(near.size - near.sum()), near.size, away))
    return found


@pytest.mark.skipif(not beside.MERGEKIT, reason="M3JAX_MERGEKIT names no Python")
def test_structures_agree_with_mergekit(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: one)
    missing = _make_models(tmp_path)
    print("not made:", missing)
    documents = {f"case{i}": _document(i) for i in range(FIRST, FIRST + CASES)}
    for tokens in (False, True):
        chosen = [n for n, own in documents.items() if ("tokenizer" in own) == tokens]
        for name in chosen:
            Path(f"{name}.yml").write_text(yaml.safe_dump(documents[name]))
        beside.merge(chosen, tokenizer=tokens)
    refused, differ = [], {}
    for name, document in documents.items():
        ran = run("merge", f"--config={name}.yml", f"--output={name}.ours", "--nofsync")
        why = beside.refused(name)
        if why is not None:
            refused.append((name, ran.code, why[:200], ran.err[-200:]))
        elif ran.code:
            differ[name] = [("refused", ran.err[-400:])]
        elif found := _differences(name, document):
            differ[name] = found[:4]
    print(f"{CASES - len(refused) - len(differ)} of {CASES} agree")
    for own in refused:
        print("mergekit refused", *own)
    for name, own in differ.items():
        print(name, json.dumps(documents[name]), *own, sep="\n    ")
    assert not differ
