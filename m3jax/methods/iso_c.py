"""Iso-C: every direction of the summed task vectors gets the same singular value."""

from __future__ import annotations

from typing import Any

from m3jax.lazy import jnp
from m3jax.methods.fields import number, weights
from m3jax.methods.spectral import kept_triples, mean, product, svd
from m3jax.methods.step import (
    Method,
    Numbers,
    Operands,
    register,
    rounded_product,
    sum_over_models,
)


@register("iso_c")
class IsoC(Method):
    """θ0 + s · mean(S) U Vᵀ with Σ λ_k τ_k = U S Vᵀ, for matrices.

    The mean is over all min(m, n) singular values; directions of σ ≤ max(m, n) ε σ_1
    are left out, which is ours: U Vᵀ is not unique there. Tensors that are no matrices
    get θ0 + s · mean λ_k τ_k. Without M3 all λ_k are 1.

    Meant for full fine-tunes: experts made by LoRA have few directions, and lose
    (arXiv 2505.19892).

    Source: arXiv 2502.04959; agrees with fusion-bench 0.2.33 and the authors' code.
    """

    studies = (
        "usually lost on LLMs (2511.21437, twelve fine-tunes each of four LLMs, "
        "16 benchmarks); collapses on LoRA experts (2505.19892)"
    )
    weights: Any = weights(equal=lambda num_models: 1.0)
    scaling: Any = number(
        default=1.0, help="s, multiplies the merged task vector", search=(0.5, 2.0)
    )
    unit = "matrix"

    def apply(self, x: Operands, p: Numbers, info: Numbers) -> Any:
        tasks = rounded_product(x.deltas, p["weights"])
        if x.base.ndim != 2:
            return x.base + rounded_product(mean(tasks), p["scaling"])
        triples = svd(sum_over_models(tasks))
        left, values, right = kept_triples(triples, min(x.base.shape))
        merged = product(left, right.T) * jnp.mean(values)
        return x.base + rounded_product(merged, p["scaling"])
