"""SCE: select what differs most, calculate coefficients, erase the minority."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from m3jax.lazy import jnp
from m3jax.methods.fields import share
from m3jax.methods.selection import kth_smallest, magnitudes
from m3jax.methods.step import (
    Info,
    Method,
    Numbers,
    Operands,
    Problem,
    Reduction,
    Statistics,
    register,
    rounded_product,
    sum_over_models,
)
from m3jax.methods.sums import exact_sums


@register("sce")
class Sce(Method):
    """θ0 + Σ_S w_i x_i / Σ_S w_i, with x_i = τ_i where the models differ most.

    Selected are the int(p · n') entries of a tensor with the largest variance over the
    models, n' entries having any, and all that equal the last of them; p = 1 selects
    everything. w_i = Σ x_i² / Σ_j Σ x_j² over the tensor. S are the models with the
    sign of Σ x_i, or + where that is 0.

    Source: arXiv 2408.07990 (FuseChat); agrees with mergekit's `sce`.
    """

    select_topk: Any = share(
        default=1.0, help="p, share of the entries that is selected"
    )
    scope = "tensor"

    def measure(self, problem: Problem) -> Statistics:
        xp = jnp if problem.traced else np
        share, count = problem.numbers["select_topk"], problem.size
        one = dataclasses.replace(problem, num_models=1)
        (varied,) = yield Reduction(_varied, {})
        kept = xp.floor(share * varied[0])
        rank = count - kept + 1  # of the smallest variance that is selected
        rates = xp.minimum((rank + 0.5) / count, 1.0)
        found = yield from kth_smallest(_variance_row, rates, one)
        threshold = xp.where(kept > 0, found[0], xp.inf)
        threshold = xp.where(share >= 1, 0.0, threshold).astype(np.float32)
        squares = yield from exact_sums(_squares, problem, {"threshold": threshold})
        return {"squares": squares, "threshold": threshold}

    def derive(self, numbers: Numbers, info: Info, xp: Any) -> Info:
        total = info["squares"].sum(axis=0)
        shares = info["squares"] / xp.where(total > 0, total, 1.0)
        return {"shares": shares, "threshold": info["threshold"]}

    def apply(self, x: Operands, p: Numbers, info: Numbers) -> Any:
        tau = _selected(x, info["threshold"])
        positive = (sum_over_models(tau) >= 0)[None]
        agrees = jnp.where(positive, tau > 0, tau < 0)
        weight = sum_over_models(jnp.where(agrees, info["shares"], 0 * tau))
        weighed = jnp.where(agrees, rounded_product(tau, info["shares"]), 0 * tau)
        divisor = jnp.where(weight > 0, weight, jnp.ones_like(weight))
        return x.base + sum_over_models(weighed) / divisor


def _variance(x: Operands) -> Any:
    """K times the variance of the task vectors over the models; (...) float32."""
    tau = x.deltas
    share = jnp.asarray(1 / tau.shape[0], tau.dtype)
    mean = rounded_product(sum_over_models(tau), share)
    away = tau - mean[None]
    return magnitudes(sum_over_models(rounded_product(away, away)))


def _variance_row(x: Operands, arguments: Numbers) -> Any:
    return _variance(x)[None]


def _varied(x: Operands, arguments: Numbers) -> tuple[Any]:
    return ((_variance(x) > 0)[None].astype(jnp.int32),)


def _selected(x: Operands, threshold: Any) -> Any:
    kept = (_variance(x) >= threshold.astype(jnp.float32))[None]
    return jnp.where(kept, x.deltas, 0 * x.deltas)


def _squares(x: Operands, arguments: Numbers) -> Any:
    tau = _selected(x, arguments["threshold"])
    return tau * tau
