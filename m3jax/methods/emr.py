"""EMR-Merging: one model for all tasks, and for each task a mask and a scale."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from m3jax.lazy import jnp
from m3jax.methods.fields import choice
from m3jax.methods.step import (
    Info,
    Method,
    Numbers,
    Operands,
    Problem,
    Spec,
    Statistics,
    register,
    rounded_product,
    sum_over_models,
)
from m3jax.methods.sums import exact_sums


@register("emr")
class Emr(Method):
    """θ0 + τ, and per task M_k and λ_k: the task's model is θ0 + λ_k M_k ⊙ τ.

    g = +1 where Σ τ_k > 0, else −1; M_k = 1[τ_k g > 0]; τ = g ⊙ max_k |τ_k| M_k.
    `rescale` ``sum``: λ_k = Σ|τ_k| / Σ|M_k τ| over the model, the paper's; ``mean``:
    the sums run over the tensors' means, so that a bias weighs as much as a matrix;
    ``l2``: ⟨τ_k, M_k τ⟩ / ‖M_k τ‖². A task whose τ_k is 0 has
    λ_k = 0 (the reference: 0/0).

    The masks are files of their own, bits of `numpy.packbits`; the scales stand in
    m3jax.json. Tensors that the recipe excludes, as heads of tasks, are kept of each
    model in one file more, and are its task's.

        >>> import jax.numpy as jnp, m3jax
        >>> tau = [2.0, -1.0, 3.0], [1.0, 1.0, -1.0]
        >>> base, a, b = ({"w": jnp.array(w)} for w in ([0.0, 0.0, 0.0], *tau))
        >>> result = m3jax.multitask.emr(base, [a, b])
        >>> result.delta["w"].tolist(), result.scales.tolist()
        ([2.0, -1.0, 3.0], [1.0, 1.5])
        >>> m3jax.multitask.modulate(base, result, 1)["w"].tolist()
        [3.0, 0.0, 0.0]

    Source: arXiv 2405.17461. ``sum`` agrees with the authors' script for 30 tasks,
    ``mean`` with their others and fusion-bench 0.2.33; ``l2`` is ours.
    """

    studies = (
        "on the demo's models each modulated model beats every single merge at its "
        "task (docs/METHODS.md)"
    )
    rescale: Any = choice(
        default="sum",
        help="λ_k by ratios of L1 norms, of tensors' mean magnitudes, or least squares",
        options=("sum", "mean", "l2"),
    )
    records = ("scales",)
    by_task = True

    @property
    def scope(self) -> str:
        return "tensor" if self.rescale == "mean" else "model"

    def measure(self, problem: Problem) -> Statistics:
        terms = _l2_terms if self.rescale == "l2" else _l1_terms
        sums = yield from exact_sums(terms, problem)
        if self.rescale == "mean":
            return {"means": sums / problem.size}
        return {"scales": _ratios(sums, jnp if problem.traced else np)}

    def derive(self, numbers: Numbers, info: Info, xp: Any) -> Info:
        if self.rescale != "mean":
            return info
        means = info["means"]
        # Rounded once, whatever the order of the tensors is.
        total = means.sum(-1) if xp is not np else np.array([*map(math.fsum, means)])
        scales = _ratios(total, xp)[:, None]
        return {"scales": xp.broadcast_to(scales, (len(scales), means.shape[-1]))}

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


def task_model(base: Any, tau: Any, mask: Any, scale: Any) -> Any:
    """θ0 + λ_k M_k ⊙ τ, the model of one task; all of one shape but the scale, ()."""
    own = jnp.where(mask, tau, jnp.zeros((), tau.dtype))
    return base + rounded_product(own, scale)


def _ratios(sums: Any, xp: Any) -> Any:
    """(K,) from the K sums above the line and the K below it."""
    above, below = sums[: len(sums) // 2], sums[len(sums) // 2 :]
    return xp.where(below > 0, above / xp.where(below > 0, below, 1.0), 0.0)


def _l1_terms(x: Operands) -> Any:
    masks, unified = elected(x)
    own = jnp.where(masks, jnp.abs(unified)[None], 0.0)
    return jnp.concatenate([jnp.abs(x.deltas), own])


def _l2_terms(x: Operands) -> Any:
    masks, unified = elected(x)
    own = jnp.where(masks, unified[None], 0.0)
    return jnp.concatenate([x.deltas * own, own * own])
