"""RAM+ as mergekit has it: the overlap of a tensor, not of the model."""

from __future__ import annotations

from typing import Any

from m3jax.lazy import jnp
from m3jax.methods.fields import number
from m3jax.methods.ram import averaged, changed, changed_above, count_of, overlaps
from m3jax.methods.step import (
    Info,
    Method,
    Numbers,
    Operands,
    Problem,
    Statistics,
    register,
    rounded_product,
)


@register("ramplus_tl")
class RamPlusTl(Method):
    """RAM with s_k τ_k where k alone has changed an entry.

    s_k = 1 + r · min(shared_k / alone_k, α), counting the entries of the tensor that k
    has changed with others and alone.

    Source: agrees with mergekit's `ramplus_tl`.
    """

    epsilon: Any = changed_above()
    r: Any = number(
        default=0.1, help="how much the overlap amplifies", low=0.0, search=(0.0, 0.5)
    )
    alpha: Any = number(default=0.2, help="α, the overlap that counts at most", low=0.0)
    scope = "tensor"

    def measure(self, problem: Problem) -> Statistics:
        found = yield from overlaps(problem)
        return {"overlap": found}

    def derive(self, numbers: Numbers, info: Info, xp: Any) -> Info:
        overlap = xp.minimum(info["overlap"], numbers["alpha"][None])
        return {"scale": 1 + numbers["r"][None] * overlap}

    def apply(self, x: Operands, p: Numbers, info: Numbers) -> Any:
        own = changed(x.deltas, p["epsilon"])
        boosted = rounded_product(x.deltas, info["scale"])
        tau = jnp.where(count_of(own)[None] == 1, boosted, x.deltas)
        return x.base + averaged(tau, own)
