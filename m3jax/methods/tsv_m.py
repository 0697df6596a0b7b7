"""TSV-M: the largest singular triples of each task, made orthogonal between tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from m3jax.lazy import jax
from m3jax.methods import ranks
from m3jax.methods.scaled import OfMatrices
from m3jax.methods.spectral import masked, polar_product, svd
from m3jax.methods.step import Numbers, Operands, register


@register("tsv_m")
class TsvM(OfMatrices):
    """θ0 + s · P([U_1 … U_K]) diag([S_1 … S_K]) P([V_1 … V_K])ᵀ for matrices.

    λ_k τ_k = U_k S_k V_kᵀ, of which the first r triples are kept, as far as
    σ > max(m, n) ε σ_1; r = min(m, n) // K, or as the rule `rank` says, of which
    `m3jax.methods.ranks` has more. P(A) = Q Rᵀ for the SVD A = Q D Rᵀ is the polar
    factor, over the singular values above max(shape) ε times the largest: tasks that
    are 0 in a tensor, or of low rank, add nothing. Tensors that are no matrices get
    θ0 + s · mean λ_k τ_k. Without M3 all λ_k are 1.

    Source: arXiv 2412.00081; agrees with fusion-bench 0.2.33. Triples of zero singular
    values are left out, which is ours, as are ranks other than `share` here.
    """

    studies = (
        "usually lost on LLMs (2511.21437, twelve fine-tunes each of four LLMs, "
        "16 benchmarks); made for full fine-tunes, shown on vision models"
    )
    rank: Any = ranks.rule(default="share")
    energy: Any = ranks.energy_kept(search=(0.2, 0.8))

    def of_matrices(self, tasks: Any, x: Operands, p: Numbers) -> Any:
        return combined(tasks, self.rank, p["energy"].reshape(()))


def combined(tasks: Sequence[jax.Array], rank: str, energy: jax.Array) -> jax.Array:
    """P(U) S P(V)ᵀ of the triples that a rule keeps of each task vector (m, n)."""
    count, shape = len(tasks), tasks[0].shape
    if rank == "share":  # known beforehand, so that less is computed
        triples = [svd(task, min(shape) // count) for task in tasks]
    else:
        triples = []
        for task in tasks:
            found = svd(task)
            own = ranks.kept(
                found[1], rank, num_models=count, shape=shape, energy=energy
            )
            triples.append(masked(found, own))
    return polar_product(triples)
