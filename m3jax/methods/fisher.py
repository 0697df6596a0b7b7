"""Fisher merging: each weight by how much each model's predictions depend on it."""

from __future__ import annotations

from typing import Any

import numpy as np

from m3jax.lazy import jnp
from m3jax.methods.fields import choice, number, weights
from m3jax.methods.step import (
    Info,
    Method,
    Numbers,
    Operands,
    Problem,
    Statistics,
    register,
    rounded_product,
    sum_over_models,
)
from m3jax.methods.sums import exact_sums


@register("fisher")
class Fisher(Method):
    """Σ c_k F_k θ_k / Σ c_k F_k, F_k the diagonal Fisher information of model k.

    `floor_rule` ``add``: F_k + floor everywhere, c_k = λ_k / (‖F_k‖ + floor), the L2
    norm being that of the whole model without the floor. ``first_max``:
    max(F_0, floor) for the first model alone, c_k = λ_k / ‖F_k‖. `normalize` ``none``
    has c_k = λ_k. Without M3 λ_k = 1/K.

    Where all F_k are 0 and in tensors that have none the result is
    Σ λ_k θ_k / Σ λ_k; with ``first_max`` and F_k = 0, θ_0. F_k = 0 in the whole model
    is not divided by its norm, which is ours.

    Beside the models: `statistics`, F_k, of the tensors' shapes.

        >>> import jax.numpy as jnp, m3jax
        >>> a, b = ({"w": jnp.array(w)} for w in ([4.0, 0], [0.0, 2]))
        >>> fa, fb = ({"w": jnp.array(w)} for w in ([3.0, 1], [1.0, 1]))
        >>> method = m3jax.Fisher(normalize="none", floor=0.0)
        >>> recipe = m3jax.Recipe(method=method, mixup=m3jax.Mixup(alpha=None))
        >>> m3jax.merge_params(None, [a, b], recipe, statistics=[fa, fb])["w"].tolist()
        [3.0, 1.0]

    Source: arXiv 2111.09832. ``add`` agrees with MergeLM and fusion-bench 0.2.33,
    ``first_max`` with the authors' code.
    """

    studies = (
        "on the demo's models it loses to the average, whatever the kind of "
        "Fisher information (docs/MEASURE.md)"
    )
    weights: Any = weights(equal=lambda num_models: 1 / num_models, low=0.0)
    normalize: Any = choice(
        default="l2",
        help="divide F by its norm over the whole model",
        options=("l2", "none"),
    )
    floor: Any = number(default=1e-6, help="what F is at least", low=0.0)
    floor_rule: Any = choice(
        default="add",
        help="add the floor everywhere, or bound F of the first model by it",
        options=("add", "first_max"),
    )
    needs_base = False
    beside = ("statistics",)

    @property
    def scope(self) -> str:
        return "model" if self.normalize == "l2" else ""

    def measure(self, problem: Problem) -> Statistics:
        squares = yield from exact_sums(_squares, problem)
        return {"norms": (jnp if problem.traced else np).sqrt(squares)}

    def derive(self, numbers: Numbers, info: Info, xp: Any) -> Info:
        norms = info.get("norms", 1.0)
        if self.normalize == "l2" and self.floor_rule == "add":
            norms = norms + numbers["floor"][None]
        return {"shares": numbers["weights"] / xp.where(norms > 0, norms, 1.0)}

    def apply(self, x: Operands, p: Numbers, info: Numbers) -> Any:
        mean = _mean(x.models, jnp.broadcast_to(p["weights"], x.models.shape))
        fisher = x.beside.get("statistics")
        if fisher is None:
            return mean
        if self.floor_rule == "add":
            fisher = fisher + p["floor"][None]
        else:
            first = jnp.maximum(fisher[:1], p["floor"][None])
            fisher = jnp.concatenate([first, fisher[1:]])
            mean = x.models[0]
        shares = rounded_product(fisher, info["shares"])
        return jnp.where(sum_over_models(shares) > 0, _mean(x.models, shares), mean)


def _mean(models: Any, shares: Any) -> Any:
    total = sum_over_models(shares)
    above = sum_over_models(rounded_product(models, shares))
    return above / jnp.where(total > 0, total, jnp.ones((), total.dtype))


def _squares(x: Operands) -> Any:
    fisher = x.beside.get("statistics")
    if fisher is None:  # zeros that lie as the models do
        zero = jnp.zeros((), x.models.dtype)
        return jnp.where(jnp.isfinite(x.models), zero, zero)
    return fisher * fisher
