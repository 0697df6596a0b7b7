"""Points on a sphere: combinations whose coefficients follow from a Gram matrix.

Slerp, NuSlerp, MultiSlerp and the Karcher mean never look at single elements: the
dot products of K tensors say how much of each goes into the result.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from m3jax.methods.step import (
    Info,
    Method,
    Numbers,
    Operands,
    Problem,
    Statistics,
    rounded_product,
    sum_over_models,
)
from m3jax.methods.sums import deltas, gram
from m3jax.methods.sums import weights as models

# Of the squared length of a sum of unit vectors: below it, rounding decides.
NOTHING = 1e-7
_NO_WEIGHT = 1e-8


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromGram(Method):
    """Σ c_i θ_i, or θ0 + Σ c_i τ_i, with c from the dot products of one tensor.

    Attributes:
      task_vectors: combine the τ_i = θ_i − θ0 instead of the models.
    """

    scope: ClassVar[Any] = "tensor"
    task_vectors = False

    @property
    def needs_base(self) -> bool:
        return bool(self.task_vectors)

    def measure(self, problem: Problem) -> Statistics:
        products = yield from gram(deltas if self.task_vectors else models, problem)
        return {"products": products.reshape(-1)}

    def derive(self, numbers: Numbers, info: Info, xp: Any) -> Info:
        return {"coefficients": self.coefficients(numbers, square(info), xp)}

    def coefficients(self, numbers: Numbers, products: Any, xp: Any) -> Any:
        """c, (K, N) float64, from the dot products, (K, K, N)."""
        raise NotImplementedError

    def apply(self, x: Operands, p: Numbers, info: Numbers) -> Any:
        return self.combined(x, info["coefficients"])

    def combined(self, x: Operands, coefficients: Any) -> Any:
        """The combination of one part."""
        vectors = x.deltas if self.task_vectors else x.models
        total = sum_over_models(rounded_product(vectors, coefficients))
        return x.base + total if self.task_vectors else total


def square(info: Info) -> Any:
    """The dot products that were measured, (K, K, N)."""
    products = info["products"]
    count = round(len(products) ** 0.5)
    return products.reshape(count, count, *products.shape[1:])


def second_share(numbers: Numbers, xp: Any) -> Any:
    """t, the second model's share of the weights; 1/2 where they add up to 0."""
    weight = numbers["weights"]
    total = weight[0] + weight[1]
    none = xp.abs(total) < _NO_WEIGHT
    return xp.where(none, 0.5, weight[1] / xp.where(none, 1.0, total))


def cosine_of(first: Any, both: Any, second: Any, xp: Any) -> Any:
    """cos ω of two vectors from their dot products; 0 where one is 0."""
    norms = xp.sqrt(first) * xp.sqrt(second)
    cosine = both / xp.where(norms > 0, norms, 1.0)
    return xp.clip(xp.where(norms > 0, cosine, 0.0), -1.0, 1.0)


def arc(t: Any, cosine: Any, chord: Any, xp: Any) -> Any:
    """sin((1 − t) ω) / sin ω and sin(t ω) / sin ω; 1 − t and t where `chord`.

    Args:
      t, cosine, chord: arrays that broadcast against each other.
      xp: NumPy or `jax.numpy`.
    """
    angle = xp.arccos(xp.where(chord, 0.0, cosine))
    shares = xp.stack([1 - t, t])
    on_arc = xp.sin(shares * angle[None]) / xp.sin(angle)[None]
    return xp.where(chord[None], shares, on_arc)
