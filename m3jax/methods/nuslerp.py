"""NuSlerp: slerp of two models or task vectors, whole or row by row."""

from __future__ import annotations

from typing import Any

from m3jax.lazy import jnp
from m3jax.methods.fields import choice, weights
from m3jax.methods.geometry import FromGram, arc, cosine_of, second_share
from m3jax.methods.step import Info, Numbers, Operands, register
from m3jax.methods.sums import row_sums

# |cos ω| from which rounding says more about ω than the vectors do.
_PARALLEL = 1 - 5e-7


@register("nuslerp")
class NuSlerp(FromGram):
    """Σ c_i v_i with c_0 = sin((1 − t) ω) / sin ω and c_1 = sin(t ω) / sin ω.

    t = λ_1 / (λ_0 + λ_1), or 1/2 where the weights add up to 0; the v_i are the models,
    or their task vectors, added to θ0. `along` says between what ω is: the ``whole``
    tensors, their ``rows`` (vectors along the last axis), or their ``columns`` (along
    the first one). Parallel and opposite vectors are averaged: c_0 = 1 − t, c_1 = t.

    Source: agrees with mergekit's `nuslerp`, whose `nuslerp_flatten` is ``whole`` and
    whose `nuslerp_row_wise` is ``columns``.
    """

    weights: Any = weights(equal=lambda num_models: 1 / num_models)
    along: Any = choice(
        default="whole",
        help="what an angle is between",
        options=("whole", "rows", "columns"),
    )
    task_vectors: Any = choice(
        default=False, help="combine the task vectors instead of the models"
    )
    num_models = 2

    @property
    def unit(self) -> str:
        return {"whole": "element", "rows": "row", "columns": "matrix"}[self.along]

    @property
    def scope(self) -> str:
        return "tensor" if self.along == "whole" else ""

    def derive(self, numbers: Numbers, info: Info, xp: Any) -> Info:
        if self.along == "whole":
            return super().derive(numbers, info, xp)
        return {"share": second_share(numbers, xp)}

    def coefficients(self, numbers: Numbers, products: Any, xp: Any) -> Any:
        cosine = cosine_of(products[0, 0], products[0, 1], products[1, 1], xp)
        return arc(second_share(numbers, xp), cosine, xp.abs(cosine) > _PARALLEL, xp)

    def apply(self, x: Operands, p: Numbers, info: Numbers) -> Any:
        if self.along == "whole":
            return super().apply(x, p, info)
        a, b = x.deltas if self.task_vectors else x.models
        axis = 0 if self.along == "columns" else -1

        def dot(left: Any, right: Any) -> Any:
            along_last = jnp.moveaxis(jnp.atleast_1d(left * right), axis, -1)
            summed = jnp.moveaxis(row_sums(along_last), -1, axis)
            return summed.astype(left.dtype).reshape(summed.shape[: left.ndim])

        cosine = cosine_of(dot(a, a), dot(a, b), dot(b, b), jnp)
        share = jnp.broadcast_to(info["share"], cosine.shape)
        return self.combined(x, arc(share, cosine, jnp.abs(cosine) > _PARALLEL, jnp))
