"""Localize-and-Stitch, data-free: the largest entries of each task vector, averaged."""

from __future__ import annotations

from typing import Any

from m3jax.lazy import jnp
from m3jax.methods.fields import share
from m3jax.methods.orders import magnitudes_at
from m3jax.methods.selection import magnitudes
from m3jax.methods.step import (
    Method,
    Numbers,
    Operands,
    Problem,
    Statistics,
    register,
    sum_over_models,
)


@register("localize_and_stitch")
class LocalizeAndStitch(Method):
    """θ0 + the mean, per entry, of the τ_k whose |τ_k| is among the largest.

    Those are the int(n · share) largest of each task's n entries, at least 1, over the
    whole model, with all that equal the smallest of them; zeros never. Entries that no
    task keeps are the base's. There is no coefficient, so that M3 has nothing to draw.
    The authors take 0.05 for language models, 0.10 for vision.

    Source: arXiv 2408.13656; the data-free form of uiuctml/Localize-and-Stitch. To
    leave zeros out where fewer entries differ from the base is ours.
    """

    share: Any = share(
        default=0.05,
        help="of each task's entries kept, largest first, over the whole model",
        search=(0.01, 0.2),
    )
    scope = "model"

    def measure(self, problem: Problem) -> Statistics:
        share = problem.numbers["share"]
        rank = problem.size - max(int(problem.size * share), 1) + 1
        ranks = [rank] * problem.num_models
        found = yield from magnitudes_at(_tasks, {}, ranks, problem)
        return {"thresholds": found}

    def apply(self, x: Operands, p: Numbers, info: Numbers) -> Any:
        tasks = x.deltas
        size = magnitudes(tasks)
        kept = (size >= info["thresholds"].astype(jnp.float32)) & (size > 0)
        zero, one = jnp.zeros((), tasks.dtype), jnp.ones((), tasks.dtype)
        count = sum_over_models(jnp.where(kept, one, zero))
        total = sum_over_models(jnp.where(kept, tasks, zero))
        return x.base + total / jnp.maximum(count, one)


def _tasks(x: Operands, arguments: Numbers) -> Any:
    return x.deltas
