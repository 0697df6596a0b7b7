"""TSV-M: the largest singular triples of each task, made orthogonal between tasks."""

from __future__ import annotations

from typing import Any

from m3jax.methods.fields import number, weights
from m3jax.methods.spectral import concatenated, kept_triples, mean, polar, product, svd
from m3jax.methods.step import (
    Method,
    Numbers,
    Operands,
    register,
    rounded_product,
)


@register("tsv_m")
class TsvM(Method):
    """θ0 + s · P([U_1 … U_K]) diag([S_1 … S_K]) P([V_1 … V_K])ᵀ for matrices.

    λ_k τ_k = U_k S_k V_kᵀ, of which the first r = min(m, n) // K triples are kept, as
    far as σ > max(m, n) ε σ_1. P(A) = Q Rᵀ for the SVD A = Q D Rᵀ is the polar factor,
    over the singular values above max(shape) ε times the largest: tasks that are 0 in a
    tensor, or of low rank, add nothing. Tensors that are no matrices get
    θ0 + s · mean λ_k τ_k. Without M3 all λ_k are 1.

    Source: arXiv 2412.00081; agrees with fusion-bench 0.2.33. Triples of zero singular
    values are left out, which is ours.
    """

    weights: Any = weights(equal=lambda num_models: 1.0)
    scaling: Any = number(
        default=1.0, help="s, multiplies the merged task vector", search=(0.5, 2.0)
    )
    unit = "matrix"

    def apply(self, x: Operands, p: Numbers, info: Numbers) -> Any:
        tasks = rounded_product(x.deltas, p["weights"])
        count = tasks.shape[0]
        if x.base.ndim != 2:
            return x.base + rounded_product(mean(tasks), p["scaling"])
        rank = min(x.base.shape) // count
        triples = [kept_triples(svd(task), rank) for task in tasks]
        left, values, right = concatenated(triples)
        merged = product(polar(left) * values[None], polar(right.T))
        return x.base + rounded_product(merged, p["scaling"])
