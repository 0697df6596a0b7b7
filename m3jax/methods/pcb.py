"""PCB-Merging: parameters weigh by their size and their accord with other tasks."""

from __future__ import annotations

from typing import Any

import numpy as np

from m3jax.lazy import jax, jnp
from m3jax.methods.fields import number, scaling, share
from m3jax.methods.orders import halves, magnitudes_at, signed
from m3jax.methods.scaled import Scaled
from m3jax.methods.step import (
    Numbers,
    Operands,
    Problem,
    Statistics,
    register,
    rounded_product,
    sum_over_models,
)


@register("pcb")
class Pcb(Scaled):
    """θ0 + s · Σ sign(x_k) y_k w_k / max(Σ w_k, 1e-12) with x_k = λ_k τ_k.

    y_k is |x_k| clipped to its sorted values number int(n b) and int(n (1 − b) − 1),
    counted from 0, b `clip`. β_k = exp(K N(y_k)²) · tanh(x_k Σ x_j), and
    w_k = N(max(β_k, t_k)) with t_k the sorted β_k's number int(n (1 − r)), r `ratio`.
    N(v) = (v − min) / (max − min). Sorted and extreme values are those of the whole
    model, exact in float32; where they are all the same w_k = 0, which is ours (the
    reference has 0/0).

    Without M3 all λ_k are 1; the authors take s = 1.2 and search λ_k in [0.8, 1.3].
    λ_k have to be the same in all tensors.

    Source: arXiv 2410.02396; agrees with `PCB_merge` of duguodong7/pcb-merging.
    """

    scaling: Any = scaling(search=(0.5, 2.0))
    ratio: Any = share(
        default=0.1,
        help="r, share of each task's parameters that weigh anything",
        search=(0.05, 0.4),
    )
    clip: Any = number(
        default=1e-4,
        help="b, share of the magnitudes cut at either end",
        low=0.0,
        high=0.5,
    )
    scope = "model"
    weighs_statistics = True

    def measure(self, problem: Problem) -> Statistics:
        ratio, clip, factors = (
            problem.numbers["ratio"],
            problem.numbers["clip"],
            problem.numbers["weights"],
        )
        n, count = problem.size, problem.num_models
        ends = np.array([int(n * clip), int(n * (1 - clip) - 1)]).clip(0, n - 1)
        ranks = np.repeat(ends + 1, count)
        found = yield from magnitudes_at(_twice, {"weights": factors}, ranks, problem)
        bounds = {"smallest": found[:count], "largest": found[count:]}
        first = min(int(n * (1 - ratio)), n - 1) + 1
        ranks = np.repeat([first, n, n - first + 1, 1], count)
        arguments = {"weights": factors, **bounds}
        found = yield from magnitudes_at(_balances, arguments, ranks, problem)
        balances = signed(found)
        return {**bounds, "least": balances[:count], "most": balances[count:]}

    def apply(self, x: Operands, p: Numbers, info: Numbers) -> Any:
        tasks = _tasks(x, p["weights"])
        info = {name: own.astype(tasks.dtype) for name, own in info.items()}
        balance = jnp.maximum(_balance(tasks, info), info["least"])
        weight = _normalized(balance, info["least"], info["most"])
        size = jnp.clip(jnp.abs(tasks), info["smallest"], info["largest"])
        above = sum_over_models(rounded_product(jnp.sign(tasks) * size, weight))
        below = jnp.maximum(sum_over_models(weight), jnp.asarray(1e-12, tasks.dtype))
        merged = (above / below).astype(x.base.dtype)
        return x.base + rounded_product(merged, p["scaling"])


def _tasks(x: Operands, weights: Any) -> jax.Array:
    """λ_k τ_k in float32 always, in which the order statistics are."""
    tasks = rounded_product(x.deltas, weights.astype(x.models.dtype))
    return tasks.astype(jnp.float32)


def _normalized(values: jax.Array, low: Any, high: Any) -> jax.Array:
    span = high - low
    one, zero = jnp.ones((), values.dtype), jnp.zeros((), values.dtype)
    return jnp.where(span > 0, (values - low) / jnp.where(span > 0, span, one), zero)


def _balance(tasks: jax.Array, info: Numbers) -> jax.Array:
    """β_k, (K, ...)."""
    low, high = info["smallest"], info["largest"]
    size = _normalized(jnp.clip(jnp.abs(tasks), low, high), low, high)
    within = jnp.exp(rounded_product(size * size, jnp.asarray(len(tasks), size.dtype)))
    return within * jnp.tanh(tasks * sum_over_models(tasks)[None])


def _twice(x: Operands, arguments: Numbers) -> Any:
    tasks = _tasks(x, arguments["weights"])
    return jnp.concatenate([tasks, tasks])


def _balances(x: Operands, arguments: Numbers) -> Any:
    balance = _balance(_tasks(x, arguments["weights"]), arguments)
    return halves(jnp.concatenate([balance, balance]))
