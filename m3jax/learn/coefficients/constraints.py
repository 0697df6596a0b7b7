"""Maps from what an optimiser moves to coefficients that stay where they must.

A raw array is (K, ...), or (1, ...) where the models share, or (K − 1, ...) for
``share``; coefficients are (K, ...).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.learn.entropy import bounded


class Constraint(NamedTuple):
    """One way to keep coefficients in place.

    Attributes:
      apply: (raw, low, high) -> coefficients.
      invert: (coefficients, low, high) -> raw; on the host, float64.
      over_models: it couples the K coefficients, which then cannot be shared.
      bounded: low and high count.
    """

    apply: Callable[[Any, float, float], Any]
    invert: Callable[[Any, float, float], Any]
    over_models: bool = False
    bounded: bool = False


def _with_zero(raw: jax.Array) -> jax.Array:
    return jnp.concatenate([raw, jnp.zeros_like(raw[:1])])


def _center(values: np.ndarray) -> np.ndarray:
    logs = np.log(values)
    return logs - logs.mean(axis=0)


CONSTRAINTS = {
    # c = r.
    "none": Constraint(lambda r, low, high: r, lambda c, low, high: c),
    # c = r between the bounds; outside them the gradient is 0 (at them 1).
    "clip": Constraint(bounded, lambda c, low, high: c, bounded=True),
    # c = low + (high − low) σ(r).
    "sigmoid": Constraint(
        lambda r, low, high: low + (high - low) * jax.nn.sigmoid(r),
        lambda c, low, high: np.log(c - low) - np.log(high - c),
        bounded=True,
    ),
    # c = (high + low)/2 + (high − low)/2 · tanh(r).
    "tanh": Constraint(
        lambda r, low, high: (high + low) / 2 + (high - low) / 2 * jnp.tanh(r),
        lambda c, low, high: np.arctanh((2 * c - high - low) / (high - low)),
        bounded=True,
    ),
    # c = softmax over the models of K raw numbers.
    "simplex": Constraint(
        lambda r, low, high: jax.nn.softmax(r, axis=0),
        lambda c, low, high: _center(c),
        over_models=True,
    ),
    # The same, of which the last one is 0: for two models c_0 = σ(r).
    "share": Constraint(
        lambda r, low, high: jax.nn.softmax(_with_zero(r), axis=0),
        lambda c, low, high: np.log(c[:-1]) - np.log(c[-1:]),
        over_models=True,
    ),
}
