"""Balanced TSV: TSV-M with ranks by the spectrum, of tasks that weigh alike; ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from m3jax.lazy import jax, jnp
from m3jax.methods import ranks
from m3jax.methods.fields import number
from m3jax.methods.scaled import OfMatrices
from m3jax.methods.step import (
    Numbers,
    Operands,
    register,
    rounded_product,
    sum_over_models,
)
from m3jax.methods.tsv_m import combined


@register("balanced_tsv")
class BalancedTsv(OfMatrices):
    """TSV-M of w_k λ_k τ_k, tensor by tensor, with as many triples as weigh in each.

    w_k = mean_j ρ_j / ρ_k, ρ_k the root mean square of those entries of λ_k τ_k that
    are at most `outliers` times that of all: a few large entries do not make a task
    look strong, and no task drowns another. A task that is 0 in a tensor has no part
    in the mean. Ranks by the rule `rank`, the participation ratio unless said. Tensors
    that are no matrices get θ0 + s · mean λ_k τ_k. Without M3 all λ_k are 1.

    Source: ours, rules and defaults. Others name outlier-aware weights and ranks that
    follow the sparsity (arXiv 2502.06876), whose formulas are not public; this is not
    theirs.
    """

    studies = (
        "on the demo's models above TSV-M with its own ranks, below the average "
        "(docs/METHODS.md)"
    )
    outliers: Any = number(
        default=3.0,
        help="root mean squares of a task vector from which on an entry is an outlier",
        low=0.0,
        search=(2.0, 6.0),
    )
    rank: Any = ranks.rule(default="participation")
    energy: Any = ranks.energy_kept()

    def of_matrices(self, tasks: Any, x: Operands, p: Numbers) -> Any:
        factors = balance(tasks, p["outliers"].reshape(()))
        pairs = zip(tasks, factors, strict=True)
        balanced = [rounded_product(task, factor) for task, factor in pairs]
        return combined(balanced, self.rank, p["energy"].reshape(()))


def balance(tasks: Sequence[jax.Array], outliers: jax.Array) -> jax.Array:
    """w, (K,), of task vectors (m, n)."""
    one = jnp.ones((), tasks[0].dtype)
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(task)) for task in tasks]))
    scale = jnp.where(largest > 0, largest, one)  # squares cannot underflow
    size = jnp.stack([_size(task / scale, outliers) for task in tasks])
    there = size > 0
    parts = jnp.maximum(sum_over_models(there.astype(size.dtype)), one)
    average = sum_over_models(size) / parts
    return jnp.where(there, average / jnp.where(there, size, one), one)


def _size(task: jax.Array, outliers: jax.Array) -> jax.Array:
    """ρ: the root mean square of what is no outlier."""
    square = task * task
    inside = jnp.abs(task) <= outliers * jnp.sqrt(jnp.mean(square))
    count = jnp.sum(inside.astype(task.dtype))
    total = jnp.sum(jnp.where(inside, square, jnp.zeros((), task.dtype)))
    return jnp.sqrt(total / jnp.maximum(count, jnp.ones((), task.dtype)))
