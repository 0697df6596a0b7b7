"""Slerp: between two models along the arc rather than the chord."""

from __future__ import annotations

from typing import Any

from m3jax.methods.fields import weights
from m3jax.methods.step import (
    Info,
    Method,
    Numbers,
    Operands,
    Problem,
    Statistics,
    register,
    rounded_product,
    sum_over_models,
)
from m3jax.methods.sums import gram
from m3jax.methods.sums import weights as models

_NEARLY_PARALLEL = 0.9995


@register("slerp")
class Slerp(Method):
    """Σ c_i θ_i with c_0 = sin((1 − t) ω) / sin ω and c_1 = sin(t ω) / sin ω.

    ω is the angle between the two models' tensors, t = λ_1 / (λ_0 + λ_1); without M3
    t = 1/2. Nearly parallel or opposite tensors (|cos ω| > 0.9995), and those of which
    one is 0, are averaged: c_0 = 1 − t, c_1 = t.

    Source: Shoemake, SIGGRAPH 1985; for checkpoints mergekit's `slerp`, with which it
    agrees.
    """

    weights: Any = weights(equal=lambda num_models: 1 / num_models, low=0.0)
    scope = "tensor"
    needs_base = False
    num_models = 2

    def measure(self, problem: Problem) -> Statistics:
        products = yield from gram(models, problem)
        return {"products": products.reshape(-1)}

    def derive(self, numbers: Numbers, info: Info, xp: Any) -> Info:
        first, both, _, second = info["products"]
        cosine = both / xp.sqrt(first * second)
        weight = numbers["weights"]
        t = weight[1] / (weight[0] + weight[1])
        chord = ~(xp.abs(cosine) <= _NEARLY_PARALLEL)  # NaN where a tensor is 0
        angle = xp.arccos(xp.where(chord, 0.0, cosine))
        parts = xp.stack([1 - t, t])
        arc = xp.sin(parts * angle[None]) / xp.sin(angle)[None]
        return {"coefficients": xp.where(chord[None], parts, arc)}

    def apply(self, x: Operands, p: Numbers, info: Numbers) -> Any:
        return sum_over_models(rounded_product(x.models, info["coefficients"]))
