"""Whether JAX is transforming the function that a value is an argument of."""

from __future__ import annotations

from typing import Any


def is_traced(value: Any) -> bool:
    """Whether `value` stands for an argument of `jax.jit`, `grad` or `vmap`."""
    if not hasattr(value, "aval"):  # as arrays and tracers of JAX have
        return False
    import jax

    return isinstance(value, jax.core.Tracer)
