"""The mathematics of merging: pure functions on the arrays of one tensor.

Every module of this folder is imported, and registers the steps that it holds: to add
a method, write its file. `METHODS` and `TRANSFORMS` are the steps by name.
"""

import importlib
import pkgutil

from m3jax.methods.step import METHODS, TRANSFORMS, Method, Step, Transform

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["METHODS", "TRANSFORMS", "Method", "Step", "Transform"]
