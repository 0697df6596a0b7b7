"""NearSwap: takes the other model's weights where they are near the base's."""

from __future__ import annotations

from typing import Any

from m3jax.lazy import jnp
from m3jax.methods.fields import number
from m3jax.methods.step import Method, Numbers, Operands, register, rounded_product


@register("nearswap")
class NearSwap(Method):
    """θ0 + min(t / |τ|, 1) τ: each entry moves by at most t, towards one model.

        >>> import jax.numpy as jnp, m3jax
        >>> base, a = {"w": jnp.array([0.0, 0.0])}, {"w": jnp.array([4.0, 0.25])}
        >>> method, off = m3jax.NearSwap(t=0.5), m3jax.Mixup(alpha=None)
        >>> recipe = m3jax.Recipe(method=method, mixup=off)
        >>> m3jax.merge_params(base, [a], recipe)["w"].tolist()
        [0.5, 0.25]

    Source: agrees with mergekit's `nearswap`.
    """

    t: Any = number(
        default=1e-3,
        help="the farthest that an entry moves",
        low=0.0,
        search=(1e-4, 1e-2),
    )
    num_models = 1

    def apply(self, x: Operands, p: Numbers, info: Numbers) -> Any:
        (tau,) = x.deltas
        far = jnp.abs(tau) > p["t"]
        share = p["t"] / jnp.where(far, jnp.abs(tau), 1.0)
        return x.base + jnp.where(far, rounded_product(tau, share), tau)
