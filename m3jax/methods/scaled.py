"""What many methods have in common: a task vector made of all, scaled."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from m3jax.lazy import jnp
from m3jax.methods.fields import scaling, weights
from m3jax.methods.spectral import mean
from m3jax.methods.step import Method, Numbers, Operands, rounded_product


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaled(Method):
    """θ0 + s · `merged`(λ_k τ_k). Without M3 all λ_k are 1."""

    weights: Any = weights()
    scaling: Any = scaling()

    def apply(self, x: Operands, p: Numbers, info: Numbers) -> Any:
        tasks = rounded_product(x.deltas, p["weights"])
        merged = self.merged(tasks, x, p, info)
        return x.base + rounded_product(merged, p["scaling"])

    def merged(self, tasks: Any, x: Operands, p: Numbers, info: Numbers) -> Any:
        """The task vector, (...), of the λ_k τ_k, (K, ...)."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfMatrices(Scaled):
    """The same of matrices; other tensors get θ0 + s · mean λ_k τ_k."""

    scaling: Any = scaling(search=(0.5, 2.0))
    unit: ClassVar[Any] = "matrix"

    def apply(self, x: Operands, p: Numbers, info: Numbers) -> Any:
        count = len(x.models)
        weights = jnp.broadcast_to(p["weights"], (count, *(1,) * x.base.ndim))
        # One by one: a stack of them would be in memory beside them.
        tasks = [
            rounded_product(x.models[k] - x.base, weights[k]) for k in range(count)
        ]
        matrices = x.base.ndim == 2 and 0 not in x.base.shape
        merged = self.of_matrices(tasks, x, p) if matrices else mean(tasks)
        return x.base + rounded_product(merged, p["scaling"])

    def of_matrices(self, tasks: list[Any], x: Operands, p: Numbers) -> Any:
        """The task vector (m, n) of the λ_k τ_k, K of (m, n)."""
        raise NotImplementedError
