"""The mathematics of merging: contracts of every method, and the corners of each."""

from __future__ import annotations

import itertools
from typing import Any

import checkpoints
import functions
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from m3jax.methods import METHODS as ALL
from m3jax.methods import dare
from m3jax.methods.step import Method, Operands

METHODS = ("average", "task_arithmetic", "ties")  # those that the oracle knows

RATIOS = {1: (1.0,), 2: (0.7, 0.3), 3: (0.2, 0.5, 0.3), 5: (0.1, 0.2, 0.3, 0.25, 0.15)}
BASE = checkpoints.random_model(0)
MODELS = [checkpoints.random_model(i, base=BASE) for i in range(1, 6)]
NO_INFO = {"thresholds": np.zeros(2, np.float32), "majority": np.float32(0)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_models", RATIOS)
def test_equal_models_give_that_model(method: str, num_models: int):
    models = MODELS[:1] * num_models
    ratios = RATIOS[num_models]
    merged = functions.merge(BASE, models, method=method, ratios=ratios, trim_rate=0)
    assert_close(merged, MODELS[0])
    plain = functions.merge(
        BASE,
        models,
        method=method,
        scaling=1 / num_models if method == "task_arithmetic" else 1,
        trim_rate=0,
    )
    assert_close(plain, MODELS[0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_models", RATIOS)
@pytest.mark.parametrize("m3", [False, True])
def test_equals_the_reference(method: str, num_models: int, m3: bool):
    """On scalars, an empty tensor and several axes."""
    models = MODELS[:num_models]
    for scaling, trim_rate in ((1.0, 0.5), (0.6, 0.8), (1.0, 0.0), (1.0, 1.0)):
        settings = {
            "method": method,
            "ratios": RATIOS[num_models] if m3 else None,
            "scaling": scaling,
            "trim_rate": trim_rate,
        }
        merged = functions.merge(BASE, models, **settings)
        expected = reference.merge(BASE, models, **settings)
        assert_close(merged, expected)
        for name, tensor in merged.items():
            assert (tensor.dtype, tensor.shape) == (np.float32, BASE[name].shape)


@pytest.mark.parametrize("method", METHODS)
def test_parts_give_the_parts(method: str):
    """A rule is elementwise: no element's result depends on its neighbours."""
    base, stack = jnp.asarray(flat(BASE)), jnp.stack([flat(m) for m in MODELS[:2]])
    step, numbers = step_of(method)
    info = functions.found(step, base, stack, numbers)
    whole = functions.apply(step, base, stack, numbers, info)
    for start, stop in itertools.pairwise([0, 1, 8, 1025, 5000, base.size]):
        part = slice(start, stop)
        merged = functions.apply(step, base[part], stack[:, part], numbers, info)
        np.testing.assert_array_equal(merged, whole[part])


@pytest.mark.parametrize("method", METHODS)
def test_coefficients_may_vary(method: str):
    """By column and by element as well as by model."""
    base = jnp.asarray(BASE["lm_head.weight"])
    stack = jnp.asarray(np.stack([m["lm_head.weight"] for m in MODELS[:2]]))
    step, numbers = step_of(method)
    info = functions.found(step, base, stack, numbers)
    shares = np.random.default_rng(0).random(base.shape[1:]).astype(np.float32)
    by_column = jnp.asarray(np.stack([shares, 1 - shares])[:, None])
    merged = apply(step, base, stack, by_column, info)
    by_element = jnp.broadcast_to(by_column, stack.shape)
    again = apply(step, base, stack, by_element, info)
    np.testing.assert_array_equal(again, merged)
    for column in (0, 13, 28):
        own = slice(column, column + 1)
        one = apply(step, base[:, own], stack[:, :, own], by_column[:, :, own], info)
        np.testing.assert_array_equal(merged[:, own], one)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_in_the_coefficients(method: str):
    base, stack = jnp.asarray(flat(BASE)), jnp.stack([flat(m) for m in MODELS[:2]])
    step, numbers = step_of(method)
    info = functions.found(step, base, stack, numbers)

    def loss(coefficients: jax.Array) -> jax.Array:
        merged = apply(step, base, stack, coefficients[:, None], info)
        return jnp.sum((merged - base) ** 2)

    at = jnp.asarray([0.7, 0.3], jnp.float32)
    gradient = jax.grad(loss)(at)
    change = jnp.asarray([0.02, 0.0], jnp.float32)
    slope = (loss(at + change) - loss(at - change)) / (2 * change[0])
    assert gradient[0] == pytest.approx(float(slope), rel=2e-3)
    assert abs(float(slope)) > 1e-3


def test_ties_keeps_a_sole_survivor_whole():
    base = np.zeros(4, np.float32)
    stack = np.float32([[1, 0, 3, -2], [0, -5, -1, -4]])
    for ratios in ((0.5, 0.5), (1.0, 0.0), (0.0, 1.0), (1e-30, 1.0)):
        merged = ties(base, stack, ratios)
        assert merged[:3].tolist() == [1, -5, 3]  # the sign of 3 − 1 is the first's
    assert ties(base, stack, (0.25, 0.75))[3] == -3.5
    assert ties(base, stack, (0.0, 1.0))[3] == -4


def test_ties_without_survivors_is_the_base():
    base = np.float32([7, 7])
    assert ties(base, np.float32([[7, 7], [7, 7]]), (0.5, 0.5)).tolist() == [7, 7]


@pytest.mark.parametrize(
    ("values", "expected"),
    [  # two entries whose signs sum to 0, and entries that decide for the model
        ([[2, 1, 1], [-2, 1, 1]], [2, 1, 1]),
        ([[2, -1, -1], [-2, -1, -1]], [-2, -1, -1]),
        ([[2, -1, 1], [-2, -1, 1]], [0, -1, 1]),  # no majority: no survivor
    ],
)
def test_ties_elects_the_models_majority_where_an_entry_has_none(values, expected):
    merged = functions.merge(
        {"a": np.zeros(3, np.float32)},
        [{"a": np.float32(row)} for row in values],
        method="ties",
        trim_rate=0,
    )
    assert merged["a"].tolist() == expected


def test_ties_keeps_all_entries_equal_to_the_threshold():
    """n − k + 1 entries survive if magnitudes differ; of equal ones all survive."""
    base = {"a": np.zeros(8, np.float32)}
    model = {"a": np.float32([1, -1, 1, -1, 5, 6, 7, 8])}
    merged = functions.merge(base, [model], method="ties", trim_rate=0.5)
    np.testing.assert_array_equal(merged["a"], model["a"])
    distinct = {"a": np.float32([1, -2, 3, -4, 5, 6, 7, 8])}
    merged = functions.merge(base, [distinct], method="ties", trim_rate=0.5)
    assert merged["a"].tolist() == [0, 0, 0, -4, 5, 6, 7, 8]
    # The share is of the whole model, not of each tensor.
    split = {"a": distinct["a"][:4], "b": distinct["a"][4:]}
    zeros = {name: np.zeros_like(tensor) for name, tensor in split.items()}
    merged = functions.merge(zeros, [split], method="ties", trim_rate=0.5)
    assert merged["a"].tolist() == [0, 0, 0, -4]
    assert merged["b"].tolist() == [5, 6, 7, 8]


@pytest.mark.parametrize("target", ["delta", "weights"])
@pytest.mark.parametrize("rescale", [True, False])
def test_dare_with_masks(target: str, rescale: bool):
    rates = (0.25, 1.0)
    masks = [
        {name: tensor * 1e4 % 1 < rate for name, tensor in model.items()}
        for rate, model in zip(rates, MODELS, strict=False)
    ]
    dropped = functions.drop(
        BASE, MODELS[:2], rates=rates, rescale=rescale, target=target, masks=masks
    )
    for rate, mask, model, result in zip(rates, masks, MODELS, dropped, strict=False):
        factor = 1 / (1 - rate) if rescale and rate < 1 else 1
        for name in model:
            origin = BASE[name] if target == "delta" else np.zeros_like(BASE[name])
            expected = origin + (model[name] - origin) * factor * ~mask[name]
            np.testing.assert_allclose(result[name], expected, rtol=0, atol=1e-7)
            if rate == 1:  # drops everything, and does not divide by 0
                np.testing.assert_array_equal(result[name], origin)


@pytest.mark.parametrize("target", ["delta", "weights"])
def test_dare_by_magnitude(target: str):
    rates = (0.0, 0.37, 1.0)
    dropped = functions.drop(
        BASE, MODELS[:3], rates=rates, rescale=False, target=target
    )
    for rate, model, result in zip(rates, MODELS, dropped, strict=False):
        for name, tensor in model.items():
            origin = BASE[name] if target == "delta" else np.zeros_like(BASE[name])
            delta = tensor - origin
            count = int(delta.size * rate)  # per tensor, rounded down
            kept = delta.copy().reshape(-1)
            kept[np.argsort(np.abs(kept), kind="stable")[:count]] = 0
            expected = origin + kept.reshape(delta.shape)
            np.testing.assert_allclose(result[name], expected, rtol=0, atol=1e-8)


def test_dare_of_weights_needs_no_base():
    model = {"a": np.float32([1, 2, 3, 4])}
    mask = {"a": np.array([True, False, False, True])}
    (result,) = functions.drop(
        None, [model], rates=(0.5,), target="weights", masks=[mask]
    )
    assert result["a"].tolist() == [0, 4, 6, 0]


def test_dare_rescales_by_the_rounded_rate():
    step = dare.Dare(drop_rate=None)
    rates = np.array([[0.2], [0.0], [1.0], [1e-9]])
    info = step.derive({"drop_rate": rates}, {}, np)
    assert info["threshold"][:, 0].tolist() == [13107, 0, 65536, 0]
    assert info["scale"][:, 0].tolist() == [65536 / (65536 - 13107), 1, 1, 1]
    kept = dare.Dare(drop_rate=None, rescale=False)
    assert kept.derive({"drop_rate": rates}, {}, np)["scale"].tolist() == [[1]] * 4


def ties(base: np.ndarray, stack: np.ndarray, ratios: tuple[float, ...]) -> np.ndarray:
    step, numbers = step_of("ties", weights=ratios)
    merged = functions.apply(
        step, jnp.asarray(base), jnp.asarray(stack), numbers, NO_INFO
    )
    return np.asarray(merged)


def step_of(
    method: str, weights: tuple[float, ...] = (0.7, 0.3)
) -> tuple[Method, dict[str, np.ndarray]]:
    """A method with its defaults but a scaling of 0.9 (TIES: 1), and its numbers."""
    step = ALL[method]()
    scaling = 1.0 if weights != (0.7, 0.3) else 0.9
    numbers = {"weights": np.array(weights), "scaling": scaling, "trim_rate": 0.5}
    return step, {k: np.asarray(v) for k, v in numbers.items() if k in step.fields()}


def apply(step: Method, base: Any, stack: Any, weights: Any, info: Any) -> jax.Array:
    """The method with coefficients that are arrays, and a scaling of 0.9."""
    behind = (1,) * base.ndim
    p = {"weights": weights, "scaling": jnp.full(behind, 0.9, jnp.float32)}
    own = {
        name: jnp.asarray(value, jnp.float32).reshape(*np.shape(value), *behind)
        for name, value in info.items()
    }
    return step.static.apply(Operands(base, stack), p, own)


def flat(tensors: checkpoints.Tensors) -> np.ndarray:
    return np.concatenate([tensor.ravel() for tensor in tensors.values()])


def assert_close(merged: checkpoints.Tensors, expected: checkpoints.Tensors) -> None:
    assert set(merged) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_allclose(
            merged[name], tensor, rtol=0, atol=2e-8, err_msg=name
        )
