"""DF-Merge: scaled task vectors, weighed by the Fisher information where they lead."""

from __future__ import annotations

from typing import Any

from m3jax.lazy import jnp
from m3jax.methods.fields import number
from m3jax.methods.step import (
    Method,
    Numbers,
    Operands,
    register,
    rounded_product,
    sum_over_models,
)


@register("df_merge")
class DfMerge(Method):
    """θ0 + K Σ F_k λ_k τ_k / Σ F_k.

    F_k is the Fisher information at θ0 + λ_k τ_k on task k's data, plus `floor`. λ are
    `coefficients`, which have to be given: they are what is searched for, so M3 cannot
    draw them. A task of λ_k = 0 still weighs in the denominator. A constant F, and
    tensors that have none, give θ0 + Σ λ_k τ_k; λ_k = 1/K is Fisher merging.

    Beside the models: `statistics`, F_k, of the tensors' shapes.

    Source: arXiv 2504.18992; agrees with sanwooo/df-merge.
    """

    coefficients: Any = number(
        default=None,
        help="λ, one number or one per model",
        per_model=True,
        search=(0.0, 1.0),
    )
    floor: Any = number(default=1e-12, help="is added to F", low=0.0)
    beside = ("statistics",)

    def apply(self, x: Operands, p: Numbers, info: Numbers) -> Any:
        tasks = rounded_product(x.deltas, p["coefficients"])
        fisher = x.beside.get("statistics")
        if fisher is None:
            return x.base + sum_over_models(tasks)
        fisher = fisher + p["floor"][None]
        # F is scaled to at most 1: products of its 1e-30 with a task vector underflow.
        largest = jnp.max(fisher, axis=0)
        known = largest > 0
        fisher = jnp.where(
            known[None],
            fisher / jnp.where(known, largest, jnp.ones((), fisher.dtype))[None],
            jnp.ones((), fisher.dtype),
        )
        above = sum_over_models(rounded_product(tasks, fisher))
        count = jnp.asarray(fisher.shape[0], fisher.dtype)
        share = count / sum_over_models(fisher)
        return x.base + rounded_product(above, share)
