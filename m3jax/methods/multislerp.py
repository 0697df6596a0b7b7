"""MultiSlerp: the weighted mean direction of any number of models on a sphere."""

from __future__ import annotations

from typing import Any

from m3jax.methods.fields import choice, share, switch, weights
from m3jax.methods.geometry import NOTHING, FromGram
from m3jax.methods.step import Numbers, register


@register("multislerp")
class MultiSlerp(FromGram):
    """‖v‖ · m / ‖m‖ with m = Σ w_i v_i / (‖v_i‖ + ε) and ‖v‖ = Σ w_i ‖v_i‖.

    The v_i are the models, or their task vectors, added to θ0; the w_i are divided by
    their sum (`normalize`). Directions that cancel out give 0. A model alone stays as
    it is, whatever its weight.

    Source: agrees with mergekit's `multislerp`: its step in the tangent space at m is
    one of length ε, across, so that the result is shorter by cos ε.
    """

    weights: Any = weights()
    normalize: Any = switch(default=True, help="divide the weights by their sum")
    eps: Any = share(default=1e-8, help="ε, added to every norm")
    task_vectors: Any = choice(
        default=False, help="combine the task vectors instead of the models"
    )

    def coefficients(self, numbers: Numbers, products: Any, xp: Any) -> Any:
        weight, eps = numbers["weights"], numbers["eps"]
        count = len(weight)
        if count == 1:
            return xp.ones_like(weight)
        divisor = xp.where(numbers["normalize"] > 0, weight.sum(axis=0), 1.0)
        weight = weight / divisor
        norms = xp.sqrt(xp.stack([products[i, i] for i in range(count)]))
        below = norms + eps
        shares = weight / xp.where(below > 0, below, 1.0)
        squared = xp.einsum("in,ijn,jn->n", shares, products, shares)
        nothing = ~(squared > NOTHING * xp.abs(weight).sum(axis=0) ** 2)
        length = xp.sqrt(xp.where(nothing, 1.0, squared))
        length = (weight * norms).sum(axis=0) * xp.cos(eps) / length
        return shares * xp.where(nothing, 0.0, length)
