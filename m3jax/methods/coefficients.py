"""Combinations whose coefficients come from files: one for each column or element."""

from __future__ import annotations

from typing import Any

from m3jax.methods.fields import choice
from m3jax.methods.step import (
    Method,
    Numbers,
    Operands,
    register,
    rounded_product,
    sum_over_models,
)


@register("coefficients")
class Coefficients(Method):
    """Σ c_k ⊙ θ_k, or of task vectors θ0 + Σ c_k ⊙ τ_k, with c_k beside the models.

    Beside the models: `statistics`, c_k, of the tensors' shapes or 1 along some of
    their axes, so that (1, n) has one coefficient for each of n columns. A tensor that
    has none is the mean of the models, or θ0 + the mean of the τ_k.

    Source: ours; what `m3jax learn` finds by column (DAM, arXiv 2410.08371) or element
    (NP Merge, arXiv 2412.15467) is merged by it.
    """

    of: Any = choice(
        default="models",
        help="combine the `models`, or their `task_vectors`",
        options=("models", "task_vectors"),
    )
    beside = ("statistics",)
    beside_repeats = True

    @property
    def needs_base(self) -> bool:
        return bool(self.of == "task_vectors")

    def apply(self, x: Operands, p: Numbers, info: Numbers) -> Any:
        vectors = x.deltas if self.needs_base else x.models
        factors = x.beside.get("statistics")
        if factors is None:
            total = sum_over_models(vectors * (1 / vectors.shape[0]))
        else:
            total = sum_over_models(rounded_product(vectors, factors))
        return x.base + total if self.needs_base else total
