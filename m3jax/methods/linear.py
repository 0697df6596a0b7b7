"""Linear combinations of models or of task vectors."""

from __future__ import annotations

from typing import Any

from m3jax.methods.fields import switch, weights
from m3jax.methods.scaled import Scaled
from m3jax.methods.step import (
    Info,
    Method,
    Numbers,
    Operands,
    register,
    rounded_product,
    sum_over_models,
)


@register("average")
class Average(Method):
    """Weighted mean of the models: Σ λ_i θ_i; without M3, λ_i = 1/K.

        >>> import jax.numpy as jnp, m3jax
        >>> a, b = {"w": jnp.array([0.0, 4.0])}, {"w": jnp.array([2.0, 0.0])}
        >>> recipe = m3jax.Recipe(mixup=m3jax.Mixup(ratios=(0.75, 0.25)))
        >>> m3jax.merge_params(None, [a, b], recipe)["w"].tolist()
        [0.5, 3.0]

    Source: model soups, arXiv 2203.05482; with λ drawn, M3, arXiv 2502.15434. Agrees
    with the authors' `average_merging` and with mergekit's `linear`.
    """

    studies = (
        "plain interpolation, its ratio chosen without labels, beat every "
        "sparsifier on average over pairs of multimodal models (2503.23733)"
    )
    weights: Any = weights(equal=lambda num_models: 1 / num_models, mean=True)
    needs_base = False
    shows_nonfinite = True
    differentiable = True

    def apply(self, x: Operands, p: Numbers, info: Numbers) -> Any:
        return sum_over_models(rounded_product(x.models, p["weights"]))


@register("linear")
class Linear(Method):
    """Σ w_i θ_i / Σ w_i; without `normalize`, Σ w_i θ_i. Without M3, w_i = 1.

        >>> import jax.numpy as jnp, m3jax
        >>> a, b = {"w": jnp.array([0.0, 4.0])}, {"w": jnp.array([2.0, 0.0])}
        >>> method, off = m3jax.Linear(weights=(3.0, 1.0)), m3jax.Mixup(alpha=None)
        >>> recipe = m3jax.Recipe(method=method, mixup=off)
        >>> m3jax.merge_params(None, [a, b], recipe)["w"].tolist()
        [0.5, 3.0]

    Source: agrees with mergekit's `linear`.
    """

    weights: Any = weights()
    normalize: Any = switch(default=True, help="divide by the sum of the weights")
    needs_base = False
    shows_nonfinite = True
    differentiable = True

    def derive(self, numbers: Numbers, info: Info, xp: Any) -> Info:
        total = numbers["weights"].sum(axis=0)
        divisor = xp.where(numbers["normalize"] > 0, total, 1.0)
        return {"coefficients": numbers["weights"] / divisor}

    def apply(self, x: Operands, p: Numbers, info: Numbers) -> Any:
        return sum_over_models(rounded_product(x.models, info["coefficients"]))


@register("task_arithmetic")
class TaskArithmetic(Scaled):
    """Base plus the sum of scaled task vectors: θ0 + s Σ λ_i τ_i; without M3, λ_i = 1.

        >>> import jax.numpy as jnp, m3jax
        >>> base, a, b = ({"w": jnp.array(w)} for w in ([1.0, 1], [2.0, 1], [1.0, 3]))
        >>> method, off = m3jax.TaskArithmetic(scaling=0.5), m3jax.Mixup(alpha=None)
        >>> recipe = m3jax.Recipe(method=method, mixup=off)
        >>> m3jax.merge_params(base, [a, b], recipe)["w"].tolist()
        [1.5, 2.0]

    Source: arXiv 2212.04089; with λ drawn, M3, arXiv 2502.15434. Agrees with the
    authors' `task_arithmetic`, and with mergekit's `task_arithmetic` of weight s.
    """

    studies = (
        "the only method that gained reliably on LLMs (2511.21437, twelve fine-"
        "tunes each of four LLMs, 16 benchmarks); at s = 0.7 among the best of "
        "long-to-short reasoning merges (2503.20641)"
    )
    shows_nonfinite = True
    differentiable = True

    def merged(self, tasks: Any, x: Operands, p: Numbers, info: Numbers) -> Any:
        return sum_over_models(tasks)
