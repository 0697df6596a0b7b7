"""MagMax: the largest change of each entry wins."""

from __future__ import annotations

import functools
from typing import Any

from m3jax.lazy import jnp
from m3jax.methods.fields import scaling
from m3jax.methods.scaled import Scaled
from m3jax.methods.step import Numbers, Operands, register


@register("magmax")
class Magmax(Scaled):
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

    scaling: Any = scaling(search=(0.3, 1.0))

    def merged(self, tasks: Any, x: Operands, p: Numbers, info: Numbers) -> Any:
        return functools.reduce(
            lambda a, b: jnp.where(jnp.abs(b) >= jnp.abs(a), b, a), tasks
        )
