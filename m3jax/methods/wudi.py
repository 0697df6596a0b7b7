"""WUDI: gradient descent to the task vector that disturbs every task least."""

from __future__ import annotations

import math
from typing import Any

from m3jax.lazy import jax, jnp
from m3jax.methods.fields import number, scaling
from m3jax.methods.scaled import OfMatrices
from m3jax.methods.spectral import product
from m3jax.methods.step import (
    Numbers,
    Operands,
    register,
    rounded_product,
    sum_over_models,
)

_B1, _B2, _EPSILON = 0.9, 0.999, 1e-8


@register("wudi")
class Wudi(OfMatrices):
    """θ0 + s X: Adam on Σ_k ‖(X − λ_k τ_k) τ_kᵀ‖² / ‖τ_k‖², for matrices.

    X starts at Σ λ_k τ_k; `steps` of Adam with b1 0.9, b2 0.999, eps 1e-8. A task
    whose τ_k is 0 is left out (the reference gives NaN). Tensors that are no matrices
    get θ0 + s · mean λ_k τ_k. Without M3 all λ_k are 1.

    The gradient 2 Σ_k (X − λ_k τ_k) C_k, C_k = τ_kᵀ τ_k / ‖τ_k‖², is kept as
    2 (Y C + G) with Y = X − Σ λ_k τ_k, C = Σ C_k and G = Σ_k (Σ_{j≠k} λ_j τ_j) C_k: one
    product of matrices a step, and nothing large cancels. C is (n, n) for a matrix
    (m, n). The number of steps is no constant of the program, so that derivatives go
    forward through it alone (`jax.jvp`, not `jax.grad`).

    Source: arXiv 2503.08099; agrees with fusion-bench 0.2.33.
    """

    scaling: Any = scaling()
    steps: Any = number(
        default=300.0, help="steps of Adam", low=0.0, high=1e6, integer=True
    )
    learning_rate: Any = number(
        default=1e-5, help="of Adam", low=0.0, search=(1e-6, 1e-4)
    )

    def of_matrices(self, tasks: Any, x: Operands, p: Numbers) -> Any:
        total = sum_over_models(tasks)
        spans = jnp.stack([span(task) for task in tasks])
        others = zip([total - task for task in tasks], spans, strict=True)
        start = sum_over_models(jnp.stack([product(*pair) for pair in others]))
        steps = p["steps"].reshape(()).astype(jnp.int32)
        return total + _adam(start, sum_over_models(spans), steps, p["learning_rate"])


def span(task: jax.Array) -> jax.Array:
    """C_k = τ_kᵀ τ_k / ‖τ_k‖², which no factor of τ_k changes; 0 where τ_k is 0."""
    largest = jnp.max(jnp.abs(task), initial=0.0)
    one = jnp.ones((), task.dtype)
    task = task / jnp.where(largest > 0, largest, one)  # its squares cannot underflow
    gram = product(task.T, task.T)
    norm = jnp.trace(gram)
    return gram / jnp.where(norm > 0, norm, one)


def _adam(start: jax.Array, spans: jax.Array, steps: jax.Array, rate: Any) -> jax.Array:
    """Y after some steps of Adam from 0 on the gradient 2 (Y C + G)."""

    def average(before: jax.Array, new: jax.Array, share: float) -> jax.Array:
        old = rounded_product(before, jnp.asarray(share, before.dtype))
        return old + rounded_product(new, jnp.asarray(1 - share, before.dtype))

    def step(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        y, first, second = state
        gradient = 2 * (product(y, spans) + start)  # C is symmetric
        first = average(first, gradient, _B1)
        second = average(second, gradient * gradient, _B2)
        time = (i + 1).astype(start.dtype)
        # 1 − b^t of float32 would have few digits left.
        mean = first / -jnp.expm1(time * math.log(_B1))
        spread = second / -jnp.expm1(time * math.log(_B2))
        change = mean / (jnp.sqrt(spread) + _EPSILON)
        return y - rounded_product(change, rate), first, second

    zeros = jnp.zeros_like(start)
    return jax.lax.fori_loop(0, steps, step, (zeros, zeros, zeros))[0]
