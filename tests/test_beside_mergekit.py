"""Random YAML over random models, merged by mergekit and by m3jax.

    M3JAX_MERGEKIT=PYTHON M3JAX_CASES=200 python -m pytest tests/test_beside_mergekit.py

PYTHON is that of an environment with mergekit 0.1.5; without it the test is skipped.
Methods, gradients, filters, slices and levels of parameters are drawn by case number.
docs/MERGEKIT.md records how many agreed.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import yaml
from command_line import Run

MERGEKIT = os.environ.get("M3JAX_MERGEKIT")
CASES = int(os.environ.get("M3JAX_CASES", "40"))
LAYERS = 4
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "num_hidden_layers": LAYERS,
    "vocab_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "intermediate_size": 12,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
# By model, for all, and whether there is a base and how many others.
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any], str, tuple[int, int]]] = {
    "linear": ({"weight": (0.1, 2)}, {"normalize": bool}, "no", (1, 3)),
    "slerp": ({}, {"t": (0, 1)}, "listed", (1, 1)),
    "nuslerp": (
        {"weight": (0.1, 1)},
        {"nuslerp_flatten": "word", "nuslerp_row_wise": "word"},
        "maybe",
        (2, 2),
    ),
    "multislerp": ({"weight": (0.1, 1)}, {}, "maybe", (2, 3)),
    "karcher": ({}, {"max_iter": int}, "no", (2, 3)),
    "passthrough": ({"scale": (0, 2)}, {}, "no", (1, 1)),
    "model_stock": ({}, {"filter_wise": "word"}, "yes", (2, 3)),
    "nearswap": ({}, {"t": (0.001, 0.05)}, "yes", (1, 1)),
    "sce": ({}, {"select_topk": (0.2, 1)}, "yes", (2, 3)),
    "ram": ({}, {}, "yes", (2, 3)),
    "task_arithmetic": ({"weight": (-1, 2)}, {"lambda": (0.5, 1.5)}, "yes", (1, 3)),
    "ties": (
        {"weight": (0.1, 1), "density": (0.2, 1)},
        {"normalize": bool, "lambda": (0.5, 1.5)},
        "yes",
        (1, 3),
    ),
    "breadcrumbs": (
        {"weight": (0.1, 1), "density": (0.3, 0.8), "gamma": (0.01, 0.2)},
        {"lambda": (0.5, 1.5)},
        "yes",
        (1, 3),
    ),
    "breadcrumbs_ties": (
        {"weight": (0.1, 1), "density": (0.3, 0.8), "gamma": (0.01, 0.2)},
        {"normalize": bool},
        "yes",
        (1, 3),
    ),
}
_DRIVER = """
import json, pathlib, sys, torch, yaml
torch.set_num_threads(1)
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
OPTIONS = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
for name in json.load(sys.stdin):
    config = MergeConfiguration.model_validate(yaml.safe_load(open(name + ".yml")))
    try:
        run_merge(config, name + ".theirs", OPTIONS)
    except Exception as error:
        pathlib.Path(name + ".error").write_text(repr(error))
"""


def _write_models(folder: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (12, 8),
        "lm_head.weight": (12, 8),
        "model.norm.weight": (8,),
    }
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        shapes |= {
            f"{layer}input_layernorm.weight": (8,),
            f"{layer}post_attention_layernorm.weight": (8,),
            f"{layer}self_attn.q_proj.weight": (8, 8),
            f"{layer}self_attn.k_proj.weight": (4, 8),
            f"{layer}self_attn.v_proj.weight": (4, 8),
            f"{layer}self_attn.o_proj.weight": (8, 8),
            f"{layer}mlp.gate_proj.weight": (12, 8),
            f"{layer}mlp.up_proj.weight": (12, 8),
            f"{layer}mlp.down_proj.weight": (8, 12),
        }
    base = checkpoints.random_model(0, shapes)
    for i, name in enumerate(("base", "a", "b", "c")):
        own = checkpoints.random_model(i, shapes, base=base) if i else base
        checkpoints.write(folder / name, own)
        (folder / name / "config.json").write_text(json.dumps(CONFIG))


def _value(random: np.random.Generator, kind: Any) -> Any:
    """A number, a gradient, or filters of them."""
    if kind == "word":
        return bool(random.integers(2))
    if kind is int:
        return int(random.integers(1, 12))

    def plain() -> Any:
        if kind is bool:
            return bool(random.integers(2))
        count = int(random.integers(2, 5)) if random.random() < 0.3 else 1
        points = [round(float(own), 3) for own in random.uniform(*kind, count)]
        return points if count > 1 else points[0]

    if random.random() < 0.25:
        words = ["mlp", "self_attn", "q_proj", "norm", "layers.1.", "lm_head"]
        some = [str(own) for own in random.choice(words, 2, replace=False)]
        rules = [{"filter": own, "value": plain()} for own in some]
        return [*rules, {"value": plain()}]
    return plain()


def _document(case: int) -> dict[str, Any]:
    random = np.random.default_rng(case)
    name = list(METHODS)[case % len(METHODS)]
    each, shared, base, (low, high) = METHODS[name]
    models = ["a", "b", "c"][: int(random.integers(low, high + 1))]
    with_base = base in ("yes", "listed") or (base == "maybe" and random.random() < 0.5)
    values = {key: _value(random, kind) for key, kind in shared.items()}

    def source(model: str) -> dict[str, Any]:
        own = {key: _value(random, kind) for key, kind in each.items()}
        return {"model": model, **({"parameters": own} if own else {})}

    document: dict[str, Any] = {"merge_method": name, "dtype": "float32"}
    if with_base:
        document["base_model"] = "base"
    if values:
        document["parameters"] = values
    named = [*(["base"] if base == "listed" else []), *models]
    if random.random() < 0.5:
        document["models"] = [source(own) for own in named]
        return document
    named = [*(["base"] if with_base and base != "listed" else []), *named]
    document["slices"] = []
    for _ in range(int(random.integers(1, 4))):
        first = int(random.integers(0, LAYERS))
        stop = int(random.integers(first + 1, LAYERS + 1))
        sources = [{**source(own), "layer_range": [first, stop]} for own in named]
        part: dict[str, Any] = {"sources": sources}
        if values and random.random() < 0.5:
            part["parameters"] = {k: _value(random, shared[k]) for k in values}
        document["slices"].append(part)
    return document


@pytest.mark.skipif(not MERGEKIT, reason="M3JAX_MERGEKIT names no Python with mergekit")
def test_agrees_with_mergekit(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MERGEKIT is not None
    monkeypatch.chdir(tmp_path)
    _write_models(tmp_path)
    names = [f"case{i}" for i in range(CASES)]
    for i, name in enumerate(names):
        Path(f"{name}.yml").write_text(yaml.safe_dump(_document(i)))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(
        [MERGEKIT, "-c", _DRIVER],
        input=json.dumps(names),
        text=True,
        check=True,
        capture_output=True,
        env=environment,
    )
    refused, differ = [], []
    for name in names:
        ran = run("merge", f"--config={name}.yml", f"--output={name}.ours", "--nofsync")
        if Path(f"{name}.error").exists():
            refused.append((name, ran.code))
            continue
        assert ran.code == 0, (name, ran.err)
        ours, theirs = (
            checkpoints.read(Path(f"{name}.{o}")) for o in ("ours", "theirs")
        )
        assert set(ours) == set(theirs), name
        for tensor, own in ours.items():
            wanted = theirs[tensor]
            near = np.isclose(own, wanted, rtol=2e-6, atol=1e-6)
            if not near.all():
                away = np.abs(own - wanted).max()
                differ.append((name, tensor, int(near.size - near.sum()), float(away)))
    agreed = CASES - len(refused) - len({name for name, *_ in differ})
    print(f"{agreed} of {CASES} agree; mergekit refused {refused}; differ: {differ}")
    assert not differ
