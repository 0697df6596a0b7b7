"""From losses to weights and objectives: LM-Cocktail, and safety-aware merging."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def lm_cocktail_weights(losses: Any, *, temperature: float = 5.0) -> jax.Array:
    """LM-Cocktail's weights of models for an average: w = softmax(−loss / T).

    Agrees with `compute_weights` of LM_Cocktail 0.0.4 (arXiv 2311.13534); T = 5 there,
    1 in the scripts of safety-aware merging. Differentiable.

    Args:
      losses: (K,), each model's mean token loss on examples of the target task.

    Returns:
      (K,) float32.

    Raises:
      ValueError: `losses` has another number of axes, or T is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} needs a number above 0")
    values = jnp.asarray(losses, jnp.float32)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"losses has the shape {values.shape}; (K,) is needed")
    return jax.nn.softmax(-values / float(temperature))


def weighted_objective(
    losses: Any, types: Sequence[str], weights: Mapping[str, float]
) -> Any:
    """What safety-aware merging minimises: Σ_i weight(type_i) · loss_i.

    A loss that is not finite makes it ∞, whatever its weight: a trial in which one
    example fails has lost. Agrees with `compute_losses` of hammoudhasan/MergeAlign,
    arXiv 2406.14563, which weighs safety with 1 and tasks with 0.3 or 1.

    Args:
      losses: (N,), each example's mean token loss of the completion, prompt masked.
      types: N names.
      weights: of each name; names that no example has are allowed.

    Returns:
      A float; for a `jax.Array`, also under a trace, a scalar that can be
      differentiated.

    Raises:
      ValueError: the lengths differ, or a type has no weight.
    """
    if np.shape(losses) != (len(types),):
        raise ValueError(f"{np.shape(losses)} losses and {len(types)} types do not fit")
    missing = sorted(set(types) - set(weights))
    if missing:
        raise ValueError(f"weights has none for {missing}; it has {sorted(weights)}")
    own = [float(weights[kind]) for kind in types]
    if isinstance(losses, jax.Array):
        total = jnp.sum(jnp.asarray(own, losses.dtype) * losses)
        worst = jnp.asarray(jnp.inf, total.dtype)
        return jnp.where(jnp.all(jnp.isfinite(losses)), total, worst)
    values = [float(loss) for loss in losses]
    if not all(map(math.isfinite, values)):
        return math.inf
    return math.fsum(w * loss for w, loss in zip(own, values, strict=True))
