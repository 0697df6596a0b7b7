"""TIES: trim the small entries, elect a sign, merge those that agree with it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.methods.method import Info, Method, Reduction, Statistics, sum_over_models
from m3jax.methods.selection import Window, delta_codes, kth_smallest_and

# Stands for a coefficient of 0: too small to weigh against any other, and large
# enough that what survives alone keeps its whole value.
_NO_WEIGHT = 1e-20


def ties(
    base: jax.Array,
    stack: jax.Array,
    coefficients: jax.Array,
    info: Info,
    scaling: jax.Array,
) -> jax.Array:
    """θ0 + s · the weighted mean, per entry, of the task vectors that agree in sign.

    With x_i = τ_i where |τ_i| ≥ t_i, else 0, and g = sign(Σ x_i), or the majority
    sign of the whole model where that sum is 0, the survivors S are the models with
    x_i g > 0, and the result is θ0 + s · Σ_S λ_i x_i / Σ_S λ_i; no survivor gives θ0.
    Without M3 all λ_i are equal. A sole survivor counts whole, whatever its λ.

    Source: arXiv 2306.01708; with λ drawn, M3, arXiv 2502.15434. Agrees with the
    authors' `ties_merging`. mergekit's `ties` differs: it trims per tensor to a fixed
    number of entries, weighs the vote, and sends sums of 0 to +.

    Args:
      base: θ0, float32.
      stack: θ_i, (K, ...) float32.
      coefficients: λ, (K, ...) float32, not negative, broadcasts against the stack.
      info: ``thresholds``, t, (K,) float32; ``majority``, −1, 0 or 1, float32.
      scaling: s, a float32 scalar.

    Returns:
      The merged tensor, float32.
    """
    trimmed = _trim(stack - base[None], info["thresholds"])
    total = sum_over_models(trimmed)
    elected = jnp.where(total == 0, info["majority"], jnp.sign(total))
    survives = trimmed * elected[None] > 0
    coefficients = jnp.maximum(coefficients, _NO_WEIGHT)
    # Products first, then selects, then sums: `rounded_product` says why.
    weight = sum_over_models(jnp.where(survives, coefficients, 0.0))
    total = sum_over_models(jnp.where(survives, coefficients * trimmed, 0.0))
    merged = total / jnp.where(weight > 0, weight, 1.0)
    return base + jnp.where(weight > 0, scaling * merged, 0.0)


def statistics(num_models: int, size: int, trim_rate: float) -> Statistics:
    """Thresholds and majority sign of the whole model, exactly.

    t_i is the k-th smallest |τ_i| with k = int(n · r); k = 0 trims nothing. The
    majority is the sign of Σ sign(Σ_i x_i) over all n entries.
    """
    rank = int(size * trim_rate)
    thresholds, beside = np.zeros(num_models, np.float32), None
    if rank > 0:
        votes = _codes_and_signs if num_models > 1 else None
        thresholds, beside = yield from kth_smallest_and(
            delta_codes, votes, [rank] * num_models, size
        )
    majority = 0
    if num_models > 1 and size > 0:  # one model: a sum of 0 has no survivors
        # An entry that only the exact threshold trims, or spares, changes its sign
        # by 2 at most. If they cannot turn the majority, it is known already.
        if beside is not None and abs(beside.counts) > 2 * beside.between:
            majority = beside.counts
        else:
            majority = yield Reduction(_signs, thresholds)
    return {
        "thresholds": thresholds,
        "majority": np.asarray(np.sign(majority), np.float32),
    }


def _codes_and_signs(
    base: jax.Array,
    stack: jax.Array,
    valid: jax.Array,
    arguments: tuple[Window, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    window, thresholds = arguments
    (codes,) = delta_codes(base, stack, valid, window)
    return codes, _signs(base, stack, valid, thresholds)


def _signs(
    base: jax.Array, stack: jax.Array, valid: jax.Array, thresholds: jax.Array
) -> jax.Array:
    total = sum_over_models(_trim(stack - base[None], thresholds))
    signs = jnp.where(total > 0, 1, jnp.where(total < 0, -1, 0))
    return jnp.sum(jnp.where(valid, signs, 0), dtype=jnp.int32)


def _trim(task_vectors: jax.Array, thresholds: jax.Array) -> jax.Array:
    thresholds = thresholds.reshape((-1,) + (1,) * (task_vectors.ndim - 1))
    return jnp.where(jnp.abs(task_vectors) >= thresholds, task_vectors, 0.0)


TIES = Method(
    apply=ties,
    default_coefficient=lambda num_models: 1.0,
    needs_base=True,
    statistics=statistics,
)
