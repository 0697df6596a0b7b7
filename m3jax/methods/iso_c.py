"""Iso-C: every direction of the summed task vectors gets the same singular value."""

from __future__ import annotations

from typing import Any

from m3jax.lazy import jnp
from m3jax.methods.scaled import OfMatrices
from m3jax.methods.spectral import product, svd
from m3jax.methods.step import Numbers, Operands, register, sum_over_models


@register("iso_c")
class IsoC(OfMatrices):
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

    def of_matrices(self, tasks: Any, x: Operands, p: Numbers) -> Any:
        left, values, right = svd(sum_over_models(tasks))
        return product(left, right.T) * jnp.mean(values)
