"""RAM: averages what several models have changed, keeps what one has changed."""

from __future__ import annotations

from typing import Any

import numpy as np

from m3jax.lazy import jnp
from m3jax.methods.fields import number
from m3jax.methods.step import (
    Info,
    Method,
    Numbers,
    Operands,
    Problem,
    Reduction,
    Statistics,
    register,
    rounded_product,
    sum_over_models,
)


def _epsilon() -> Any:
    return number(1e-5, "ε, an entry with |τ| > ε is changed", low=0.0)


@register("ram")
class Ram(Method):
    """θ0 + Σ c_i τ_i / max(Σ c_i, 1) with c_i = 1[|τ_i| > ε].

    Source: agrees with mergekit's `ram`.
    """

    epsilon: Any = _epsilon()

    def apply(self, x: Operands, p: Numbers, info: Numbers) -> Any:
        changed = _changed(x, p["epsilon"])
        return x.base + _mean(jnp.where(changed, x.deltas, 0 * x.deltas), changed)


@register("ramplus_tl")
class RamPlusTl(Method):
    """RAM with s_i τ_i where i alone has changed an entry.

    s_i = 1 + r · min(shared_i / alone_i, α), counting the entries of the tensor that i
    has changed with others and alone.

    Source: agrees with mergekit's `ramplus_tl`.
    """

    epsilon: Any = _epsilon()
    r: Any = number(0.1, "how much the overlap amplifies", low=0.0, search=(0.0, 0.5))
    alpha: Any = number(0.2, "α, the overlap that counts, at most", low=0.0)
    scope = "tensor"

    def measure(self, problem: Problem) -> Statistics:
        epsilon = problem.numbers["epsilon"]
        alone, shared = yield Reduction(_counts, {"epsilon": epsilon}, ("sum", "sum"))
        xp = jnp if problem.traced else np
        return {"overlap": xp.where(alone > 0, shared / xp.maximum(alone, 1), 0.0)}

    def derive(self, numbers: Numbers, info: Info, xp: Any) -> Info:
        overlap = xp.minimum(info["overlap"], numbers["alpha"])
        return {"scale": 1 + numbers["r"] * overlap}

    def apply(self, x: Operands, p: Numbers, info: Numbers) -> Any:
        changed = _changed(x, p["epsilon"])
        alone = (_number(changed) == 1)[None]
        tau = jnp.where(alone, rounded_product(x.deltas, info["scale"]), x.deltas)
        return x.base + _mean(jnp.where(changed, tau, 0 * tau), changed)


def _changed(x: Operands, epsilon: Any) -> Any:
    return jnp.abs(x.deltas) > epsilon.astype(x.models.dtype)[None]


def _number(changed: Any) -> Any:
    return sum_over_models(changed.astype(jnp.int32))


def _counts(x: Operands, arguments: Numbers) -> tuple[Any, Any]:
    changed = _changed(x, arguments["epsilon"])
    alone = (_number(changed) == 1)[None]
    both = changed & alone, changed & ~alone
    return both[0].astype(jnp.int32), both[1].astype(jnp.int32)


def _mean(tau: Any, changed: Any) -> Any:
    return sum_over_models(tau) / jnp.maximum(_number(changed), 1).astype(tau.dtype)
