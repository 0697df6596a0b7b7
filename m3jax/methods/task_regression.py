"""Task vectors by least squares: WUDI's closed form, ACTMerge and LOT."""

from __future__ import annotations

from typing import Any

from m3jax.lazy import jax, jnp
from m3jax.methods.fields import number, weights
from m3jax.methods.normal_equations import gram_shape, solve
from m3jax.methods.spectral import mean, product
from m3jax.methods.step import (
    Method,
    Numbers,
    Operands,
    register,
    rounded_product,
    sum_over_models,
)
from m3jax.methods.wudi import span


class _Regression(Method):
    """θ0 + s · (Σ_k λ_k τ_k G_k) (Σ_k G_k)⁻¹ for matrices (out, in)."""

    unit = "matrix"

    def grams(self, x: Operands) -> Any:
        """G_k, (K, in, in); None: the tensor has none."""
        raise NotImplementedError

    def apply(self, x: Operands, p: Numbers, info: Numbers) -> Any:
        tasks = rounded_product(x.deltas, p["weights"])
        grams = self.grams(x) if x.base.ndim == 2 and 0 not in x.base.shape else None
        if grams is None:
            return x.base + rounded_product(mean(tasks), p["scaling"])
        wanted = [product(g, task) for g, task in zip(grams, tasks, strict=True)]
        found = solve(sum_over_models(grams), sum_over_models(jnp.stack(wanted)))
        return x.base + rounded_product(found.T, p["scaling"])


@register("wudi_closed_form")
class WudiClosedForm(_Regression):
    """θ0 + s · (Σ λ_k τ_k G_k) (Σ G_k)⁻¹ with G_k = τ_kᵀ τ_k / ‖τ_k‖², for matrices.

    Where WUDI's objective is least, in place of some hundred steps of Adam towards it.
    Of all solutions the one near to 0, so that no ridge is needed. A task whose τ_k is
    0 is left out. Tensors that are no matrices get θ0 + s · mean λ_k τ_k. Without M3
    all λ_k are 1.

    Source: the objective of arXiv 2503.08099; others solve it with a ridge of 1e-8.
    """

    studies = (
        "on the demo's models matrices get up to three times as large as the sum "
        "of the task vectors, and every skill is lost (docs/METHODS.md)"
    )
    weights: Any = weights(equal=lambda num_models: 1.0)
    scaling: Any = number(
        default=1.0, help="s, multiplies the merged task vector", search=(0.5, 1.5)
    )

    def grams(self, x: Operands) -> Any:
        return jnp.stack([span(task) for task in x.deltas])


@register("actmerge")
class ActMerge(_Regression):
    """θ0 + s · (Σ λ_k τ_k G_k) (Σ G_k)⁺ with G_k = τ_kᵀ τ_k, for matrices.

    As `wudi_closed_form`, where large task vectors count more. The pseudo-inverse is
    that solution near to 0. Tensors that are no matrices get θ0 + s · mean λ_k τ_k.
    Without M3 all λ_k are 1.

    Source: ACTMerge's formula, in NumPy our own oracle; no public code was run.
    """

    weights: Any = weights(equal=lambda num_models: 1.0)
    scaling: Any = number(
        default=1.0, help="s, multiplies the merged task vector", search=(0.5, 1.5)
    )

    def grams(self, x: Operands) -> Any:
        tasks = x.deltas
        largest = jnp.max(jnp.abs(tasks), initial=0.0)
        one = jnp.ones((), tasks.dtype)
        tasks = tasks / jnp.where(largest > 0, largest, one)
        return jnp.stack([product(task.T, task.T) for task in tasks])


@register("lot")
class Lot(_Regression):
    """θ0 + s · (Σ λ_k τ_k G_k) (Σ G_k)⁻¹, G_k second moments of the layer's inputs.

    RegMean on task vectors: where no task has inputs the base stays, RegMean has the
    mean there. Tensors without a Gram matrix get θ0 + s · mean λ_k τ_k. Without M3 all
    λ_k are 1.

    Beside the models: `statistics`, G_k (K, in, in), as `m3jax measure gram` writes.

    Source: LOT's formula, in NumPy our own oracle; no public code was run.
    """

    weights: Any = weights(equal=lambda num_models: 1.0)
    scaling: Any = number(
        default=1.0, help="s, multiplies the merged task vector", search=(0.5, 1.5)
    )
    beside = ("statistics",)

    def beside_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return gram_shape(shape)

    def grams(self, x: Operands) -> jax.Array | None:
        return x.beside.get("statistics")
