"""Rank rules, Balanced TSV and least squares on task vectors, against NumPy's SVD."""

from __future__ import annotations

from typing import Any

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import thinned

import m3jax
from m3jax.methods import ranks, spectral
from m3jax.recipe import RecipeError

SHAPES = {"wide": (8, 12), "tall": (11, 7), "bias": (5,), "empty": (0, 4)}
Tensors = dict[str, np.ndarray]


def inputs(count: int) -> tuple[Tensors, list[Tensors]]:
    base = checkpoints.random_model(0, SHAPES)
    return base, [
        checkpoints.random_model(k + 1, SHAPES, np.float32, base) for k in range(count)
    ]


def merged(base: Any, models: Any, statistics: Any = None, **fields: Any) -> Tensors:
    recipe = m3jax.Recipe.from_dict({"mixup": {"alpha": None}, **fields})
    beside = {} if statistics is None else {"statistics": statistics}
    return {
        name: np.asarray(leaf, np.float64)
        for name, leaf in m3jax.merge_params(base, models, recipe, 0, **beside).items()
    }


def polar(matrix: np.ndarray) -> np.ndarray:
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    real = values > 1e-6 * values.max()
    return left[:, real] @ right[real]


def kept(values: np.ndarray, rule: str, shape: tuple[int, ...], count: int) -> int:
    """The rules, written out."""
    if rule == "share":
        return len(values) // count
    if rule == "energy":
        return int(np.searchsorted(np.cumsum(values), 0.4 * values.sum())) + 1
    if rule == "participation":
        return int(values.sum() ** 2 / (values**2).sum())
    if rule == "stable":
        return int((values**2).sum() / values[0] ** 2)
    beta = min(shape) / max(shape)
    omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    return max(1, int((values > omega * np.median(values)).sum()))


def tsv(tasks: list[np.ndarray], rule: str) -> np.ndarray:
    parts = []
    for task in tasks:
        left, values, right = np.linalg.svd(task, full_matrices=False)
        r = kept(values, rule, task.shape, len(tasks)) if values[0] > 0 else 0
        parts.append((left[:, :r], values[:r], right[:r]))
    left, values, right = zip(*parts, strict=True)
    u, v = np.concatenate(left, 1), np.concatenate(right).T
    return polar(u) * np.concatenate(values) @ polar(v).T


@pytest.mark.parametrize("rule", ranks.RANKS)
@pytest.mark.parametrize("name", ["wide", "tall"])
def test_rules(rule, name):
    (base, (model,)), shape = inputs(1), SHAPES[name]
    task = model[name].astype(np.float64) - base[name]
    values = np.linalg.svd(task, compute_uv=False)
    known = {"num_models": 3, "shape": shape, "energy": 0.4}
    found = int(ranks.RANKS[rule](jnp.asarray(values, jnp.float32), **known))
    assert max(found, 1) == kept(values, rule, shape, 3)


@pytest.mark.parametrize("rule", thinned(ranks.RANKS, {"energy"}.__contains__))
def test_tsv_m_keeps_as_many_triples_as_its_rule_says(rule):
    base, models = inputs(3)
    models[2]["tall"] = base["tall"]  # a task with nothing to say
    found = merged(base, models, method="tsv_m", tsv_m={"rank": rule})
    for name, own in found.items():
        tasks = [m[name].astype(np.float64) - base[name] for m in models]
        wanted = np.mean(tasks, 0) if own.ndim == 1 else own * 0
        if own.ndim == 2 and own.size:
            wanted = tsv(tasks, rule)
        np.testing.assert_allclose(own - base[name], wanted, atol=3e-6, err_msg=name)


def test_a_rule_of_ones_own_is_a_function():
    base, models = inputs(2)
    with pytest.raises(RecipeError, match=r"tsv_m\.rank='two'"):
        m3jax.Recipe(method=m3jax.TsvM(rank="two"))
    ranks.RANKS["two"] = lambda values, **known: jnp.float32(2.9)
    try:
        found = merged(base, models[:1], method="tsv_m", tsv_m={"rank": "two"})
    finally:
        del ranks.RANKS["two"]
    for name in ("wide", "tall"):
        assert np.linalg.matrix_rank(found[name] - base[name], tol=1e-4) == 2


def test_balanced_tsv_is_tsv_m_of_task_vectors_that_weigh_alike():
    base, models = inputs(3)
    models[1] = {n: base[n] + 5 * (models[1][n] - base[n]) for n in base}
    models[2]["tall"] = base["tall"]
    models[0]["wide"][0, 0] += 1  # an outlier
    found = merged(base, models, method="balanced_tsv")
    for name in ("wide", "tall"):
        tasks = [m[name].astype(np.float64) - base[name] for m in models]
        sizes = []
        for task in tasks:
            inside = np.abs(task) <= 3 * np.sqrt((task**2).mean())
            sizes.append(np.sqrt((task[inside] ** 2).mean()))
        average = sum(sizes) / sum(size > 0 for size in sizes)
        own = [
            task * average / size if size else task
            for task, size in zip(tasks, sizes, strict=True)
        ]
        wanted = tsv(own, "participation")
        np.testing.assert_allclose(found[name] - base[name], wanted, atol=1e-5)
    alike = merged(base, [base, base], method="balanced_tsv")
    for name, own in alike.items():
        np.testing.assert_array_equal(own, base[name])


@pytest.mark.parametrize("method", ["wudi_closed_form", "actmerge", "lot"])
def test_least_squares_on_task_vectors(method):
    base, models = inputs(3)
    models[2]["wide"] = base["wide"]
    rng = np.random.default_rng(0)
    grams = [
        {
            name: (x.T @ x / len(x)).astype(np.float32)
            for name in ("wide", "tall")
            for x in [rng.normal(size=(40, SHAPES[name][1]))]
        }
        for _ in models
    ]
    given = grams if method == "lot" else None
    found = merged(base, models, given, method=method)
    for name, own in found.items():
        tasks = [m[name].astype(np.float64) - base[name] for m in models]
        wanted = np.mean(tasks, 0) if own.ndim == 1 else own * 0
        if own.ndim == 2 and own.size:
            g = [t.T @ t for t in tasks]
            if method == "wudi_closed_form":
                g = [x / max(np.trace(x), 1e-30) for x in g]
            if method == "lot":
                g = [k[name].astype(np.float64) for k in grams]
            above = sum(t @ x for t, x in zip(tasks, g, strict=True))
            wanted = above @ np.linalg.pinv(sum(g), rcond=1e-10, hermitian=True)
        np.testing.assert_allclose(own - base[name], wanted, atol=2e-4, err_msg=name)
    nothing = merged(base, [base, base, base], given, method=method)
    for name, own in nothing.items():
        np.testing.assert_array_equal(own, base[name])


def test_triples_by_a_gram_matrix_are_those_of_the_matrix():
    """As exact as float32 holds them, down to the last singular value that counts."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, 20)))[0] for n in (40, 20))
    exact = np.append(10.0 ** -np.linspace(0, 4, 18), [1e-9, 0])
    tall = ((u * exact) @ v.T).astype(np.float32)
    with jax.enable_x64(True):
        for matrix, own in ((tall, u), (tall.T, v)):
            left, values, right = map(np.asarray, jax.jit(spectral.svd)(matrix))
            assert {a.dtype for a in (left, values, right)} == {np.dtype(np.float32)}
            true = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
            np.testing.assert_allclose(values[:18], true[:18], rtol=2e-7)
            assert not left[:, 18:].any()
            assert not right[18:].any()
            for side in (left.T[:18], right[:18]):
                np.testing.assert_allclose(side @ side.T, np.eye(18), atol=5e-7)
            np.testing.assert_allclose((left * values) @ right, matrix, atol=1e-7)
            overlap = np.abs(left[:, 17] @ own[:, 17])  # the smallest that counts
            np.testing.assert_allclose(overlap, 1, atol=1e-3)
        for own in jax.jit(spectral.svd)(np.zeros((5, 3), np.float32)):
            assert not np.any(own)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_polar_products_of_tasks_that_share_directions(count):
    """Some alike to the bit, some nearly, some not; some that are 0."""
    rng = np.random.default_rng(count)
    common = rng.normal(size=(30, 12))
    triples = []
    for k in range(count):
        sides = []
        for rows in (30, 16):
            own = rng.normal(size=(rows, 5))
            own[:, :2] = common[:rows, :2]
            own[:, 2] = common[:rows, 2] + 1e-2 * k * common[:rows, 3]
            basis = np.linalg.qr(own)[0]
            basis[:, 4] = 0
            sides.append(basis.astype(np.float32))
        values = np.array([5, 4, 3, 2 + k, 0], np.float32)
        triples.append((sides[0], values, sides[1].T))
    with jax.enable_x64(True):
        found = jax.jit(spectral.polar_product)(triples)
    left, values, right = (
        np.concatenate([t[i].astype(np.float64) for t in triples], axis)
        for i, axis in ((0, 1), (1, 0), (2, 0))
    )
    wanted = polar(left) * values @ polar(right.T).T
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    plain = jax.jit(spectral.polar_product)(triples)  # LAPACK's
    np.testing.assert_allclose(plain, wanted, atol=2e-4)
