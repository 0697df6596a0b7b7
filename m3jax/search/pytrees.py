"""What the searches do with pytrees: line them up, combine them, find their layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.formats import tree
from m3jax.recipe.values import LAYER

_FIRST = re.compile(r"embed|wte|wpe", re.IGNORECASE)


class Aligned(NamedTuple):
    """Pytrees with the same leaves.

    Attributes:
      leaves: the K leaves of each name.
      rebuild: makes a pytree of the first one's structure of its leaves, in order.
    """

    leaves: Mapping[str, tuple[Any, ...]]
    rebuild: Callable[[Iterable[Any]], Any]


def align(models: Sequence[Any]) -> Aligned:
    """Lines up pytrees by the names of their leaves.

    Raises:
      CheckpointError: there is none, or one lacks a leaf or has another shape.
    """
    if not models:
        raise CheckpointError("0 models were given; 1 or more are needed")
    flat = [tree.flatten(model) for model in models]
    first, rebuild = flat[0]
    for k, (leaves, _) in enumerate(flat):
        for name in {**first, **leaves}:
            if name not in leaves or name not in first:
                lacking, having = (k, 0) if name in first else (0, k)
                raise CheckpointError(
                    f"pytree {lacking} lacks {shown(name)}, which pytree {having} has; "
                    "all need the same leaves"
                )
            own, other = jnp.shape(first[name]), jnp.shape(leaves[name])
            if own != other:
                raise CheckpointError(
                    f"{shown(name)} has the shape {other} in pytree {k} and {own} in "
                    "pytree 0; all need the same shapes"
                )
    return Aligned({n: tuple(f[n] for f, _ in flat) for n in first}, rebuild)


def is_floating(leaf: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(leaf), jnp.floating))


def wide_dtype(leaf: Any) -> Any:
    """The dtype of arithmetic with a leaf: float32, or float64 where it is."""
    return jnp.float64 if jnp.result_type(leaf) == jnp.float64 else jnp.float32


def wide(leaf: Any) -> Any:
    """A leaf as it is computed with: float32, or float64 where it is."""
    dtype = wide_dtype(leaf)
    return jnp.asarray(leaf, dtype)


def alike(arrays: Sequence[Any]) -> list[Any]:
    """Arrays, all as the widest of them is computed with."""
    own = [wide(array) for array in arrays]
    dtype = max((array.dtype for array in own), key=lambda dtype: dtype.itemsize)
    return [array.astype(dtype) for array in own]


def widened(model: Any) -> Any:
    return jax.tree.map(lambda x: wide(x) if is_floating(x) else x, model)


def narrowed(model: Any, like: Any) -> Any:
    """A combination in the dtypes of one of its models."""
    return jax.tree.map(
        lambda x, y: jnp.asarray(x).astype(jnp.result_type(y)), model, like
    )


def weighted_sum(arrays: Sequence[Any], weights: Sequence[float]) -> Any:
    """Σ w_k x_k of arrays of one shape, `wide`; what weighs 0 is not looked at."""
    own = alike(arrays)
    total = jnp.zeros_like(own[0])
    for i, (array, weight) in enumerate(zip(own, weights, strict=True)):
        if weight:
            term = float(weight) * array
            # The first alone, so that -0.0 keeps its sign.
            total = total + term if any(weights[:i]) else term
    return total


def interpolate(a: Any, b: Any, c: float) -> Any:
    """c a + (1 − c) b of pytrees; leaves that are no floats are those of a."""
    return jax.tree.map(
        lambda x, y: weighted_sum((x, y), (c, 1 - c)) if is_floating(x) else x, a, b
    )


def normalized(weights: Any, count: int, what: str) -> list[float]:
    """Weights divided by their sum.

    Raises:
      ValueError: their number is not `count`, or the sum is 0 or not finite.
    """
    row = np.asarray(weights, np.float64)
    if row.shape != (count,):
        raise ValueError(
            f"{what} has the shape {row.shape}; {count} weights are needed"
        )
    total = row.sum()
    if total == 0 or not np.isfinite(total):
        raise ValueError(
            f"{what} = {row.tolist()} cannot be divided by its sum, {total}; "
            "weights that do not add up to 0 are needed"
        )
    return [float(x) for x in row / total]


class Place(NamedTuple):
    """Where a tensor of a block stands: ``before`` + layer + ``after`` is its name."""

    before: str
    layer: int
    after: str


def place_of(name: str) -> Place | None:
    """The block of a tensor, by the first number in its name; None outside blocks."""
    found = LAYER.search(name)
    if found is None:
        return None
    return Place(name[: found.start(1)], int(found[1]), name[found.end(1) :])


def is_embedding(name: str) -> bool:
    """Whether a tensor outside the blocks stands before them, by its name."""
    return bool(_FIRST.search(name))


def num_layers(names: Iterable[str]) -> int:
    places = [place_of(name) for name in names]
    return max((place.layer + 1 for place in places if place is not None), default=0)
