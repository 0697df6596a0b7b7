"""MoFO: AdamW that moves the parameters of largest momentum only."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    import optax


class MofoState(NamedTuple):
    """The number of steps, and both moments of each parameter."""

    steps: jax.Array
    mu: Any
    nu: Any


def mofo_adamw(
    learning_rate: float | Callable[[Any], Any],
    *,
    fraction: float = 0.3,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> optax.GradientTransformation:
    """AdamW whose step is taken by the largest |first moments| of each tensor.

    p ← p (1 − η·weight_decay) everywhere; the moments are those of Adam everywhere; the
    step −η m̂ / (√v̂ + eps) is taken where |m| is at least the int(n·fraction)-th largest
    of its tensor of n elements, at least the largest one.

    As MoFOAdamW of arcee-ai/DAM, which fails on tensors of fewer than 1/fraction
    elements.

    Args:
      learning_rate: η, or a schedule: steps so far -> η.
      fraction: of each tensor's elements, in (0, 1].
      b1, b2, eps: Adam's.
      weight_decay: decoupled.

    Raises:
      ValueError: the fraction is outside (0, 1].
    """
    import optax

    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction} needs a number above 0 and up to 1")

    def init(params: Any) -> MofoState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return MofoState(jnp.zeros((), jnp.int32), zeros, zeros)

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, MofoState]:
        if params is None:
            raise ValueError("mofo_adamw needs the params: tx.update(g, state, params)")
        rate = learning_rate(state.steps) if callable(learning_rate) else learning_rate
        count = state.steps + 1
        mu = _moved(state.mu, gradients, b1)
        nu = _moved(state.nu, jax.tree.map(jnp.square, gradients), b2)
        power = count.astype(jnp.float32)
        first, second = 1 - b1**power, 1 - b2**power

        def step(m: jax.Array, v: jax.Array, p: jax.Array) -> jax.Array:
            root = jnp.sqrt(v / second.astype(v.dtype))
            adam = (m / first.astype(m.dtype)) / (root + eps)
            kept = jnp.where(largest(m, fraction), adam, jnp.zeros_like(adam))
            return -jnp.asarray(rate, p.dtype) * (kept + weight_decay * p)

        return jax.tree.map(step, mu, nu, params), MofoState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def largest(moment: jax.Array, fraction: float) -> jax.Array:
    """Where |moment| is among the int(n·fraction) largest, at least 1; ties are in."""
    flat = jnp.abs(moment).reshape(-1)
    if not flat.size:
        return jnp.zeros(moment.shape, bool)
    least = jax.lax.top_k(flat, max(int(flat.size * fraction), 1))[0][-1]
    return jnp.abs(moment) >= least


def _moved(old: Any, new: Any, decay: float) -> Any:
    return jax.tree.map(lambda o, n: decay * o + (1 - decay) * n, old, new)
