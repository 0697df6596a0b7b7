"""What many methods have in common: a task vector made of all, scaled."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

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

    def merged(self, tasks: Any, x: Operands, p: Numbers, info: Numbers) -> Any:
        if tasks.ndim != 3 or 0 in tasks.shape:
            return mean(tasks)
        return self.of_matrices(tasks, x, p)

    def of_matrices(self, tasks: Any, x: Operands, p: Numbers) -> Any:
        """The task vector (m, n) of the λ_k τ_k, (K, m, n)."""
        raise NotImplementedError
