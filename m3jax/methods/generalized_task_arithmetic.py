"""mergekit's family of task-vector methods: a weighted sum, with or without a vote."""

from __future__ import annotations

from typing import Any

from m3jax.lazy import jnp
from m3jax.methods.fields import choice, switch
from m3jax.methods.scaled import Scaled
from m3jax.methods.step import Numbers, Operands, register, sum_over_models

_NO_WEIGHT = 1e-8


@register("generalized_task_arithmetic")
class GeneralizedTaskArithmetic(Scaled):
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

    normalize: Any = switch(
        default=False, help="divide by the sum of the weights that take part"
    )
    vote: Any = choice(
        default=False, help="leave out the models that disagree with the sum's sign"
    )

    def merged(self, tasks: Any, x: Operands, p: Numbers, info: Numbers) -> Any:
        weight = jnp.broadcast_to(p["weights"], tasks.shape)
        if self.vote:
            positive = (sum_over_models(tasks) >= 0)[None]
            agrees = jnp.where(positive, tasks > 0, tasks < 0)
            tasks = jnp.where(agrees, tasks, 0 * tasks)
            weight = jnp.where(agrees, weight, 0 * weight)
        total = sum_over_models(weight)
        divides = (p["normalize"] > 0) & (jnp.abs(total) >= _NO_WEIGHT)
        return sum_over_models(tasks) / jnp.where(divides, total, jnp.ones_like(total))
