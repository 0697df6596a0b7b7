"""Slices of overlapping layers, by methods that look at tensors, layers or models.

A merge of slices is the merge of models that were cut before, byte for byte, whoever
runs it: so each method is held to itself.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from command_line import Run

import m3jax
from m3jax.recipe import mergekit

LAYERS = 4
# The layers of the base, a and b that each slice has.
CUTS = (((0, 2), (0, 2), (1, 3)), ((1, 3), (2, 4), (0, 2)), ((3, 4), (0, 1), (3, 4)))
ONE = "weight: 0.7, density: 0.6"
FAMILY = {
    "ties": "",
    "dare_ties": "",
    "breadcrumbs_ties": "gamma: 0.05",
    "della": "epsilon: 0.1",
}
METHODS = {
    **{name: f"{ONE}, {own}" for name, own in FAMILY.items()},
    "sce": "select_topk: 0.4",
    "ram": "",
    "ramplus_tl": "alpha: 0.3",
    "model_stock": "",
    "multislerp": "weight: 1",
    "karcher": "",
    "slerp": "t: 0.3",
    "nuslerp": "weight: 0.5",
    "nearswap": "t: 0.01",
    "arcee_fusion": "",
    "tsv_m": "",
}
PLACES = {"base": 0, "a": 1, "b": 2}
PAIRS = ("slerp", "nearswap", "arcee_fusion")  # of the base and one model
OF_MODEL = "m3jax: {threshold: model}\n"  # one threshold over all layers


def _models(folder: Path) -> dict[str, Any]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (5, 4)}
    for i in range(LAYERS):
        shapes[f"model.layers.{i}.attn.weight"] = (6, 4)
        shapes[f"model.layers.{i}.norm.weight"] = (4,)
    shapes |= {"model.norm.weight": (4,), "lm_head.weight": (5, 4)}
    found: dict[str, Any] = {}
    for seed, name in enumerate(("base", "a", "b")):
        tensors = checkpoints.random_model(seed, shapes, base=found.get("base"))
        found[name] = tensors
        config = {"num_hidden_layers": LAYERS}
        checkpoints.write(folder / name, tensors, config)
    return found


def _cut(tensors: dict[str, np.ndarray], place: int) -> dict[str, np.ndarray]:
    """A model of the layers that the slices take of it."""
    layers = [i for own in CUTS for i in range(*own[place])]
    made = {n: own for n, own in tensors.items() if ".layers." not in n}
    for i, layer in enumerate(layers):
        for name, own in tensors.items():
            if f".layers.{layer}." in name:
                made[re.sub(r"\.layers\.\d+\.", f".layers.{i}.", name)] = own
    return made


def _texts(method: str, ours: str) -> tuple[str, str]:
    """The YAML of slices, and that of models that were cut before."""
    head = f"merge_method: {method}\n{ours}"
    names = ["base", "a"] if method in PAIRS else ["base", "a", "b"]
    if method == "karcher":
        names = ["a", "b"]
    shared = f"parameters: {{{METHODS[method]}}}\n"
    slices = "slices:\n" + "".join(
        "- sources: ["
        + ", ".join(
            f"{{model: {own}, layer_range: {list(ranges[PLACES[own]])}}}"
            for own in names
        )
        + "]\n"
        for ranges in CUTS
    )
    models = "models: [" + ", ".join(f"{{model: {n}_cut}}" for n in names) + "]\n"
    base = "base_model: base{}\n" if "base" in names else ""
    return (
        head + base.format("") + shared + slices,
        head + base.format("_cut") + shared + models,
    )


@pytest.mark.parametrize("method", [*METHODS, "ties of the model"])
def test_slices_are_models_cut_before(
    method: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trees = _models(tmp_path)
    for place, (name, tensors) in enumerate(trees.items()):
        config = {"num_hidden_layers": 5}
        checkpoints.write(tmp_path / f"{name}_cut", _cut(tensors, place), config)
    name, _, over = method.partition(" of ")
    texts = _texts(name, OF_MODEL if over else "")
    for file, text in zip(("slices", "cut"), texts, strict=True):
        Path(f"{file}.yml").write_text(text)
    merges = {
        "slices": ("--config=slices.yml",),
        "cut": ("--config=cut.yml",),
        "sharded": ("--config=slices.yml", "--executor=sharded"),
    }
    found = {}
    for output, flags in merges.items():
        ran = run("merge", *flags, f"--output={output}", "--nofsync", "--seed=3")
        assert ran.code == 0, ran.err
        found[output] = checkpoints.read(Path(output))
    document = mergekit.parse(texts[0]).result
    base = None if document.base is None else trees[document.base]
    models = [trees[own] for own in document.models]
    params = m3jax.merge_params(base, models, document.recipe, 3)
    found["memory"] = {name: np.asarray(own) for name, own in params.items()}
    config = json.loads(Path("slices/config.json").read_text())
    assert config["num_hidden_layers"] == 5
    for tree in found.values():
        for tensor, own in found["cut"].items():
            assert own.tobytes() == tree[tensor].tobytes(), tensor
