"""K pytrees of params, as one stack for each leaf."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from m3jax.checkpoints.errors import CheckpointError, few, shown
from m3jax.checkpoints.formats import tree


class Stack(NamedTuple):
    """Leaves of K params by name.

    Attributes:
      first: the leaves of the first params. Those that are no floats stay as they are.
      arrays: (K, ...) of each leaf of floats, float32, or float64 where it is.
      structure: makes a pytree of leaves in the order of `first`.
    """

    first: Mapping[str, Any]
    arrays: dict[str, jax.Array]
    structure: Callable[[Iterable[Any]], Any]

    def filled(self, leaf: Callable[[Any], Any]) -> Any:
        """The pytree of what a function makes of each leaf of the first params."""
        return self.structure([leaf(own) for own in self.first.values()])

    def params(self, merged: Mapping[str, jax.Array]) -> Any:
        """The pytree with those leaves of floats, in the dtypes of the first params."""
        return self.structure(
            [
                merged[name].astype(own.dtype) if name in merged else own
                for name, own in self.first.items()
            ]
        )


def stack(params: Sequence[Any], names: Sequence[str]) -> Stack:
    """Lines up params by the names of their leaves.

    Args:
      params: K pytrees with the same leaves.
      names: of each, for errors.

    Raises:
      CheckpointError: leaves are missing, extra or of another shape.
    """
    first, structure = tree.flatten(params[0])
    trees = [first, *(tree.flatten(own)[0] for own in params[1:])]
    problems = []
    for who, own in zip(names, trees, strict=True):
        problems += [
            f"{names[0]} has {shown(n)}, {who} not" for n in first.keys() - own
        ]
        problems += [
            f"{who} has {shown(n)}, {names[0]} not" for n in own.keys() - first
        ]
        problems += [
            f"{shown(name)} is {jnp.shape(leaf)} in {names[0]} and "
            f"{jnp.shape(own[name])} in {who}"
            for name, leaf in first.items()
            if name in own and jnp.shape(own[name]) != jnp.shape(leaf)
        ]
    if problems:
        raise CheckpointError(
            f"the pytrees need the same leaves of the same shapes: {few(problems)}"
        )
    arrays = {
        name: jnp.stack([jnp.asarray(own[name], wide(leaf)) for own in trees])
        for name, leaf in first.items()
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    return Stack(first, arrays, structure)


def model_names(models: Sequence[Any]) -> list[str]:
    """What errors call the models.

    Raises:
      ValueError: there are none.
    """
    if not models:
        raise ValueError("models=[] needs one model or more")
    return [f"models[{k}]" for k in range(len(models))]


def wide(leaf: Any) -> Any:
    """The dtype of arithmetic with a leaf: float32, or float64 where it is."""
    return jnp.float64 if leaf.dtype == jnp.float64 else jnp.float32


def weighted_sum(coefficients: jax.Array, arrays: jax.Array) -> jax.Array:
    """Σ_k c_k x_k of coefficients (K,) and arrays (K, ...)."""
    own = coefficients.astype(arrays.dtype)
    return jnp.sum(own.reshape(-1, *(1,) * (arrays.ndim - 1)) * arrays, axis=0)
