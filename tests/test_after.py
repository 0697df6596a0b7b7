"""What is done to a merge afterwards: LiNeS and SVC, after any method."""

from __future__ import annotations

from typing import Any

import checkpoints
import jax
import numpy as np
import pytest
from grids import slow

import m3jax
from m3jax.checkpoints.formats import tree
from m3jax.recipe import RecipeError

SHAPES = {
    "model.embed_tokens.weight": (11, 6),
    "model.layers.0.up.weight": (7, 9),
    "model.layers.1.up.weight": (9, 7),
    "model.layers.1.norm.weight": (7,),
    "model.layers.2.up.weight": (5, 5),
    "model.norm.weight": (4,),
}
DEPTHS = dict(zip(SHAPES, (0, 0, 0.5, 0.5, 1, 0), strict=True))
Tensors = dict[str, np.ndarray]


def inputs(count: int = 2) -> tuple[Tensors, list[Tensors]]:
    base = checkpoints.random_model(0, SHAPES)
    return base, [
        checkpoints.random_model(k + 1, SHAPES, np.float32, base) for k in range(count)
    ]


def merged(base: Tensors, models: list[Tensors], **fields: Any) -> Tensors:
    recipe = m3jax.Recipe.from_dict({"mixup": {"alpha": None}, **fields})
    trees = [tree.nest(own) for own in (base, *models)]
    leaves, _ = tree.flatten(m3jax.merge_params(trees[0], trees[1:], recipe, 0))
    return {name: np.asarray(leaf, np.float64) for name, leaf in leaves.items()}


def svc(delta: np.ndarray, tasks: list[np.ndarray], alpha: float) -> np.ndarray:
    left, values, right = np.linalg.svd(delta, full_matrices=False)
    for r in range(len(values)):
        mine, shares = left[:, r] @ delta, []
        for task in tasks:
            own = left[:, r] @ task
            if np.linalg.norm(own) > 1e-12:
                shares.append(max(alpha, mine @ own / (own @ own)))
        values[r] *= len(shares) / sum(shares)
    return (left * values) @ right


@pytest.mark.parametrize("method", [slow("ties"), "tsv_m", "average"])
def test_lines_scales_the_merged_task_vector_by_depth(method):
    base, models = inputs()
    before = merged(base, models, method=method)
    lines = {"first": 0.4, "slope": 0.6}
    after = merged(base, models, method=method, lines=lines)
    for name, own in before.items():
        factor = 0.4 + 0.6 * DEPTHS[name]
        wanted = base[name] + factor * (own - base[name])
        np.testing.assert_allclose(after[name], wanted, atol=1e-8, rtol=2e-7)


def test_lines_takes_another_scale_of_depth():
    """A gradient of one's own for some layers, numbers for others by their names."""
    base, models = inputs()
    before = merged(base, models, method="average")
    rules = [[r".*\.up\.", {"gradient": [1.0, 0.2, 0.6]}], [r".*embed", 0.25]]
    depth = {"rules": rules, "otherwise": 0.5}
    lines = {"first": 0.4, "slope": 0.6, "depth": depth}
    after = merged(base, models, method="average", lines=lines)
    depths = zip(SHAPES, (0.25, 1.0, 0.2, 0.5, 0.6, 0.5), strict=True)
    for name, own in depths:
        wanted = base[name] + (0.4 + 0.6 * own) * (before[name] - base[name])
        np.testing.assert_allclose(after[name], wanted, atol=1e-8, rtol=2e-7)


@pytest.mark.parametrize("count", [slow(1), 3])
def test_svc_is_its_formula_after_a_linear_and_a_spectral_method(count):
    base, models = inputs(count)
    models[0]["model.layers.2.up.weight"] = base["model.layers.2.up.weight"]  # no task
    for method in ("task_arithmetic", "tsv_m"):
        before = merged(base, models, method=method)
        after = merged(base, models, method=method, svc={"alpha": 0.1})
        for name, own in before.items():
            wide = base[name].astype(np.float64)
            tasks = [model[name] - wide for model in models]
            wanted = own
            if own.ndim == 2 and np.abs(own - wide).max() > 0:
                wanted = wide + svc(own - wide, tasks, 0.1)
            np.testing.assert_allclose(after[name], wanted, atol=2e-6, err_msg=name)


def test_svc_makes_the_sum_of_equal_tasks_the_task_again():
    base, (model,) = inputs(1)
    after = merged(base, [model] * 4, method="task_arithmetic", svc={"alpha": 0.1})
    for name, own in after.items():
        if own.ndim == 2:
            np.testing.assert_allclose(own, model[name], atol=1e-6)


def test_they_come_after_dare_and_in_their_order_and_are_one_in_all_executors(tmp_path):
    base, models = inputs()
    paths = [checkpoints.write(tmp_path / "base", base)]
    paths += [checkpoints.write(tmp_path / f"m{k}", m) for k, m in enumerate(models)]
    fields = {
        "method": "ties",
        "transforms": ["svc", "dare", "lines"],
        "dare": {"drop_rate": 0.3},
        "svc": {"alpha": 0.2},
        "lines": {"first": 0.5, "slope": 0.25},
        "mixup": {"alpha": 0.4},
    }
    recipe = m3jax.Recipe.from_dict(fields)
    assert m3jax.Recipe.from_dict(recipe.to_dict()) == recipe
    found = []
    for i, execution in enumerate(({}, {"chunk_size": 1024, "threads": 1})):
        output = tmp_path / f"out{i}"
        made = m3jax.Execution(fsync=False, **execution)
        m3jax.merge(paths[0], paths[1:], output, recipe, seed=7, execution=made)
        found.append(checkpoints.read(output))
    trees = [tree.nest(own) for own in (base, *models)]
    leaves, _ = tree.flatten(m3jax.merge_params(trees[0], trees[1:], recipe, 7))
    for name in SHAPES:
        np.testing.assert_array_equal(found[0][name], found[1][name])
        np.testing.assert_array_equal(found[0][name], np.asarray(leaves[name]))


def test_without_a_number_they_are_off_and_what_does_not_fit_is_refused():
    assert m3jax.Recipe(transforms=(m3jax.Lines(), m3jax.Svc())).transforms == ()
    with pytest.raises(RecipeError, match="method emr makes several tensors"):
        m3jax.Recipe.from_dict({"method": "emr", "svc": {"alpha": 0.1}})
    with pytest.raises(RecipeError, match=r"svc\.alpha=-1"):
        m3jax.Recipe.from_dict({"svc": {"alpha": -1}})
    with pytest.raises(RecipeError, match="a base"):
        jax.jit(
            lambda a: m3jax.merge_params(
                None, [a, a], m3jax.Recipe.from_dict({"lines": {"first": 1.0}}), 0
            )
        )({"x": np.ones(3, np.float32)})
