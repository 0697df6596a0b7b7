"""mergekit's family of task-vector methods: a weighted sum, with or without a vote."""

from __future__ import annotations

from typing import Any

from m3jax.lazy import jnp
from m3jax.methods.fields import choice, number, switch, weights
from m3jax.methods.step import (
    Method,
    Numbers,
    Operands,
    register,
    rounded_product,
    sum_over_models,
)

_NO_WEIGHT = 1e-8


@register("generalized_task_arithmetic")
class GeneralizedTaskArithmetic(Method):
    """θ0 + s Σ_S w_i τ_i, or with `normalize` θ0 + s Σ_S w_i τ_i / Σ_S w_i.

    Without `vote` S are all models; with it those whose w_i τ_i has the sign of their
    sum, or + where that is 0. A sum of weights below 1e-8 does not divide.

    What precedes it makes mergekit's methods of it:

    | mergekit            | `sparsify` by | `rescale` | `vote` | `normalize` |
    |---------------------|---------------|-----------|--------|-------------|
    | task_arithmetic     | –             | –         | no     | no          |
    | ties                | magnitude     | none      | yes    | yes         |
    | dare_linear         | random        | l1        | no     | no          |
    | dare_ties           | random        | l1        | yes    | no          |
    | breadcrumbs         | outliers      | none      | no     | no          |
    | breadcrumbs_ties    | outliers      | none      | yes    | no          |
    | della_linear        | rank          | l1        | no     | no          |
    | della               | rank          | l1        | yes    | yes         |

    Source: agrees with mergekit's methods of these names. `ties` and
    `task_arithmetic` are the papers'.
    """

    weights: Any = weights(equal=lambda num_models: 1.0)
    scaling: Any = number(
        default=1.0, help="s, multiplies the merged task vector", search=(0.5, 1.5)
    )
    normalize: Any = switch(
        default=False, help="divide by the sum of the weights that take part"
    )
    vote: Any = choice(
        default=False, help="leave out the models that disagree with the sum's sign"
    )

    def apply(self, x: Operands, p: Numbers, info: Numbers) -> Any:
        weighed = rounded_product(x.deltas, p["weights"])
        weight = jnp.broadcast_to(p["weights"], weighed.shape)
        if self.vote:
            positive = (sum_over_models(weighed) >= 0)[None]
            agrees = jnp.where(positive, weighed > 0, weighed < 0)
            weighed = jnp.where(agrees, weighed, 0 * weighed)
            weight = jnp.where(agrees, weight, 0 * weight)
        total = sum_over_models(weight)
        divides = (p["normalize"] > 0) & (jnp.abs(total) >= _NO_WEIGHT)
        divisor = jnp.where(divides, total, jnp.ones_like(total))
        merged = sum_over_models(weighed) / divisor
        return x.base + rounded_product(merged, p["scaling"])
