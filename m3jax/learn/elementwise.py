"""NP Merge: a learned share for every parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from m3jax.checkpoints.formats import tree
from m3jax.learn.descent import Learned, descend
from m3jax.learn.pytrees import stack


def np_merge(
    a: Any,
    b: Any,
    loss_fn: Callable[[Any, Any], jax.Array],
    batches: Iterable[Any],
    *,
    tx: Any = None,
) -> Learned:
    """Learns s of σ(s) ⊙ A + (1 − σ(s)) ⊙ B, one s per parameter, starting at 0.

    ∂L/∂s = ∇L ⊙ (A − B) ⊙ σ(s)(1 − σ(s)), so a parameter in which the models agree does
    not move. For models of unlike units align B to A first; for several models merge
    successive pairs.

    Ours, from the abstract of arXiv 2412.15467: there is no public code, and its
    initial value, steps and rates are not known.

    Args:
      a, b: pytrees with the same leaves; the result has the dtypes of `a`.
      loss_fn: (params, batch) -> scalar.
      batches: one element a step.
      tx: an optax transformation; Adam at 0.01 by default (ours).

    Returns:
      The result; `coefficients` is s, a pytree like `a`, float32.

    Raises:
      CheckpointError: the pytrees do not fit each other.
    """
    import optax

    own = stack([a, b], ["a", "b"])

    def params(raw: Any, arrays: Any) -> Any:
        named = tree.flatten(raw)[0]
        merged = {}
        for name, (first, second) in arrays.items():
            share = jax.nn.sigmoid(named[name]).astype(first.dtype)
            merged[name] = second + share * (first - second)
        return own.params(merged)

    start = own.filled(lambda leaf: jnp.zeros(jnp.shape(leaf), jnp.float32))
    tx = optax.adam(0.01) if tx is None else tx
    return descend(
        params,
        lambda own, batch, raw: loss_fn(own, batch),
        start,
        batches,
        tx,
        own.arrays,
    )
