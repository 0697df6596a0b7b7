"""Slerp: between two models along the arc rather than the chord."""

from __future__ import annotations

from typing import Any

from m3jax.methods.fields import weights
from m3jax.methods.geometry import FromGram, arc, cosine_of, second_share
from m3jax.methods.step import Numbers, register

_NEARLY_PARALLEL = 0.9995


@register("slerp")
class Slerp(FromGram):
    """Σ c_i θ_i with c_0 = sin((1 − t) ω) / sin ω and c_1 = sin(t ω) / sin ω.

    ω is the angle between the two models' tensors, t = λ_1 / (λ_0 + λ_1); without M3
    t = 1/2. A t below 0 or above 1 goes on along the arc. Nearly parallel or opposite
    tensors (|cos ω| > 0.9995) are averaged: c_0 = 1 − t, c_1 = t. A tensor of zeros is
    orthogonal to every other.

        >>> import jax.numpy as jnp, m3jax
        >>> a, b = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 1.0])}
        >>> recipe = m3jax.Recipe(method="slerp", mixup=m3jax.Mixup(alpha=None))
        >>> print(m3jax.merge_params(None, [a, b], recipe)["w"])
        [0.70710677 0.70710677]

    Source: Shoemake, SIGGRAPH 1985; agrees with mergekit's `slerp` of t.
    """

    weights: Any = weights(equal=lambda num_models: 1 / num_models)
    num_models = 2
    differentiable = True

    def coefficients(self, numbers: Numbers, products: Any, xp: Any) -> Any:
        cosine = cosine_of(products[0, 0], products[0, 1], products[1, 1], xp)
        chord = xp.abs(cosine) > _NEARLY_PARALLEL
        return arc(second_share(numbers, xp), cosine, chord, xp)
