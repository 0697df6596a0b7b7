"""The contract of every registered method, and of one that is registered here."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoints
import contract
import numpy as np
import pytest
from command_line import Run
from grids import slow

from m3jax.commands import config
from m3jax.commands.methods import markdown
from m3jax.methods import METHODS
from m3jax.methods.ties import Ties
from m3jax.recipe import Rules

NEW = '''
"""Midpoint: a method that a stranger adds, in one file."""

from __future__ import annotations

from typing import Any

from m3jax.methods.fields import choice, number
from m3jax.methods.step import (
    Info, Method, Numbers, Operands, Problem, Statistics, register, rounded_product,
    sum_over_models,
)
from m3jax.methods.sums import deltas, gram


@register("longest")
class Longest(Method):
    """θ0 + s · the task vector of the largest norm in the tensor.

    Source: ours, for this test.
    """

    scaling: Any = number(default=1.0, help="s", search=(0.5, 1.5))
    smallest: Any = choice(default=False, help="the smallest norm instead")
    scope = "tensor"

    def measure(self, problem: Problem) -> Statistics:
        products = yield from gram(deltas, problem)
        return {"norms": products.diagonal()}

    def derive(self, numbers: Numbers, info: Info, xp: Any) -> Info:
        norms = -info["norms"] if self.smallest else info["norms"]
        best = xp.argmax(norms, axis=0)
        chosen = xp.arange(len(norms))[:, None] == best[None]
        return {"chosen": 1.0 * chosen}

    def apply(self, x: Operands, p: Numbers, info: Numbers) -> Any:
        chosen = sum_over_models(rounded_product(x.deltas, info["chosen"]))
        return x.base + rounded_product(chosen, p["scaling"])
'''


def shaped() -> Iterator[Any]:
    """Each check over each method: with two tensors, and slow with all."""
    for check, method in itertools.product(contract.SHAPED, METHODS):
        name = f"{method}-{check.__name__}"
        yield pytest.param(method, check, contract.THIN, id=name)
        yield slow(pytest.param(method, check, contract.SHAPES, id=f"{name}-all"))


@pytest.mark.parametrize(("method", "check", "shapes"), list(shaped()))
def test_contract(
    method: str, check: contract.Check, shapes: checkpoints.Shapes, tmp_path: Path
):
    if check is contract.check_equal_models and method in contract.NOT_IDEMPOTENT:
        pytest.skip(contract.NOT_IDEMPOTENT[method])
    check(method, tmp_path, shapes)


@pytest.mark.parametrize("method", METHODS)
def test_resume(method: str, tmp_path: Path):
    contract.check_resume(method, tmp_path)


@pytest.mark.parametrize("check", contract.COMMANDS)
@pytest.mark.parametrize("method", METHODS)
def test_commands(method: str, check: contract.Check, tmp_path: Path, run: Run):
    check(method, tmp_path, run)


@pytest.mark.parametrize("method", METHODS)
def test_documented(method: str):
    contract.check_docs_row(method)


def test_docs_are_those_of_the_registry():
    docs = (Path(__file__).parent.parent / "docs" / "METHODS.md").read_text()
    assert markdown() in docs, "run `m3jax methods --markdown` and put it there"


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_statistics_of_layers_and_of_the_model(
    scope: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What is longest in its layer, or in all: alike in all executors, and right."""
    name = f"longest_{scope}"
    text = NEW.replace('"longest"', f'"{name}"').replace('"tensor"', f'"{scope}"')
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module(name)
    try:
        contract.check_executors(name, tmp_path, contract.THIN)
        base, models = contract.inputs(name)
        own = contract.Recipe(method=name, mixup=contract.Mixup(alpha=None))
        merged = contract.in_memory(name, own)
        groups: dict[str, list[str]] = {}
        for tensor in base:
            layer = ".".join(tensor.split(".")[:3]) if scope == "layer" else ""
            groups.setdefault(layer, []).append(tensor)
        for tensors in groups.values():
            norms = [
                sum(np.square(np.float64(m[t]) - base[t]).sum() for t in tensors)
                for m in models
            ]
            longest = models[int(np.argmax(norms))]
            for tensor in tensors:
                np.testing.assert_allclose(merged[tensor], longest[tensor], atol=1e-7)
    finally:
        del METHODS[name], sys.modules[name]


def test_a_new_method_is_one_file(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "longest.py").write_text(NEW)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("longest")
    try:
        fields = config.all_fields(contract.Recipe())
        monkeypatch.setattr(config, "RECIPE_FIELDS", fields)
        for check in contract.SHAPED:
            check("longest", tmp_path / check.__name__, contract.THIN)
        contract.check_resume("longest", tmp_path / "resume")
        for check in contract.COMMANDS:
            check("longest", tmp_path / check.__name__, run)
        contract.check_docs_row("longest")
    finally:
        del METHODS["longest"], sys.modules["longest"]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            {"method": Ties(trim_rate=Rules((("norm", 0.2),), 0.5))},
            "ties.trim_rate differs between tensors that are measured together",
        ),
        (
            {"method": "pcb", "mixup": contract.Mixup(granularity="tensor")},
            "pcb.weights differs .* give all of them one value, and mixup.granularity",
        ),
    ],
)
def test_what_the_whole_model_shares_may_not_differ(recipe: Any, message: str):
    base, models = contract.inputs("ties")
    with pytest.raises(contract.m3jax.RecipeError, match=message):
        contract.m3jax.merge_params(base, models, contract.Recipe(**recipe), 0)
