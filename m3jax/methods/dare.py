"""DARE: drop entries of each task vector, rescale the rest; comes before a method."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.methods.method import Reduction
from m3jax.methods.selection import delta_codes, kth_smallest, weight_codes


def drop_and_rescale(
    base: Any,
    stack: jax.Array,
    dropped: jax.Array,
    scales: jax.Array,
    *,
    target: str,
) -> jax.Array:
    """θ0 + τ'_i, where τ'_i is 0 where dropped and c_i τ_i elsewhere.

    Source: arXiv 2311.03099. Agrees with the authors' `mask_merging`; mergekit
    rescales by the ratio of L1 norms per tensor instead of 1/(1 − p).

    Args:
      base: θ0, float32; not read with target ``weights``.
      stack: θ_i, (K, ...) float32.
      dropped: (K, ...) bool.
      scales: c_i, float32, broadcasts against the stack: 1/(1 − p_i), or 1.
      target: ``delta`` masks τ_i = θ_i − θ0; ``weights`` gives 0 or c_i θ_i.

    Returns:
      The models to merge, (K, ...) float32.
    """
    if target == "weights":
        return jnp.where(dropped, 0.0, stack * scales)
    # The select between product and sum also keeps XLA from contracting the two, so
    # that every kernel that recomputes this sees the same bits.
    return base[None] + jnp.where(dropped, 0.0, (stack - base[None]) * scales)


def rescale_factors(kept_shares: np.ndarray, *, rescale: bool) -> np.ndarray:
    """1/(1 − p_i) as float32, given 1 − p_i; 1 where nothing is kept."""
    if not rescale:
        return np.ones_like(kept_shares, np.float32)
    return (1 / np.where(kept_shares > 0, kept_shares, 1.0)).astype(np.float32)


def magnitude_thresholds(
    rates: tuple[float, ...], size: int, *, target: str
) -> Generator[Reduction, Any, np.ndarray]:
    """Per model, the k-th smallest magnitude of ONE tensor, k = int(n · p).

    Entries up to and including it are dropped; k = 0 gives −1, which drops nothing.

    Returns:
      (K,) float32.
    """
    ranks = [int(size * rate) for rate in rates]
    if not any(ranks):
        return np.full(len(ranks), -1, np.float32)
    function = delta_codes if target == "delta" else weight_codes
    found = yield from kth_smallest(function, [max(rank, 1) for rank in ranks], size)
    return np.where(np.array(ranks) > 0, found, np.float32(-1))


def magnitude_mask(
    base: Any, stack: jax.Array, thresholds: jax.Array, *, target: str
) -> jax.Array:
    """Where |τ_i| (or |θ_i|, with target ``weights``) is at most its threshold."""
    values = stack if target == "weights" else stack - base[None]
    return jnp.abs(values) <= thresholds
