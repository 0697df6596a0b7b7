"""Karcher mean: the point of a sphere with the least squared distance to the models."""

from __future__ import annotations

from typing import Any

import numpy as np

from m3jax.methods.fields import number, share, weights
from m3jax.methods.geometry import NOTHING, FromGram
from m3jax.methods.step import Numbers, register


@register("karcher")
class Karcher(FromGram):
    """s μ, where μ is the Riemannian mean of the directions u_i = θ_i / ‖θ_i‖.

    From μ = Σ α_i u_i / ‖Σ α_i u_i‖ on, each step goes along T = Σ α_i log_μ(u_i) to
    cos ‖T‖ μ + sin ‖T‖ T / ‖T‖, until ‖T‖ < `tolerance` or `max_steps` are done.
    Directions nearer to μ than `tolerance` add nothing to T. α_i = λ_i over their sum,
    among the models that are not 0; s = Σ λ_i ‖θ_i‖ / Σ λ_i among all. Directions that
    cancel out start from the first one. Without M3 all λ_i are equal.

    Source: agrees with mergekit's `karcher`.
    """

    weights: Any = weights(equal=lambda num_models: 1 / num_models, low=0.0)
    max_steps: Any = number(
        default=10, help="steps, at most", low=0, high=1000, integer=True
    )
    tolerance: Any = share(default=1e-5, help="smallest step, in radians")

    def coefficients(self, numbers: Numbers, products: Any, xp: Any) -> Any:
        weight, tolerance = numbers["weights"], numbers["tolerance"]
        count = len(weight)
        norms = xp.sqrt(xp.stack([products[i, i] for i in range(count)]))
        there = norms > 0
        scale = xp.where(there, 1 / xp.where(there, norms, 1.0), 0.0)
        cosines = products * scale[:, None] * scale[None]
        alpha = xp.where(there, weight, 0.0)
        alpha = _divided(alpha, alpha.sum(axis=0), xp)
        length = _divided((weight * norms).sum(axis=0), weight.sum(axis=0), xp)

        # μ and T are combinations of the u_i: `mu` and `step` hold their coefficients.
        first = xp.cumsum(there, axis=0) * there == 1
        far = _squared(alpha, cosines, xp) > NOTHING
        mu = _unit(xp.where(far, alpha, 1.0 * first), cosines, xp)
        active = xp.ones_like(length) > 0
        for i in range(int(np.max(numbers["max_steps"], initial=0))):
            near = xp.clip(xp.einsum("ijn,jn->in", cosines, mu), -1.0, 1.0)
            angle = xp.arccos(near)
            sine = xp.sin(angle)
            moves = there & (angle >= tolerance) & (sine > 1e-9)
            factor = xp.where(moves, alpha * angle / xp.where(moves, sine, 1.0), 0.0)
            step = factor - (factor * near).sum(axis=0) * mu
            size = xp.sqrt(xp.maximum(_squared(step, cosines, xp), 0.0))
            active = active & (size >= tolerance) & (i < numbers["max_steps"])
            moved = xp.cos(size) * mu + _divided(xp.sin(size) * step, size, xp)
            mu = xp.where(active, _unit(moved, cosines, xp), mu)
        return length * mu * scale


def _squared(a: Any, cosines: Any, xp: Any) -> Any:
    return xp.einsum("in,ijn,jn->n", a, cosines, a)


def _unit(a: Any, cosines: Any, xp: Any) -> Any:
    return _divided(a, xp.sqrt(xp.maximum(_squared(a, cosines, xp), 0.0)), xp)


def _divided(values: Any, divisor: Any, xp: Any) -> Any:
    return values / xp.where(divisor > 0, divisor, 1.0)
