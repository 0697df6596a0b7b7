"""Configurations of the shapes that mergekit's README, examples and documentation have,
over tiny stand-ins of their models: each merges, and what is simple is as it should be.

The YAML is ours; methods, levels of parameters and forms of slices are what people copy
from there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from command_line import Run

LAYERS = 5  # of the 40 that the stacked models have


def _shapes(prefix: str = "model.", layers: int = LAYERS) -> dict[str, Any]:
    shapes: dict[str, Any] = {f"{prefix}embed_tokens.weight": (7, 4)}
    for i in range(layers):
        for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"):
            shapes[f"{prefix}layers.{i}.{part}.weight"] = (4, 4)
        shapes[f"{prefix}layers.{i}.input_layernorm.weight"] = (4,)
    return {**shapes, f"{prefix}norm.weight": (4,), "lm_head.weight": (7, 4)}


VISION = {f"visual.blocks.{i}.attn.qkv.weight": (6, 4) for i in range(2)}
CONFIG = {"model_type": "llama", "num_hidden_layers": LAYERS, "vocab_size": 7}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    trees: dict[str, Any] = {}
    for seed, name in enumerate(("base", "orca", "wizard", "platypus")):
        shapes = {**_shapes(), **VISION}
        base = trees.get("base")
        trees[name] = checkpoints.random_model(seed, shapes, base=base)
        text = {n: own for n, own in trees[name].items() if "visual" not in n}
        checkpoints.write(folder / name, text, CONFIG)
        checkpoints.write(folder / f"{name}_vl", trees[name], CONFIG)
    return folder


LINEAR = """
models:
  - {model: orca, parameters: {weight: 1.0}}
  - {model: wizard, parameters: {weight: 0.3}}
  - {model: platypus, parameters: {weight: 0.5}}
merge_method: linear
dtype: float16
"""
GRADIENT_SLERP = """
slices:
  - sources:
      - {model: orca, layer_range: [0, 5]}
      - {model: platypus, layer_range: [0, 5]}
merge_method: slerp
base_model: orca
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5  # of all others
dtype: float16
"""
STACK = """
slices:
  - sources:
    - {model: orca, layer_range: [0, 3]}
  - sources:
    - {model: platypus, layer_range: [2, 5]}
merge_method: passthrough
dtype: float16
"""
TIES = """
models:
  - model: orca
    parameters: {density: [1, 0.7, 0.1], weight: 1.0}
  - model: platypus
    parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}
  - model: wizard
    parameters:
      density: 0.33
      weight:
        - {filter: mlp, value: 0.5}
        - value: 0
merge_method: ties
base_model: base
parameters: {normalize: true, int8_mask: true}
dtype: float16
"""
EXAMPLES = {
    "linear": LINEAR,
    "gradient slerp": GRADIENT_SLERP,
    "stack": STACK,
    "first layers": """
slices: [{sources: [{model: orca, layer_range: [0, 3]}]}]
merge_method: passthrough
dtype: float16
""",
    "ties": TIES,
    "ties, not normalised": """
models:
  - {model: orca, parameters: {density: 0.5, weight: 0.5}}
  - {model: wizard, parameters: {density: 0.5, weight: 0.5}}
merge_method: ties
base_model: base
parameters: {normalize: false, int8_mask: true}
dtype: float16
""",
    "dare, the base listed": """
models:
  - model: base  # needs no parameters
  - {model: orca, parameters: {density: 0.53, weight: 0.4}}
  - {model: wizard, parameters: {density: 0.53, weight: 0.3}}
merge_method: dare_ties
base_model: base
parameters: {int8_mask: true}
dtype: bfloat16
""",
    "fusion": """
models: [{model: orca}]
merge_method: arcee_fusion
base_model: base
dtype: bfloat16
""",
    "model stock": """
models: [{model: orca}, {model: wizard}, {model: platypus}]
merge_method: model_stock
base_model: base
dtype: bfloat16
""",
    "vision linear": """
models:
  - {model: orca_vl, parameters: {weight: 1.0}}
  - {model: wizard_vl, parameters: {weight: 1.0}}
merge_method: linear
dtype: float32
""",
    "vision ties": """
models:
  - {model: orca_vl, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}
  - {model: wizard_vl, parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}}
merge_method: ties
base_model: base_vl
parameters: {normalize: true, int8_mask: true}
dtype: float16
""",
    "slerp, then ties": GRADIENT_SLERP.replace("\nslices", "\nname: gradient\nslices")
    + "---"
    + TIES.replace("model: orca", "model: gradient"),
    "three stages": """
name: first-merge
merge_method: linear
models: [{model: orca}, {model: wizard}]
parameters: {weight: 0.5}
---
name: second-merge
merge_method: slerp
base_model: first-merge
models: [{model: platypus}]
parameters: {t: 0.5}
---
merge_method: dare_ties
base_model: base
models:
  - {model: second-merge, parameters: {density: 0.6, weight: 0.5}}
  - {model: wizard, parameters: {density: 0.8, weight: 0.5}}
""",
}
COUNTS = {"stack": 6, "first layers": 3}  # of layers


def _merged(name: str, output: Path, run: Run) -> dict[str, np.ndarray]:
    config = output.with_suffix(".yml")
    config.write_text(EXAMPLES[name])
    ran = run("merge", f"--config={config}", f"--output={output}", "--nofsync")
    assert ran.code == 0, ran.err
    return checkpoints.read(output)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_merge(
    name: str,
    models: Path,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(models)
    got = _merged(name, tmp_path / "out", run)
    layers = COUNTS.get(name, LAYERS)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == layers
    more = VISION if "vision" in name else {}
    assert {n: own.shape for n, own in got.items()} == {
        **_shapes("model.", layers),
        **more,
    }
    assert all(np.isfinite(own.astype(np.float32)).all() for own in got.values())
    dtypes = {str(own.dtype) for own in got.values()}
    said = [line for line in EXAMPLES[name].splitlines() if line.startswith("dtype")]
    assert dtypes == {said[-1].removeprefix("dtype: ") if said else "float32"}
    trees = {n: checkpoints.read(models / n) for n in ("orca", "wizard", "platypus")}
    if name == "linear":
        for tensor, own in got.items():
            sides = zip((1.0, 0.3, 0.5), trees.values(), strict=True)
            wanted = sum(weight * tree[tensor] for weight, tree in sides) / 1.8
            np.testing.assert_allclose(own, wanted, rtol=2e-3, atol=1e-5)
    if name == "stack":
        for i, (whose, layer) in enumerate(
            [*(("orca", i) for i in range(3)), *(("platypus", i) for i in range(2, 5))]
        ):
            own = got[f"model.layers.{i}.mlp.up_proj.weight"]
            wanted = trees[whose][f"model.layers.{layer}.mlp.up_proj.weight"]
            assert np.array_equal(own, wanted.astype(np.float16))
