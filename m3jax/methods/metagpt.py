"""MetaGPT: task arithmetic with coefficients from the task vectors' norms."""

from __future__ import annotations

from typing import Any

import numpy as np

from m3jax.lazy import jnp
from m3jax.methods.fields import scaling
from m3jax.methods.step import (
    Method,
    Numbers,
    Operands,
    Problem,
    Statistics,
    register,
    rounded_product,
    sum_over_models,
)
from m3jax.methods.sums import exact_sums


@register("metagpt")
class MetaGpt(Method):
    """θ0 + s · Σ λ_k τ_k with λ_k = ‖τ_k‖² / Σ_j ‖τ_j‖², L2 norms of the whole model.

    It chooses λ itself, so that M3 has nothing to draw. Experts that all equal the base
    give the base. λ stands in m3jax.json.

    Source: arXiv 2406.11385, in the form of IBM/STAR.
    """

    scaling: Any = scaling()
    scope = "model"
    records = ("coefficients",)

    def measure(self, problem: Problem) -> Statistics:
        squares = yield from exact_sums(_squares, problem)
        xp = jnp if problem.traced else np
        total = xp.sum(squares)
        return {"coefficients": squares / xp.where(total > 0, total, 1.0)}

    def apply(self, x: Operands, p: Numbers, info: Numbers) -> Any:
        total = sum_over_models(rounded_product(x.deltas, info["coefficients"]))
        return x.base + rounded_product(total, p["scaling"])


def _squares(x: Operands) -> Any:
    return x.deltas * x.deltas
