"""Passthrough: one model as it is, or scaled."""

from __future__ import annotations

from typing import Any

from m3jax.methods.fields import number
from m3jax.methods.step import Method, Numbers, Operands, register, rounded_product


@register("passthrough")
class Passthrough(Method):
    """s θ_1, of one model.

    Source: agrees with mergekit's `passthrough`.
    """

    scale: Any = number(
        default=1.0, help="s, multiplies the weights", search=(0.5, 1.5)
    )
    needs_base = False
    num_models = 1
    shows_nonfinite = True

    def apply(self, x: Operands, p: Numbers, info: Numbers) -> Any:
        return rounded_product(x.models[0], p["scale"])
