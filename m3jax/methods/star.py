"""STAR: cut the small singular values of each task vector, make up for them."""

from __future__ import annotations

from typing import Any

from m3jax.lazy import jax, jnp
from m3jax.methods.fields import share
from m3jax.methods.scaled import OfMatrices
from m3jax.methods.spectral import mean, product, svd
from m3jax.methods.step import Numbers, Operands, register


@register("star")
class Star(OfMatrices):
    """θ0 + s · mean_k U_k S'_k V_kᵀ with λ_k τ_k = U_k S_k V_kᵀ, for matrices.

    S' keeps the first r values of S, r the smallest with Σ_{i≤r} σ_i ≥ η Σ σ_i, η
    `energy`, times Σ σ_i / Σ_{i≤r} σ_i. A task vector of 0 stays 0. Tensors that are no
    matrices get θ0 + s · mean λ_k τ_k. Without M3 all λ_k are 1.

    Source: arXiv 2502.10339, and its authors' code, IBM/STAR.
    """

    energy: Any = share(
        default=0.4,
        help="η, share of the sum of singular values that is kept",
        search=(0.2, 0.8),
    )

    def of_matrices(self, tasks: Any, x: Operands, p: Numbers) -> Any:
        energy = p["energy"].reshape(())
        return mean([_truncated(task, energy) for task in tasks])


def _truncated(task: jax.Array, energy: jax.Array) -> jax.Array:
    left, values, right = svd(task)
    before = jnp.cumsum(values) - values
    zero, total = jnp.zeros((), values.dtype), jnp.sum(values)
    kept = jnp.where(before < energy * total, values, zero)
    sum_kept = jnp.sum(kept)
    factor = total / jnp.where(sum_kept > 0, sum_kept, jnp.ones((), values.dtype))
    return product(left * (kept * factor)[None], right.T)
