"""RegMean: the weights whose outputs are nearest to every model's on its own inputs."""

from __future__ import annotations

from typing import Any

from m3jax.lazy import jnp
from m3jax.methods.fields import share, weights
from m3jax.methods.normal_equations import gram_shape, solve
from m3jax.methods.spectral import product
from m3jax.methods.step import (
    Method,
    Numbers,
    Operands,
    register,
    rounded_product,
    sum_over_models,
)


@register("regmean")
class RegMean(Method):
    """Wᵀ = (Σ λ_k G_k)⁻¹ Σ λ_k G_k W_kᵀ for linear weights W_k (out, in).

    G_k = XᵀX / tokens (in, in) of the weight's inputs, its entries off the diagonal
    times `nondiagonal`. Weights without a Gram matrix get Σ λ_k W_k / Σ λ_k. Without
    M3 λ_k = 1/K. Others take 0.9 or 0.1 (the authors), 1 (MergeLM), 0.95 or 0.6
    (fusion-bench).

    Solved for the distance from that mean by Cholesky, with unit diagonals, a jitter
    and iterative refinement, in place of the reference's inverse, which loses 1e-3 and
    more on ill-conditioned Grams. Where Σ G_k is singular but for the rounding of
    float32, the solution near to the mean counts, which is ours; so inputs that are
    always 0 keep the mean.

    Beside the models: `statistics`, G_k (K, in, in).

    Source: arXiv 2212.09849; agrees with fusion-bench 0.2.33.
    """

    studies = (
        "collapses behind DARE at a drop rate of 0.1 already (2405.17461); on the "
        "demo's models it beats the average (docs/MEASURE.md)"
    )
    weights: Any = weights(equal=lambda num_models: 1 / num_models, low=0.0)
    nondiagonal: Any = share(
        default=0.9,
        help="factor of the Gram matrices' entries off the diagonal",
        search=(0.1, 1.0),
    )
    unit = "matrix"
    needs_base = False
    beside = ("statistics",)

    def beside_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return gram_shape(shape)

    def apply(self, x: Operands, p: Numbers, info: Numbers) -> Any:
        weight = jnp.broadcast_to(
            p["weights"], (len(x.models), *(1,) * (x.models.ndim - 1))
        )
        total = sum_over_models(weight)
        one = jnp.ones((), weight.dtype)
        share = weight / jnp.where(total > 0, total, one)[None]
        mean = sum_over_models(rounded_product(x.models, share))
        grams = x.beside.get("statistics")
        if grams is None:
            return mean
        diagonal = jnp.eye(grams.shape[-1], dtype=bool)
        factor = jnp.where(diagonal, one, p["nondiagonal"])
        grams = rounded_product(rounded_product(grams, share), factor[None])
        wanted = [
            product(gram, model - mean)
            for gram, model in zip(grams, x.models, strict=True)
        ]
        moved = solve(sum_over_models(grams), sum_over_models(jnp.stack(wanted)))
        return mean + moved.T
