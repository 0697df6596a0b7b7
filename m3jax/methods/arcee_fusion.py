"""Arcee Fusion: takes those entries of a model that matter most."""

from __future__ import annotations

import math
from typing import Any

from m3jax.lazy import jnp
from m3jax.methods.step import Method, Numbers, Operands, register, rounded_product
from m3jax.methods.sums import row_sums


@register("arcee_fusion")
class ArceeFusion(Method):
    """θ0 + τ where the importance is at least its threshold, θ0 elsewhere.

    The importance of an entry is |τ| · KL(softmax(r) ‖ softmax(r0)), r and r0 its rows
    in the model and in the base. The threshold of a tensor is q½ + 1.5 (q¾ − q¼),
    where q_f is the (⌊f (n − 1)⌋ + 1)-th smallest importance.

    Source: agrees with mergekit's `arcee_fusion`, but for entries beside the threshold,
    which rounding decides there.
    """

    unit = "matrix"
    num_models = 1

    def apply(self, x: Operands, p: Numbers, info: Numbers) -> Any:
        (tau,) = jnp.atleast_1d(x.deltas[0])[None]
        rows = jnp.atleast_1d(x.models[0])
        importance = jnp.abs(tau) * _divergence(rows, tau)
        ranked = jnp.sort(importance.reshape(-1))
        low, middle, high = (
            ranked[math.floor(f * (ranked.size - 1))] for f in (0.25, 0.5, 0.75)
        )
        threshold = middle + rounded_product(high - low, jnp.asarray(1.5, tau.dtype))
        taken = jnp.where(importance >= threshold, tau, jnp.zeros_like(tau))
        return x.base + taken.reshape(x.base.shape)


def _divergence(rows: Any, tau: Any) -> Any:
    """KL(softmax(rows) ‖ softmax(rows − tau)) along the last axis, (..., 1).

    With E the mean under softmax(rows) and d = τ − E τ, it is log E exp(−d), where
    E (exp(−d) − 1 + d) is summed, since E d = 0: no term cancels another.
    """
    dtype = rows.dtype
    powers = jnp.exp(rows - jnp.max(rows, axis=-1, keepdims=True))
    shares = powers / row_sums(powers).astype(dtype)
    d = tau - row_sums(shares * tau).astype(dtype)
    series = d * d * (1 / 2 - d * (1 / 6 - d * (1 / 24 - d * (1 / 120 - d / 720))))
    excess = jnp.where(jnp.abs(d) < 0.3, series, jnp.expm1(-d) + d)
    return jnp.log1p(row_sums(shares * excess).astype(dtype))
