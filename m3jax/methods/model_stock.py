"""Model Stock: between the base and the experts' mean, as far as their angle says."""

from __future__ import annotations

from typing import Any

from m3jax.lazy import jnp
from m3jax.methods.fields import choice
from m3jax.methods.geometry import square
from m3jax.methods.step import (
    Info,
    Method,
    Numbers,
    Operands,
    Problem,
    Statistics,
    register,
    rounded_product,
    sum_over_models,
)
from m3jax.methods.sums import deltas, gram, row_sums

# Below it a product of norms makes cosines fade to 0, as mergekit's do, and what is
# left of task vectors that cancel out is rounding.
_SMALLEST = 1e-6


@register("model_stock")
class ModelStock(Method):
    """θ0 + t · mean τ_i with t = K c / (1 + (K − 1) c).

    c is the mean of τ_i·τ_j / max(‖τ_i‖ ‖τ_j‖, 1e-6) over the pairs, of the tensor or
    (`by_row`) of each of its rows: a task vector of 0 has cosine 0 with every other.
    Where the task vectors cancel out t is 0. K = 1 gives θ_1.

        >>> import jax.numpy as jnp, m3jax
        >>> tau = [1.0, 1.0, 1.0], [1.0, 1.0, -1.0]  # c = 1/3, t = 1/2
        >>> base, a, b = ({"w": jnp.array(w)} for w in ([0.0, 0.0, 0.0], *tau))
        >>> recipe = m3jax.Recipe(method="model_stock", mixup=m3jax.Mixup(alpha=None))
        >>> m3jax.merge_params(base, [a, b], recipe)["w"].tolist()
        [0.5, 0.5, 0.0]

    Source: arXiv 2403.19522. Agrees with mergekit's `model_stock`.
    """

    studies = (
        "usually lost on LLMs (2511.21437, twelve fine-tunes each of four LLMs, "
        "16 benchmarks)"
    )
    by_row: Any = choice(
        default=False, help="an angle for each row instead of each tensor"
    )

    @property
    def unit(self) -> str:
        return "row" if self.by_row else "element"

    @property
    def scope(self) -> str:
        return "" if self.by_row else "tensor"

    def measure(self, problem: Problem) -> Statistics:
        products = yield from gram(deltas, problem)
        return {"products": products.reshape(-1)}

    def derive(self, numbers: Numbers, info: Info, xp: Any) -> Info:
        return {} if self.by_row else {"share": _share(square(info), xp)}

    def apply(self, x: Operands, p: Numbers, info: Numbers) -> Any:
        count = x.models.shape[0]
        share = info.get("share")
        if share is None:
            tau = x.deltas
            products = [[row_sums(a * b) for b in tau] for a in tau]
            share = _share(products, jnp)
        mean = sum_over_models(
            rounded_product(x.deltas, jnp.asarray(1 / count, x.models.dtype))
        )
        return x.base + rounded_product(mean, share)


def _share(products: Any, xp: Any) -> Any:
    """t, from the dot products of the task vectors."""
    count = len(products)
    cosines = [
        _cosine(products[i][j], products[i][i], products[j][j], xp)
        for i in range(count)
        for j in range(i)
    ]
    if not cosines:
        return xp.ones_like(products[0][0])
    mean = sum(cosines) / len(cosines)
    below = 1 + (count - 1) * mean
    cancel = below < _SMALLEST
    return xp.where(cancel, 0.0, count * mean / xp.where(cancel, 1.0, below))


def _cosine(dot: Any, first: Any, second: Any, xp: Any) -> Any:
    return dot / xp.maximum(xp.sqrt(first) * xp.sqrt(second), _SMALLEST)
