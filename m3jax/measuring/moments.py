"""Gram matrices of the inputs of linear weights, for `regmean`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from m3jax.search.pytrees import wide_dtype


def grams(
    layer_inputs: Callable[[Any, Any], Any], params: Any, batches: Iterable[Any]
) -> Any:
    """The mean over tokens of x xᵀ, for each linear weight with inputs x.

    G = Σ_tokens x xᵀ / tokens, kept as a running mean: G ← G + (XᵀX − n G) / N after a
    batch of n tokens, N so far. The same for any split into batches. bloomberg's and
    MergeLM's hooks of RegMean (arXiv 2212.09849) count padding tokens too; leave them
    out of what `layer_inputs` returns.

    Args:
      layer_inputs: (params, batch) -> a pytree whose leaves (..., in) are the inputs of
        the linear weight at the same path; all axes but the last are tokens. It is not
        compiled here, so that it may select tokens: ``x[mask]``.
      params: a pytree.
      batches: what `layer_inputs` takes.

    Returns:
      A pytree of (in, in), float32 (float64 where an input is).

    Raises:
      ValueError: there are no batches.
    """
    means: Any = None
    counts: list[int] = []
    for batch in batches:
        leaves, structure = jax.tree.flatten(layer_inputs(params, batch))
        if means is None:
            means, counts = [_zeros(x) for x in leaves], [0] * len(leaves)
        for i, x in enumerate(leaves):
            tokens = x.size // max(x.shape[-1], 1)
            counts[i] += tokens
            if tokens:
                means[i] = _moved(means[i], x, tokens / counts[i])
    if means is None:
        raise ValueError("batches=[] needs one batch or more")
    return jax.tree.unflatten(structure, means)


def _zeros(x: jax.Array) -> jax.Array:
    dtype = wide_dtype(x)
    return jnp.zeros((x.shape[-1], x.shape[-1]), dtype)


@jax.jit
def _moved(mean: jax.Array, x: jax.Array, share: float) -> jax.Array:
    rows = x.reshape(-1, x.shape[-1]).astype(mean.dtype)
    own = second_moment(rows) / len(rows)
    return mean + (own - mean) * jnp.asarray(share, mean.dtype)


def second_moment(x: jax.Array) -> jax.Array:
    """Σ x xᵀ over all axes of (..., in) but the last: (in, in)."""
    rows = x.reshape(-1, x.shape[-1])
    return jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)
