"""`jax` and `jax.numpy`, imported when they are first used.

A method's file is read to know its parameters, by `m3jax merge --help` for example,
which must not wait a second for JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax as jax
    import jax.numpy as jnp
else:

    class _Lazy:
        def __init__(self, name: str):
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            value = getattr(importlib.import_module(self._name), attribute)
            self.__dict__[attribute] = value  # the next time without a detour
            return value

    jax, jnp = _Lazy("jax"), _Lazy("jax.numpy")

__all__ = ["jax", "jnp"]
