"""MagMax: the largest change of each entry wins."""

from __future__ import annotations

import functools
from typing import Any

from m3jax.lazy import jnp
from m3jax.methods.fields import number, weights
from m3jax.methods.step import Method, Numbers, Operands, register, rounded_product


@register("magmax")
class Magmax(Method):
    """θ0 + s · the λ_k τ_k of largest magnitude, per entry.

    Of equal magnitudes the later model's counts. Without M3 all λ_k are 1. The authors
    take s = 0.5.

        >>> import jax.numpy as jnp, m3jax
        >>> base, a, b = ({"w": jnp.array(w)} for w in ([1.0, 1], [5.0, 2], [-1.0, -2]))
        >>> recipe = m3jax.Recipe(method="magmax", mixup=m3jax.Mixup(alpha=None))
        >>> m3jax.merge_params(base, [a, b], recipe)["w"].tolist()
        [5.0, -2.0]

    Source: arXiv 2407.06322; agrees with fusion-bench 0.2.33.
    """

    weights: Any = weights(equal=lambda num_models: 1.0)
    scaling: Any = number(
        default=1.0, help="s, multiplies the merged task vector", search=(0.3, 1.0)
    )

    def apply(self, x: Operands, p: Numbers, info: Numbers) -> Any:
        tasks = rounded_product(x.deltas, p["weights"])
        largest = functools.reduce(
            lambda a, b: jnp.where(jnp.abs(b) >= jnp.abs(a), b, a), tasks
        )
        return x.base + rounded_product(largest, p["scaling"])
