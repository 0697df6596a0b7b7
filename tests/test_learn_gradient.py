"""Gradients in coefficients are those of the whole merge, by any space, any method."""

from __future__ import annotations

import dataclasses
from typing import Any

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import thinned

import m3jax
from m3jax.checkpoints.formats import tree
from m3jax.engine.sharding_rules import over_devices
from m3jax.learn.coefficients.constraints import CONSTRAINTS
from m3jax.learn.coefficients.space import GRANULARITIES, Space
from m3jax.learn.gradient import tensors as stores
from m3jax.learn.gradient.pullback import Merge
from m3jax.methods import METHODS

SHAPES = {
    "model.layers.0.up.weight": (6, 10),
    "model.layers.0.up.bias": (6,),
    "model.layers.1.up.weight": (6, 10),
    "model.norm.weight": (6,),
    "scale": (),
}
CASES = {
    "average": m3jax.Recipe(),
    "linear": m3jax.Recipe(method="linear"),
    "task_arithmetic": m3jax.Recipe(method="task_arithmetic", scaling=1.5),
    "dare": m3jax.Recipe(method="task_arithmetic", dare=m3jax.Dare(drop_rate=0.4)),
    "ties": m3jax.Recipe(method="ties", trim_rate=0.4),
    "ties_dare": m3jax.Recipe(method="ties", dare=m3jax.Dare(drop_rate=0.3)),
    "elect": m3jax.Recipe(
        method="task_arithmetic", transforms=(m3jax.Elect(density=0.6),)
    ),
    "slerp": m3jax.Recipe(method="slerp"),
}
WEIGHTS = (0.3, 0.8)


def models() -> tuple[Any, list[Any]]:
    base = checkpoints.random_model(0, SHAPES)
    return base, [checkpoints.random_model(k, SHAPES, np.float32, base) for k in (1, 2)]


def oracle(case: str, name: str, c: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """∂/∂c of Σ weight · m(c), by central differences in float64 of the formula."""
    base, (a, b) = models()
    x0 = base[name].astype(np.float64)
    x = np.stack([a[name], b[name]]).astype(np.float64)
    full = np.broadcast_to(c, x.shape).astype(np.float64)

    def merged(c: np.ndarray) -> np.ndarray:
        tau = masked(case, name) - x0 if case not in PLAIN else x - x0
        if case == "average":
            return (c * x).sum(0)
        if case == "linear":
            return (c * x).sum(0) / c.sum(0)
        if case == "slerp":
            cosine = np.vdot(x[0], x[1]) / np.sqrt(np.vdot(x[0], x[0]))
            cosine /= np.sqrt(np.vdot(x[1], x[1]))
            t = c[1] / (c[0] + c[1])
            if abs(cosine) > 0.9995:
                return (1 - t) * x[0] + t * x[1]
            angle = np.arccos(cosine)
            left, right = np.sin((1 - t) * angle), np.sin(t * angle)
            return (left * x[0] + right * x[1]) / np.sin(angle)
        if case.startswith("ties"):
            kept = tau != 0
            share = (c * kept).sum(0)
            above = (c * tau).sum(0)
            return x0 + np.where(share > 0, above / np.where(share > 0, share, 1), 0)
        return x0 + (1.5 if case == "task_arithmetic" else 1.0) * (c * tau).sum(0)

    found = np.zeros(x.shape)
    for k in range(2):
        step = np.zeros(x.shape)
        step[k] = 1e-5  # every element's coefficient is its own: all at once
        found[k] = weight * (merged(full + step) - merged(full - step)) / 2e-5
    axes = tuple(i for i, n in enumerate(c.shape) if n == 1 and x.shape[i] != 1)
    return found.sum(axis=axes, keepdims=True) if axes else found


PLAIN = ("average", "linear", "task_arithmetic", "slerp")


def masked(case: str, name: str) -> np.ndarray:
    """(2, ...) θ0 + what DARE and TIES's trimming and election leave of each τ_k.

    Asked of the merge itself, with the weight on one model: masks are others' tests.
    """
    base, both = models()
    recipe = CASES[case]
    transforms = recipe.transforms
    alone = []
    for k in range(2):
        one = tuple(float(i == k) for i in range(2))
        own = m3jax.Recipe(
            method="task_arithmetic",
            transforms=transforms,
            mixup=m3jax.Mixup(ratios=one),
        )
        alone.append(np.asarray(m3jax.merge_params(base, both, own, 7)[name]))
    found = np.stack(alone).astype(np.float64)
    if case.startswith("ties"):
        x0 = base[name].astype(np.float64)
        every = {
            own: np.stack(
                [
                    np.asarray(
                        m3jax.merge_params(
                            base,
                            both,
                            m3jax.Recipe(
                                method="task_arithmetic",
                                transforms=transforms,
                                mixup=m3jax.Mixup(
                                    ratios=tuple(float(i == k) for i in range(2))
                                ),
                            ),
                            7,
                        )[own]
                    )
                    - base[own]
                    for k in range(2)
                ]
            ).reshape(2, -1)
            for own in SHAPES
        }
        flat = np.abs(np.concatenate(list(every.values()), axis=1))
        rank = int(flat.shape[1] * recipe.method.trim_rate)
        least = np.sort(flat, axis=1)[:, rank - 1]
        tau = (found - x0).astype(np.float32)
        behind = (2, *(1,) * (tau.ndim - 1))
        kept = np.where(np.abs(tau) >= least.reshape(behind), tau, 0)
        sign = np.sign(kept.sum(0))
        assert np.all((sign != 0) | ~np.any(kept, axis=0))
        found = x0 + np.where(kept * sign > 0, tau, 0)
    return found


# What precedes TIES is in `elect`, and DARE in `dare`.
@pytest.mark.parametrize("case", thinned(CASES, lambda case: case != "ties_dare"))
def test_pull_back_is_the_gradient_of_the_formula(case: str):
    """For every space, to 1e-6 of the gradient's own size."""
    base, both = models()
    tensors = stores.of_trees(base, both, CASES[case])
    merge = Merge(tensors, CASES[case], 7)
    generator = np.random.default_rng(3)
    weight = {
        name: generator.normal(size=shape).astype(np.float32)
        for name, shape in SHAPES.items()
    }
    for granularity in GRANULARITIES:
        space = Space(granularity=granularity, initial=WEIGHTS)
        raw = space.start(SHAPES, (0.5, 0.5))
        coefficients = space.coefficients(raw, SHAPES, (0.5, 0.5))
        found = merge.pull_back(coefficients, weight)
        for name, own in coefficients.items():
            expected = oracle(case, name, np.asarray(own), weight[name])
            # Sums of terms that cancel: against the size of what was added up.
            size = max(np.abs(expected).max(initial=0), 1.0) * (
                1 if granularity == "element" else np.sqrt(np.prod(SHAPES[name]))
            )
            np.testing.assert_allclose(
                found[name], expected, rtol=0, atol=1e-6 * max(size, 1), err_msg=name
            )


def test_every_differentiable_method_is_tested():
    assert {CASES[case].method.name for case in CASES} == {
        name for name, own in METHODS.items() if own.differentiable
    }


@pytest.mark.parametrize(
    "constraint",
    thinned(
        ["clip", "sigmoid", "tanh", "simplex", "share"],
        {"sigmoid", "share"}.__contains__,
    ),
)
def test_raw_gradients_are_those_of_jax_through_the_whole_merge(constraint: str):
    """The chain of constraint and pull-back, by jax.grad of all of it at once."""
    base, both = (jax.tree.map(jnp.asarray, own) for own in models())
    recipe = CASES["task_arithmetic"]
    tensors = stores.of_trees(base, both, recipe)
    merge, equal = Merge(tensors, recipe, 0), (0.5, 0.5)

    def loss(merged: Any) -> jax.Array:
        return sum(jnp.sum(jnp.sin(own)) for own in merged.values())

    for granularity in ("model", "column"):
        space = Space(
            granularity=granularity,
            constraint=constraint,
            bounds=(-0.5, 1.5),
            initial=(0.3, 0.7),
        )
        raw = space.start(SHAPES, equal)

        def whole(raw: Any, space: Space = space) -> jax.Array:
            c = space.coefficients(raw, SHAPES, equal)
            return loss(
                {
                    n: base[n]
                    + 1.5 * sum(c[n][k] * (both[k][n] - base[n]) for k in range(2))
                    for n in SHAPES
                }
            )

        coefficients, back = jax.vjp(
            lambda r, s=space: s.coefficients(r, SHAPES, equal), raw
        )
        gradient = jax.grad(loss)(merge(coefficients))
        (found,) = back(merge.pull_back(coefficients, gradient))
        with jax.numpy_rank_promotion("allow"):
            expected = jax.grad(whole)(raw)
        for group, own in expected.items():
            scale = float(jnp.max(jnp.abs(own))) + 1
            np.testing.assert_allclose(found[group], own, rtol=0, atol=2e-6 * scale)
        rows = 1 if constraint == "share" else 2
        assert all(len(own) == rows for own in raw.values())


@pytest.mark.parametrize("name", [n for n, own in CONSTRAINTS.items() if own.bounded])
def test_a_constraint_keeps_coefficients_within_its_bounds(name: str):
    own, (low, high) = CONSTRAINTS[name], (-0.5, 1.5)
    raw = jnp.linspace(-20, 20, 81, dtype=jnp.float32)[None]
    made = np.asarray(own.apply(raw, low, high))
    assert (made.min(), made.max()) == (low, high)
    inside = np.linspace(low + 0.1, high - 0.1, 9)[None]
    raw = jnp.asarray(own.invert(inside, low, high), jnp.float32)
    np.testing.assert_allclose(own.apply(raw, low, high), inside, atol=1e-6)


@pytest.mark.parametrize("case", ["task_arithmetic", "ties_dare", "slerp"])
def test_files_and_memory_pull_back_alike(case: str, tmp_path: Any):
    """To the bit: from files, from memory, and from arrays split over devices."""
    base, both = models()
    paths = [
        str(checkpoints.write(tmp_path / name, own))
        for name, own in (("base", base), ("a", both[0]), ("b", both[1]))
    ]
    recipe, space = CASES[case], Space(granularity="element", initial=WEIGHTS)
    raw = space.start(SHAPES, (0.5, 0.5))
    coefficients = space.coefficients(raw, SHAPES, (0.5, 0.5))
    weight = {name: np.full(shape, 0.7, np.float32) for name, shape in SHAPES.items()}
    own = Merge(stores.of_trees(base, both, recipe), recipe, 7)
    expected = own(coefficients), own.pull_back(coefficients, weight)
    for place in (None, over_devices({"rows": 2, "columns": 2})):
        with stores.of_files(paths[0], paths[1:], recipe, place) as tensors:
            merge = Merge(tensors, recipe, 7)
            found = merge(coefficients), merge.pull_back(coefficients, weight)
            named = tree.flatten(tensors.params(found[0], tensors.fixed))[0]
            assert set(named) == set(SHAPES)
        for a, b in zip(found, expected, strict=True):
            for name in SHAPES:
                np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]))


@pytest.mark.parametrize("case", CASES)
def test_the_merge_that_is_learned_is_the_one_that_is_merged(case: str):
    base, both = models()
    recipe = CASES[case]
    merge = Merge(stores.of_trees(base, both, recipe), recipe, 7)
    space = Space(granularity="model", initial=WEIGHTS)
    raw = space.start(SHAPES, (0.5, 0.5))
    found = merge(space.coefficients(raw, SHAPES, (0.5, 0.5)))
    own = recipe.with_number(recipe.method.name, "weights", WEIGHTS)
    own = dataclasses.replace(own, mixup=m3jax.Mixup(alpha=None))
    merged = m3jax.merge_params(base, both, own, 7)
    for name in SHAPES:
        np.testing.assert_allclose(found[name], merged[name], rtol=0, atol=3e-7)
