"""SVC: singular values of the merged task vector, calibrated by the tasks' own."""

from __future__ import annotations

from typing import Any

from m3jax.lazy import jax, jnp
from m3jax.methods.fields import number
from m3jax.methods.spectral import product, significant, svd
from m3jax.methods.step import Numbers, Operands, Transform, register


@register("svc")
class Svc(Transform):
    """After any method: each singular value of the merged τ = U Σ Vᵀ times γ_r.

    γ_r = K / Σ_k max(α, s_rk), s_rk = ⟨a_r, a_rk⟩ / ‖a_rk‖² with a_r = u_rᵀ τ and
    a_rk = u_rᵀ τ_k: how much of direction u_r the merge has, for what task k has. The
    authors take α = 0.1 after linear methods, TIES and Iso-C, 0.2 after Iso-CTS, 1
    after TSV-M and WUDI. Tensors that are no matrices stay.

    A task that has nothing in a direction (a_rk = 0) is left out of its mean, which is
    ours (0/0 otherwise), as it is that directions whose σ is only rounding stay. In
    the arithmetic of the merge, where the reference has float64.

    Source: arXiv 2602.05536; fusion-bench.
    """

    alpha: Any = number(
        default=None,
        help="α, the least that a task counts; None: off",
        low=0.0,
        optional=True,
        search=(0.05, 1.0),
    )
    unit = "matrix"
    after = True

    def finish(self, x: Operands, merged: Any, p: Numbers, info: Numbers) -> Any:
        if x.base.ndim != 2 or 0 in x.base.shape:
            return merged
        alpha = jnp.maximum(p["alpha"].reshape(()), 1e-6)
        return x.base + calibrated(merged - x.base, x.deltas, alpha)


def calibrated(merged: jax.Array, tasks: jax.Array, alpha: jax.Array) -> jax.Array:
    """The merged task vector (m, n) with γ σ for σ; tasks are (K, m, n)."""
    left, values, right = svd(merged)
    one, zero = jnp.ones((), values.dtype), jnp.zeros((), values.dtype)
    total, count = jnp.zeros_like(values), jnp.zeros_like(values)
    for task in tasks:
        own = product(left.T, task.T)  # u_rᵀ τ_k, (r, n)
        square = jnp.sum(own * own, axis=1)
        there = square > 0
        along = values * jnp.sum(right * own, axis=1)
        share = along / jnp.where(there, square, one)
        total = total + jnp.where(there, jnp.maximum(alpha, share), zero)
        count = count + there.astype(values.dtype)
    known = significant(values, merged.shape) & (count > 0)
    gamma = jnp.where(known, count / jnp.where(known, total, one), one)
    # What stays has the bits that it had.
    return merged + product(left * ((gamma - 1) * values)[None], right.T)
