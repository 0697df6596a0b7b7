"""TIES's trimming and election of signs, before any method: AdaMerging++'s models."""

from __future__ import annotations

from typing import Any

import numpy as np

from m3jax.lazy import jnp
from m3jax.methods.fields import share
from m3jax.methods.step import (
    Numbers,
    Operands,
    Problem,
    Statistics,
    Transform,
    register,
    sum_over_models,
)
from m3jax.methods.ties import thresholds_and_majority, trim


@register("elect")
class Elect(Transform):
    """θ0 + τ'_i, where τ'_i is τ_i where it is large and has the elected sign, else 0.

    Large are, of each τ_i, the entries of at least the k-th smallest magnitude of the
    whole model, k = n − int(n · density). The sign is that of the sum of the large
    entries; where the sum is 0, what most sums of the model have; else −.

    Source: AdaMerging++ of arXiv 2310.02575, which merges these by task arithmetic
    instead of TIES's mean of what agrees.
    """

    density: Any = share(
        default=None,
        help="share that is kept before the election, one number or one per model; "
        "None: off",
        per_model=True,
        optional=True,
        search=(0.1, 1.0),
    )
    scope = "model"

    def measure(self, problem: Problem) -> Statistics:
        xp = jnp if problem.traced else np
        n = problem.size
        rank = n - xp.floor(problem.numbers["density"] * n)
        rates = xp.minimum((rank + 0.5) / n, 1.0)
        found = yield from thresholds_and_majority(rates, problem)
        return found

    def apply(self, x: Operands, p: Numbers, info: Numbers, draw: Any) -> Operands:
        large = trim(x.deltas, info["thresholds"])
        total = sum_over_models(large)
        up = (total > 0) | ((total == 0) & (info["majority"] > 0))
        kept = jnp.where(up[None], large > 0, large < 0)
        return x._replace(models=x.base[None] + jnp.where(kept, large, 0 * large))
