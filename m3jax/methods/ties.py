"""TIES: trim the small entries, elect a sign, merge those that agree with it."""

from __future__ import annotations

from typing import Any

import numpy as np

from m3jax.lazy import jax, jnp
from m3jax.methods.fields import scaling, share, weights
from m3jax.methods.selection import Codes, kth_smallest_and, magnitudes
from m3jax.methods.step import (
    Method,
    Numbers,
    Operands,
    Problem,
    Reduction,
    Statistics,
    register,
    sum_over_models,
)
from m3jax.methods.sums import deltas

# Stands for a coefficient of 0: too small to weigh against any other, and large
# enough that what survives alone keeps its whole value.
_NO_WEIGHT = 1e-20


@register("ties")
class Ties(Method):
    """θ0 + s · the weighted mean, per entry, of the task vectors that agree in sign.

    With x_i = τ_i where |τ_i| ≥ t_i, else 0, and g = sign(Σ x_i), or the majority
    sign of the whole model where that sum is 0, the survivors S are the models with
    x_i g > 0, and the result is θ0 + s · Σ_S λ_i x_i / Σ_S λ_i; no survivor gives θ0.
    Without M3 all λ_i are equal. A sole survivor counts whole, whatever its λ.

    t_i is the k-th smallest |τ_i| of the whole model with k = int(n · r); k = 0 trims
    nothing. The majority is the sign of Σ sign(Σ_i x_i) over all n entries. Both are
    exact.

        >>> import jax.numpy as jnp, m3jax
        >>> tau = [4.0, 1.0, -2.0], [2.0, -3.0, 0.5]  # trimmed: 4, 0, -2 and 2, -3, 0
        >>> base, a, b = ({"w": jnp.array(w)} for w in ([0.0, 0.0, 0.0], *tau))
        >>> method, off = m3jax.Ties(trim_rate=0.7), m3jax.Mixup(alpha=None)
        >>> recipe = m3jax.Recipe(method=method, mixup=off)
        >>> m3jax.merge_params(base, [a, b], recipe)["w"].tolist()
        [3.0, -3.0, -2.0]

    Source: arXiv 2306.01708; with λ drawn, M3, arXiv 2502.15434. Agrees with the
    authors' `ties_merging`. mergekit's `ties` differs: it trims per tensor to a fixed
    number of entries, weighs the vote, and sends sums of 0 to +.
    """

    studies = (
        "usually lost on LLMs (2511.21437, twelve fine-tunes each of four LLMs, "
        "16 benchmarks); at a high trim rate it did well in long-to-short "
        "reasoning merges (2503.20641)"
    )
    weights: Any = weights(low=0.0)
    scaling: Any = scaling()
    trim_rate: Any = share(
        default=0.5,
        help="r, share of each task vector set to zero, smallest first, over the whole "
        "model",
        search=(0.2, 0.9),
    )
    scope = "model"
    differentiable = True

    def apply(self, x: Operands, p: Numbers, info: Numbers) -> Any:
        trimmed = trim(x.deltas, info["thresholds"])
        total = sum_over_models(trimmed)
        elected = jnp.where(total == 0, info["majority"], jnp.sign(total))
        survives = trimmed * elected[None] > 0
        coefficients = jnp.maximum(p["weights"], _NO_WEIGHT)
        # Products first, then selects, then sums: `rounded_product` says why.
        weight = sum_over_models(jnp.where(survives, coefficients, 0.0))
        total = sum_over_models(jnp.where(survives, coefficients * trimmed, 0.0))
        merged = total / jnp.where(weight > 0, weight, 1.0)
        return x.base + jnp.where(weight > 0, p["scaling"] * merged, 0.0)

    def measure(self, problem: Problem) -> Statistics:
        found = yield from thresholds_and_majority(
            problem.numbers["trim_rate"], problem
        )
        return found


def thresholds_and_majority(rates: Any, problem: Problem) -> Statistics:
    """The k-th smallest |τ_i| of a group, k = int(n · r), and the sign that most of the
    entries of Σ x_i have, x_i being τ_i where it is at least that large.

    Args:
      rates: r, () or (K,).
      problem: the group.

    Returns:
      ``thresholds`` (K,) and ``majority`` (), −1, 0 or 1.
    """
    count = problem.num_models
    votes = _codes_and_signs if count > 1 else None
    thresholds, beside = yield from kth_smallest_and(deltas, votes, rates, problem)
    majority: Any = 0.0
    if count > 1:  # one model: a sum of 0 has no survivors
        # An entry that only the exact threshold trims, or spares, changes its sign by 2
        # at most. If they cannot turn the majority, it is known already.
        if beside is not None and abs(beside.counts) > 2 * beside.between:
            majority = beside.counts
        else:
            (majority,) = yield Reduction(_signs, {"thresholds": thresholds})
    xp = jnp if problem.traced else np
    return {"thresholds": thresholds, "majority": xp.sign(majority)}


def _codes_and_signs(x: Operands, arguments: Numbers) -> tuple[jax.Array, jax.Array]:
    return *Codes(deltas)(x, arguments), *_signs(x, {"thresholds": arguments["guess"]})


def _signs(x: Operands, arguments: Numbers) -> tuple[jax.Array]:
    total = sum_over_models(trim(x.deltas, arguments["thresholds"]))
    return (jnp.where(total > 0, 1, jnp.where(total < 0, -1, 0)),)


def trim(task_vectors: jax.Array, thresholds: jax.Array) -> jax.Array:
    """The entries whose magnitude is at least the threshold; 0 elsewhere."""
    kept = magnitudes(task_vectors) >= thresholds.astype(jnp.float32)
    return jnp.where(kept, task_vectors, 0.0)
