"""Model Breadcrumbs: leave out the smallest and the largest of each task vector."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from m3jax.lazy import jnp
from m3jax.methods.fields import share
from m3jax.methods.selection import kth_smallest, magnitudes
from m3jax.methods.step import (
    Numbers,
    Operands,
    Problem,
    Statistics,
    Transform,
    register,
)
from m3jax.methods.sums import deltas


@register("breadcrumbs")
class Breadcrumbs(Transform):
    """θ0 + τ'_i, τ'_i being τ_i between two ranks of its tensor and 0 elsewhere.

    Of a tensor's n entries the int(n · β) smallest and the int(n · γ) largest
    magnitudes are left out, with nothing made up for; entries that equal the last one
    kept are kept with it. Before `task_arithmetic` it is the paper's method, whose
    masks keep the share 1 − β − γ; the authors have β about 0.85, γ about 0.01.

    Source: arXiv 2312.06795. mergekit's form, by `density` and `gamma`, is `sparsify`
    by ``outliers``.
    """

    beta: Any = share(
        default=None,
        help="β, share of the smallest entries that is left out; None: off",
        optional=True,
        search=(0.5, 0.95),
    )
    gamma: Any = share(
        default=0.01,
        help="γ, share of the largest entries that is left out",
        search=(0.0, 0.1),
    )
    scope = "tensor"

    def measure(self, problem: Problem) -> Statistics:
        xp = jnp if problem.traced else np
        n, count = problem.size, problem.num_models
        bottom = xp.floor(problem.numbers["beta"] * n)
        top = xp.floor(problem.numbers["gamma"] * n)
        ranks = xp.repeat(xp.stack([bottom + 1, n - top]), count)
        both = dataclasses.replace(problem, num_models=2 * count)
        rates = xp.clip((ranks + 0.5) / n, 0.0, 1.0)
        found = yield from kth_smallest(deltas, rates, both)
        nothing = bottom + top >= n
        low = xp.where(nothing, xp.inf, xp.where(bottom > 0, found[:count], 0.0))
        high = xp.where(top > 0, found[count:], xp.inf)
        return {"low": low.astype(np.float32), "high": high.astype(np.float32)}

    def apply(self, x: Operands, p: Numbers, info: Numbers, draw: Any) -> Operands:
        tau = x.deltas
        size = magnitudes(tau)
        low, high = (info[name].astype(jnp.float32) for name in ("low", "high"))
        kept = (size >= low) & (size <= high)
        return x._replace(models=x.base[None] + jnp.where(kept, tau, 0 * tau))
