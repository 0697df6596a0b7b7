"""DELLA's MagPrune: drop at random, rather what is small, and make up for each."""

from __future__ import annotations

from typing import Any

from m3jax.lazy import jnp
from m3jax.methods.fields import share
from m3jax.methods.sparsify import ranks_in_rows
from m3jax.methods.step import Numbers, Operands, Transform, register
from m3jax.prng import RATE_STEPS


@register("magprune")
class MagPrune(Transform):
    """θ0 + τ'_i: an entry is dropped with p_r, or kept and divided by 1 − p_r.

    p_r = p − ε/2 + ε r / c for the entry of rank r among the c of its row, from 0 for
    the largest magnitude; within [0, 1]. The 1/(1 − p_r) makes up for each entry's own
    rate, so that E τ' = τ; it is the rate after rounding to 1/65536. Behind it, `ties`
    with a trim rate of 0 elects and fuses as the paper does.

    Source: DELLA, arXiv 2406.11617; ranks from 0 are ours. mergekit's `della` is
    `sparsify` by ``rank``, which has an ε of half the width.
    """

    drop_rate: Any = share(
        default=None,
        help="p, the share that is dropped, one number or one per model; None: off",
        per_model=True,
        optional=True,
        search=(0.3, 0.9),
    )
    epsilon: Any = share(
        default=0.1,
        help="ε, by how much the smallest entry of a row is likelier dropped than the "
        "largest",
        per_model=True,
        search=(0.0, 0.4),
    )
    unit = "row"
    draws = "lanes"

    def apply(self, x: Operands, p: Numbers, info: Numbers, draw: Any) -> Operands:
        tau = x.deltas
        ranks, count = ranks_in_rows(tau)
        drop, width = (p[n].astype(jnp.float32) for n in ("drop_rate", "epsilon"))
        place = (count - 1 - ranks).astype(jnp.float32) / count - 0.5
        rates = jnp.round(jnp.clip(drop + width * place, 0, 1) * RATE_STEPS)
        kept = draw.astype(jnp.uint32) >= rates.astype(jnp.uint32)
        left = (1 - rates / RATE_STEPS).astype(tau.dtype)
        scaled = tau / jnp.where(left > 0, left, jnp.ones((), tau.dtype))
        return x._replace(models=x.base[None] + jnp.where(kept, scaled, 0 * tau))
