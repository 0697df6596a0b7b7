"""RAM and RAM+: average the tasks that change an entry, not those that leave it."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np

from m3jax.lazy import jnp
from m3jax.methods.fields import number
from m3jax.methods.scaled import Scaled
from m3jax.methods.step import (
    Info,
    Numbers,
    Operands,
    Problem,
    Reduction,
    Statistics,
    register,
    rounded_product,
    sum_over_models,
)


def changed_above() -> Any:
    """ε, a field."""
    return number(
        default=1e-5, help="ε, |τ_k| above which task k changes an entry", low=0.0
    )


@register("ram")
class Ram(Scaled):
    """θ0 + s · Σ λ_k τ_k c_k / max(1, Σ c_k) with c_k = 1[|τ_k| > ε].

    Without M3 all λ_k are 1.

    Source: RAM of xiangchi-yuan/mrl. Agrees with mergekit's `ram`.
    """

    epsilon: Any = changed_above()

    def merged(self, tasks: Any, x: Operands, p: Numbers, info: Numbers) -> Any:
        return averaged(tasks, changed(x.deltas, p["epsilon"]))


@register("ram_plus")
class RamPlus(Scaled):
    """RAM, where entries that task k alone changes count s_k times.

    s_k = 1 + (r − 1) · min(1, overlap_k / unique_k), r `boost`: of the entries that
    task k changes, unique_k are changed by it alone, overlap_k by others too, in the
    whole model, exact. Nothing unique: s_k = 1. Without M3 all λ_k are 1.

    Source: RAM+ of xiangchi-yuan/mrl. mergekit's `ramplus_tl` counts per tensor.
    """

    epsilon: Any = changed_above()
    boost: Any = number(
        default=1.2,
        help="r, at most so much do unique entries count",
        low=0.0,
        search=(1.0, 1.5),
    )
    scope = "model"

    def measure(self, problem: Problem) -> Statistics:
        found = yield from overlaps(problem)
        return {"shares": (jnp if problem.traced else np).minimum(1.0, found)}

    def derive(self, numbers: Numbers, info: Info, xp: Any) -> Info:
        return {"boosts": 1 + (numbers["boost"] - 1)[None] * info["shares"]}

    def merged(self, tasks: Any, x: Operands, p: Numbers, info: Numbers) -> Any:
        own = changed(x.deltas, p["epsilon"])
        boosted = rounded_product(tasks, info["boosts"])
        return averaged(jnp.where(count_of(own)[None] == 1, boosted, tasks), own)


def changed(tasks: Any, epsilon: Any) -> Any:
    """c_k, (K, ...) bool."""
    return jnp.abs(tasks) > epsilon[None].astype(tasks.dtype)


def count_of(changed: Any) -> Any:
    return sum_over_models(changed.astype(jnp.int32))


def averaged(tasks: Any, changed: Any) -> Any:
    total = sum_over_models(jnp.where(changed, tasks, jnp.zeros((), tasks.dtype)))
    count = jnp.maximum(count_of(changed), jnp.int32(1)).astype(tasks.dtype)
    return total / count


def overlaps(problem: Problem) -> Generator[Reduction, Any, Any]:
    """Entries that task k changes with others, by those that it changes alone, (K,)."""
    arguments = {"epsilon": problem.numbers["epsilon"]}
    alone, shared = yield Reduction(_counts, arguments, ("sum", "sum"))
    xp = jnp if problem.traced else np
    return xp.where(alone > 0, shared / xp.maximum(alone, 1), 0.0)


def _counts(x: Operands, arguments: Numbers) -> tuple[Any, Any]:
    own = changed(x.deltas, arguments["epsilon"])
    alone = count_of(own)[None] == 1
    return (own & alone).astype(jnp.int32), (own & ~alone).astype(jnp.int32)
