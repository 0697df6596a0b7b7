"""EMR-Merging: one model for all tasks, and for each task a mask and a scale."""

from __future__ import annotations

from typing import Any

import numpy as np

from m3jax.lazy import jnp
from m3jax.methods.fields import choice
from m3jax.methods.step import (
    Method,
    Numbers,
    Operands,
    Problem,
    Spec,
    Statistics,
    register,
    sum_over_models,
)
from m3jax.methods.sums import exact_sums


@register("emr")
class Emr(Method):
    """θ0 + τ, and per task M_k and λ_k: the task's model is θ0 + λ_k M_k ⊙ τ.

    g = +1 where Σ τ_k > 0, else −1; M_k = 1[τ_k g > 0]; τ = g ⊙ max_k |τ_k| M_k.
    `rescale` ``sum``: λ_k = Σ|τ_k| / Σ|M_k τ| over the model; ``l2``:
    ⟨τ_k, M_k τ⟩ / ‖M_k τ‖². A task whose τ_k is 0 has λ_k = 0.

    The masks are files of their own, bits of `numpy.packbits`; the scales stand in
    m3jax.json.

    Source: arXiv 2405.17461; ``l2`` is ours.
    """

    rescale: Any = choice(
        default="sum",
        help="λ_k by the ratio of L1 norms, or least squares",
        options=("sum", "l2"),
    )
    scope = "model"
    records = ("scales",)

    def measure(self, problem: Problem) -> Statistics:
        terms = _l1_terms if self.rescale == "sum" else _l2_terms
        sums = yield from exact_sums(terms, problem)
        xp = jnp if problem.traced else np
        above, below = sums[: problem.num_models], sums[problem.num_models :]
        return {
            "scales": xp.where(below > 0, above / xp.where(below > 0, below, 1.0), 0.0)
        }

    def apply(self, x: Operands, p: Numbers, info: Numbers) -> Any:
        masks, unified = elected(x)
        parts = {f"mask-{k}": mask for k, mask in enumerate(masks)}
        return {"": x.base + unified, **parts}

    def outputs(self, spec: Spec, num_models: int) -> dict[str, Spec]:
        mask = Spec(spec.shape, "bool", packed=True)
        return {"": spec, **{f"mask-{k}": mask for k in range(num_models)}}


def elected(x: Operands) -> tuple[Any, Any]:
    """The masks M_k, (K, ...) bool, and the unified task vector τ, (...)."""
    tau = x.deltas
    one = jnp.ones((), tau.dtype)
    sign = jnp.where(sum_over_models(tau) > 0, one, -one)
    masks = tau * sign[None] > 0
    return masks, sign * jnp.max(jnp.where(masks, jnp.abs(tau), 0 * one), axis=0)


def _l1_terms(x: Operands) -> Any:
    masks, unified = elected(x)
    own = jnp.where(masks, jnp.abs(unified)[None], 0.0)
    return jnp.concatenate([jnp.abs(x.deltas), own])


def _l2_terms(x: Operands) -> Any:
    masks, unified = elected(x)
    own = jnp.where(masks, unified[None], 0.0)
    return jnp.concatenate([x.deltas * own, own * own])
