"""Task vectors by least squares: WUDI's closed form, ACTMerge and LOT."""

from __future__ import annotations

import dataclasses
from typing import Any

from m3jax.lazy import jax, jnp
from m3jax.methods.fields import scaling
from m3jax.methods.normal_equations import gram_shape, solve
from m3jax.methods.scaled import OfMatrices
from m3jax.methods.spectral import mean, product
from m3jax.methods.step import Numbers, Operands, register, sum_over_models
from m3jax.methods.wudi import span


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Regression(OfMatrices):
    """θ0 + s · (Σ_k λ_k τ_k G_k) (Σ_k G_k)⁻¹ for matrices (out, in)."""

    scaling: Any = scaling()

    def grams(self, x: Operands) -> Any:
        """G_k, (K, in, in); None: the tensor has none."""
        raise NotImplementedError

    def of_matrices(self, tasks: Any, x: Operands, p: Numbers) -> Any:
        grams = self.grams(x)
        if grams is None:
            return mean(tasks)
        wanted = [product(g, task) for g, task in zip(grams, tasks, strict=True)]
        return solve(sum_over_models(grams), sum_over_models(jnp.stack(wanted))).T


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

    beside = ("statistics",)

    def beside_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return gram_shape(shape)

    def grams(self, x: Operands) -> jax.Array | None:
        return x.beside.get("statistics")
