"""Spaces of searches: words, whole numbers, methods with their own numbers, groups."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import m3jax
from m3jax.exploration.groups import layer_groups
from m3jax.exploration.merger import Merger
from m3jax.exploration.search.searches import brackets, total
from m3jax.exploration.space import Space
from m3jax.methods import METHODS
from m3jax.recipe import Mixup, Recipe, RecipeError

NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{part}.weight" for i in range(5) for part in ("attn", "mlp")),
    "model.layers.2.experts.0.weight",
    "model.norm.weight",
    "lm_head.weight",
]


def _trees(count: int = 2) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(3)
    return [
        {name: generator.normal(size=(4, 6)).astype(np.float32) for name in NAMES}
        for _ in range(count + 1)
    ]


def _sum_of_the_head(parameters: Any, budget: Any, key: Any) -> dict[str, float]:
    del budget, key
    return {"sum": float(np.sum(parameters["lm_head.weight"]))}


def _group_of(groups: Any, name: str) -> int:
    return next(i for i, group in enumerate(groups) if re.search(group.pattern, name))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_layers_are_shared_out_evenly(count: int) -> None:
    groups = layer_groups(NAMES, count)
    assert len(groups) == count
    for name in NAMES:
        layer = re.search(r"layers\.(\d+)", name)
        expected = int(layer[1]) * count // 5 if layer else count - 1
        expected = 0 if "embed" in name else expected
        assert _group_of(groups, name) == expected, name


def test_what_lies_outside_the_layers_may_be_a_group() -> None:
    groups = layer_groups(NAMES, 2, outside=True)
    outside = [name for name in NAMES if _group_of(groups, name) == 2]
    assert outside == [NAMES[0], *NAMES[-2:]]


def test_more_groups_than_layers_are_refused() -> None:
    with pytest.raises(RecipeError, match="groups=6 needs 1 to 5"):
        layer_groups(NAMES, 6)


def test_a_method_brings_its_own_numbers() -> None:
    fields = ["method=ties|slerp|model_stock", "ratios", "ties.trim_rate=0.2:0.4"]
    space = Space.parse(fields, Recipe(), 2)
    assert space.dimensions == 3
    ties = space.apply(Recipe(), space.values([0.1, 0.25, 0.5]))
    assert ties.method == m3jax.Ties(trim_rate=pytest.approx(0.3))
    assert ties.mixup.ratios == (0.25, 0.75)
    slerp = space.apply(Recipe(), space.values([0.5, 0.25, 0.5]))
    assert slerp.method == METHODS["slerp"]()
    stock = space.apply(Recipe(), space.values([0.9, 0.25, 0.5]))
    assert (stock.method, stock.mixup.on) == (METHODS["model_stock"](), False)
    asked: list[str] = []

    def pick(axis: Any, field: Any) -> float:
        asked.append(field.name)
        return 0.5

    space.picked(pick)
    assert asked == ["method", "ratios"]  # slerp has no trim_rate


def test_words_and_whole_numbers() -> None:
    space = Space.parse(["dare.strategy"], Recipe(), 2)
    found = [space.values([x])["dare.strategy"][0] for x in (0.0, 0.4, 0.6, 1.0)]
    assert found == ["random", "random", "magnitude", "magnitude"]
    whole = [
        (name, field)
        for name, cls in METHODS.items()
        for field, own in cls.fields().items()
        if getattr(own, "integer", False)
    ]
    method, field = whole[0]
    space = Space.parse([f"{method}.{field}=1:3"], Recipe(method=method), 2)
    values = [space.values([x])[f"{method}.{field}"][0] for x in (0, 0.34, 0.67, 1)]
    assert values == [1, 2, 3, 3]


def test_a_grid_has_no_point_twice() -> None:
    fields = ["method=ties|slerp", "trim_rate=0.2:0.4"]
    space = Space.parse(fields, Recipe(mixup=Mixup(alpha=None)), 2)
    assert [dict(point) for point in space.grid(6)] == [
        {"method": ("ties",), "trim_rate": (0.2,)},
        {"method": ("ties",), "trim_rate": (pytest.approx(0.3),)},
        {"method": ("ties",), "trim_rate": (0.4,)},
        {"method": ("slerp",)},
    ]


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("method=ties", "needs two methods or more"),
        ("method=ties|tise", "needs two methods or more"),
        ("strategy=random|often", "needs two or more of random|magnitude"),
        ("ties.scaling", "ties.scaling does nothing in method average"),
        ("breadth", "needs each once of ratios, seed"),
    ],
)
def test_a_wrong_field_is_named(field: str, said: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(said)):
        Space.parse([field], Recipe(), 2)


def test_groups_have_methods_of_their_own() -> None:
    base, *models = _trees()
    found = m3jax.explore(
        base,
        models,
        evaluator=_sum_of_the_head,
        sampler="random",
        search=["method=ties|task_arithmetic|average", "ratios", "scaling=0.5:1"],
        groups=3,
        draws=6,
    )
    assert any(
        len({own.method.name for own in t.recipe.variants}) > 1 for t in found.trials
    )
    for trial in found.trials:
        merged = m3jax.merge_params(base, models, trial.recipe, trial.seed)
        groups = layer_groups(NAMES, 3)
        for g, own in enumerate((*trial.recipe.variants[1:], trial.recipe.variants[0])):
            names = [name for name in NAMES if _group_of(groups, name) == g]
            trees = [{name: tree[name] for name in names} for tree in (base, *models)]
            alone = m3jax.merge_params(trees[0], trees[1:], own, trial.seed)
            for name in names:
                np.testing.assert_array_equal(merged[name], alone[name])


def test_what_one_draw_measured_is_not_another_ones() -> None:
    base, *models = _trees()
    average = (METHODS["average"](),)
    merger = Merger(base, models, Recipe(method="ties", mixup=Mixup(alpha=None)))
    for method in (
        METHODS["ties"](trim_rate=0.2),
        METHODS["ties"](trim_rate=0.7),
        METHODS["slerp"](),
        METHODS["task_arithmetic"](),
    ):
        recipe = Recipe(
            method="average",
            mixup=Mixup(alpha=None),
            rules=(("attn", (method,)), ("mlp", average)),
        )
        merged = merger(recipe, 0)
        alone = m3jax.merge_params(base, models, recipe, 0)
        for name in NAMES:
            np.testing.assert_array_equal(merged[name], alone[name])


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_optimisers_find_the_method(sampler: str) -> None:
    pytest.importorskip("optuna")
    base, *models = _trees()
    wanted = m3jax.merge_params(
        base, models, Recipe(method="ties", mixup=Mixup(ratios=(0.2, 0.8))), 0
    )

    def evaluator(parameters: Any, budget: Any, key: Any) -> dict[str, float]:
        def near(name: str) -> float:
            return -float(np.abs(parameters[name] - wanted[name]).mean())

        return {"first": near(NAMES[0]), "last": near(NAMES[-1])}

    found = m3jax.explore(
        base,
        models,
        evaluator=evaluator,
        sampler=sampler,
        weights={"first": 1.0, "last": 1.0},
        search=["method=average|ties|slerp", "ratios"],
        generation=6,
        draws=42,
    )
    assert found.winner.recipe.method.name == "ties"
    assert found.winner.objective > -0.1


def test_nsga2_needs_several_scores() -> None:
    pytest.importorskip("optuna")
    base, *models = _trees()
    with pytest.raises(RecipeError, match="needs two tasks or more"):
        m3jax.explore(base, models, evaluator=lambda *own: {"a": 1.0}, sampler="nsga2")


@pytest.mark.parametrize("sampler", ["sobol", "tpe"])
def test_hyperband_runs_its_brackets(sampler: str) -> None:
    if sampler == "tpe":
        pytest.importorskip("optuna")
    base, *models = _trees()
    budgets = []

    def evaluator(parameters: Any, budget: Any, key: Any) -> dict[str, float]:
        budgets.append(budget)
        return _sum_of_the_head(parameters, budget, key)

    found = m3jax.explore(
        base, models, evaluator=evaluator, sampler=sampler, hyperband=3, budget=9
    )
    rungs = brackets(0, 9, hyperband=3)
    asked = [
        own.budget for bracket in rungs for own in bracket for _ in range(own.draws)
    ]
    assert budgets[5:-1] == asked
    assert len(asked) == total(rungs) == len(found.trials)
    assert found.winner.budget == 9
    assert len(found.draws) == sum(bracket[0].draws for bracket in rungs)
