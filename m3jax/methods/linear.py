"""Average and task arithmetic: linear combinations of models or of task vectors."""

from __future__ import annotations

import jax

from m3jax.methods.method import Info, Method, rounded_product, sum_over_models


def average(
    base: jax.Array | None,
    stack: jax.Array,
    coefficients: jax.Array,
    info: Info,
    scaling: jax.Array,
) -> jax.Array:
    """Weighted mean of the models: Σ λ_i θ_i; without M3, λ_i = 1/K.

    Source: model soups, arXiv 2203.05482; with λ drawn, M3, arXiv 2502.15434. Agrees
    with the authors' `average_merging` and with mergekit's `linear`.

    Args:
      base: not used.
      stack: (K, ...) float32.
      coefficients: λ, (K, ...) float32, broadcasts against the stack.
      info: not used.
      scaling: not used: the average has no task vector to scale.

    Returns:
      The merged tensor, float32.
    """
    del base, info, scaling
    return sum_over_models(rounded_product(stack, coefficients))


def task_arithmetic(
    base: jax.Array,
    stack: jax.Array,
    coefficients: jax.Array,
    info: Info,
    scaling: jax.Array,
) -> jax.Array:
    """Base plus the sum of scaled task vectors: θ0 + s Σ λ_i τ_i; without M3, λ_i = 1.

    Source: arXiv 2212.04089; with λ drawn, M3, arXiv 2502.15434. Agrees with the
    authors' `task_arithmetic`, and with mergekit's `task_arithmetic` of weight s.

    Args:
      base: θ0, float32.
      stack: θ_i, (K, ...) float32.
      coefficients: λ, (K, ...) float32, broadcasts against the stack.
      info: not used.
      scaling: s, a float32 scalar.

    Returns:
      The merged tensor, float32.
    """
    del info
    total = sum_over_models(rounded_product(stack - base[None], coefficients))
    return base + rounded_product(total, scaling)


AVERAGE = Method(
    apply=average,
    default_coefficient=lambda num_models: 1 / num_models,
    needs_base=False,
    shows_nonfinite=True,
)
TASK_ARITHMETIC = Method(
    apply=task_arithmetic,
    default_coefficient=lambda num_models: 1.0,
    needs_base=True,
    shows_nonfinite=True,
)
