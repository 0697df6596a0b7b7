"""What LFS makes of one tensor: each rule takes the base's and the models' arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from m3jax.search.pytrees import alike, weighted_sum

_LINEAR_ABOVE = 0.9995  # |cos| of two tensors that slerp takes for parallel


def linear(base: Any, models: Sequence[Any], *, weights: Sequence[float]) -> Any:
    """Σ w_k θ_k; the weights add up to 1."""
    return weighted_sum(models, weights)


def task_arithmetic(base: Any, models: Sequence[Any], *, scaling: float) -> Any:
    """θ0 + s Σ τ_k."""
    start, *others = alike((base, *models))
    deltas = [model - start for model in others]
    return start + scaling * weighted_sum(deltas, [1.0] * len(deltas))


def ties(base: Any, models: Sequence[Any], *, trim_rate: float, scaling: float) -> Any:
    """θ0 + s · mean of the trimmed entries that have the elected sign."""
    if not 0 <= trim_rate <= 1:
        raise ValueError(f"trim_rate={trim_rate} needs a number from 0 to 1")
    start, *others = alike((base, *models))
    deltas = jnp.stack([model - start for model in others])
    removed = int(start.size * trim_rate)
    if removed:
        sizes = jnp.abs(deltas).reshape(len(models), -1)
        threshold = jnp.sort(sizes, axis=1)[:, removed - 1]
        threshold = threshold.reshape(-1, *(1,) * start.ndim)
        deltas = jnp.where(jnp.abs(deltas) >= threshold, deltas, 0)
    sign = jnp.sign(jnp.sum(deltas, axis=0))
    sign = jnp.where(sign == 0, jnp.sign(jnp.sum(sign)), sign)
    # As in the reference, a majority of neither sign elects the negative one.
    agrees = jnp.where((sign > 0)[None], deltas > 0, deltas < 0)
    total = jnp.sum(jnp.where(agrees, deltas, 0), axis=0)
    count = jnp.sum(agrees, axis=0, dtype=total.dtype)
    return start + scaling * (total / jnp.maximum(count, 1))


def slerp(
    base: Any, models: Sequence[Any], *, pair: Sequence[int], t: Sequence[float]
) -> Any:
    """From the first of two models to the second, along the angle between them."""
    first, second = alike([models[k] for k in pair])
    share = 1 / (1 + jnp.exp(jnp.asarray(t[pair[0]] - t[pair[1]], first.dtype)))
    norms = jnp.linalg.norm(first.ravel()) * jnp.linalg.norm(second.ravel())
    # Without a direction, as of a tensor of zeros, the way is a straight line.
    cosine = jnp.where(
        norms > 0, jnp.sum(first * second) / jnp.where(norms > 0, norms, 1), 1
    )
    parallel = jnp.abs(cosine) > _LINEAR_ABOVE
    angle = jnp.arccos(jnp.where(parallel, 0, cosine))
    a = jnp.where(parallel, 1 - share, jnp.sin((1 - share) * angle) / jnp.sin(angle))
    b = jnp.where(parallel, share, jnp.sin(share * angle) / jnp.sin(angle))
    return a * first + b * second
