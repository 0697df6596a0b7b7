"""Gradient descent on the coefficients of a merge."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Learned(NamedTuple):
    """What a learner found.

    Attributes:
      params: the merged params.
      coefficients: the raw ones, before bounds, softmax or sigmoid.
      losses: (steps,), each before its step.
      history: the raw coefficients of steps 0 to T, stacked on a leading axis.
    """

    params: Any
    coefficients: Any
    losses: jax.Array
    history: Any


def descend(
    merge: Callable[[Any, Any], Any],
    loss: Callable[[Any, Any, Any], jax.Array],
    start: Any,
    batches: Iterable[Any],
    tx: Any,
    arrays: Any,
) -> Learned:
    """One step of an optimiser for each batch.

    Args:
      merge: (coefficients, arrays) -> params.
      loss: (params, batch, coefficients) -> scalar.
      start: the coefficients of step 0.
      batches: pytrees of arrays; those of another shape cost a compilation.
      tx: an optax.GradientTransformation.
      arrays: of the models; given, not closed over, as they would otherwise be
        constants of the compiled program.
    """
    import optax

    @jax.jit
    def step(coefficients: Any, state: Any, batch: Any, arrays: Any) -> Any:
        value, gradient = jax.value_and_grad(
            lambda own: loss(merge(own, arrays), batch, own)
        )(coefficients)
        with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes
            updates, state = tx.update(gradient, state, coefficients)
            moved = optax.apply_updates(coefficients, updates)
        return moved, state, value

    coefficients, state = start, tx.init(start)
    history, losses = [start], []
    for batch in batches:
        coefficients, state, value = step(coefficients, state, batch, arrays)
        history.append(coefficients)
        losses.append(value)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *history)
    found = jnp.stack(losses) if losses else jnp.zeros(0, jnp.float32)
    return Learned(jax.jit(merge)(coefficients, arrays), coefficients, found, stacked)
