"""Whether JAX is transforming the function that a value is an argument of."""

from __future__ import annotations

import contextlib
from typing import Any


def is_traced(value: Any) -> bool:
    """Whether `value` stands for an argument of `jax.jit`, `grad` or `vmap`."""
    if not hasattr(value, "aval"):  # as arrays and tracers of JAX have
        return False
    import jax

    return isinstance(value, jax.core.Tracer)


def at_once() -> Any:
    """A context in which concrete values are computed now, also inside `jax.jit`.

    Python looks at what arrays that are no arguments hold, and a ratio must not be
    drawn by another program.
    """
    import jax

    inside = is_traced(jax.numpy.zeros(()))  # a constant is staged there, too
    return jax.ensure_compile_time_eval() if inside else contextlib.nullcontext()
