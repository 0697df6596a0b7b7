"""Consensus merging: keep what enough tasks need, drop what only one does."""

from __future__ import annotations

from typing import Any

from m3jax.lazy import jax, jnp
from m3jax.methods.fields import number, scaling
from m3jax.methods.scaled import Scaled
from m3jax.methods.step import Numbers, Operands, register, sum_over_models


@register("consensus")
class Consensus(Scaled):
    """θ0 + s · Σ λ_k τ_k where at least `min_models` of the tasks need the entry.

    Task k needs it where |λ_k τ_k| > μ_k |Σ_j λ_j τ_j − λ_k τ_k|: its TALL mask.
    `min_models` 0 is task arithmetic, more than K gives θ0. Without M3 all λ_k are 1.
    The authors choose each μ_k from 0.2 to 0.6 on validation data.

    Source: arXiv 2405.07813; agrees with nik-dim/tall_masks.
    """

    scaling: Any = scaling(search=(0.2, 1.0))
    mask_scale: Any = number(
        default=0.4,
        help="μ, how much a task's entry has to weigh against the others', one number "
        "or one per model",
        low=0.0,
        per_model=True,
        search=(0.2, 0.6),
    )
    min_models: Any = number(
        default=2.0, help="tasks that have to need an entry", low=0.0, integer=True
    )

    def merged(self, tasks: Any, x: Operands, p: Numbers, info: Numbers) -> Any:
        votes = sum_over_models(masks(tasks, p["mask_scale"]).astype(tasks.dtype))
        zero = jnp.zeros((), tasks.dtype)
        return jnp.where(votes >= p["min_models"], sum_over_models(tasks), zero)


def masks(tasks: jax.Array, mask_scale: Any) -> jax.Array:
    """The TALL masks, (K, ...) bool, of task vectors (K, ...); μ broadcasts."""
    others = sum_over_models(tasks)[None] - tasks
    return jnp.abs(tasks) > mask_scale * jnp.abs(others)
