"""mergekit's sparsifiers: what of each task vector is kept, tensor by tensor."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from m3jax.lazy import jnp
from m3jax.methods.fields import choice, share
from m3jax.methods.selection import kth_smallest, magnitudes
from m3jax.methods.step import (
    Info,
    Numbers,
    Operands,
    Problem,
    Statistics,
    Transform,
    register,
)
from m3jax.methods.sums import deltas, exact_sums
from m3jax.prng import RATE_STEPS, drop_thresholds

_WHOLE = "whole"  # the task vectors as they were, beside the models
# Beside them too, where some of the entries tied at a threshold are too many: their
# magnitudes and counts, what is kept and what is above, and how many should be, over n.
_TIED = ("low", "lows", "high", "highs", "kept", "above", "share", "top")


@register("sparsify")
class Sparsify(Transform):
    """θ0 + τ'_i, where τ'_i is τ_i where kept and 0 elsewhere; d = `density`.

    Of a tensor with n entries, by ``magnitude`` the int(n · d) largest are kept, but
    one at least if d > 0; without ``outliers`` the int(n · γ) largest are dropped too,
    and of the others so many of the smallest that int(n · d) are left, or as many as
    there are. Entries that equal the last one kept are kept with it. At ``random``
    each is kept with probability d; by ``rank`` with d + ε (2 r / (c − 1) − 1) for the
    entry of rank r, from 0 for the smallest, among the c of its row. d = 1 keeps all.

    Source: agrees with what mergekit does before its task-vector methods: `ties`,
    `breadcrumbs`, `dare_linear` and `dare_ties`, `della`.
    """

    studies = (
        "over pairs of multimodal models every sparsifier lost to plain "
        "interpolation on average (2503.23733)"
    )
    by: Any = choice(
        default="magnitude",
        help="what is kept: the largest (`magnitude`), all but the largest and the "
        "smallest (`outliers`), at `random`, or at random rather the large (`rank`)",
        options=("magnitude", "outliers", "random", "rank"),
    )
    density: Any = share(
        default=None,
        help="d, share that is kept, one number or one per model; None: off",
        per_model=True,
        optional=True,
        search=(0.1, 1.0),
    )
    gamma: Any = share(default=0.01, help="γ, share of the outliers", per_model=True)
    over: Any = choice(
        default="tensor",
        help="by magnitude or outliers: of each `tensor`, or of the whole `model`, as "
        "one",
        options=("tensor", "model"),
    )
    epsilon: Any = share(
        default=0.15,
        help="ε, by how much the largest entry of a row is likelier than d",
        per_model=True,
    )

    @property
    def draws(self) -> str:
        return {"random": "mask", "rank": "lanes"}.get(self.by, "")

    @property
    def scope(self) -> str:
        return "" if self.draws else str(self.over)

    @property
    def unit(self) -> str:
        return "row" if self.by == "rank" else "element"

    def measure(self, problem: Problem) -> Statistics:
        xp = jnp if problem.traced else np
        count, n = problem.num_models, problem.size
        density = xp.broadcast_to(problem.numbers["density"], (count,))
        kept, top = xp.floor(density * n), 0 * density
        if self.by == "magnitude":
            kept = xp.maximum(kept, density > 0)
        else:
            gamma = xp.floor(problem.numbers["gamma"] * n)
            top = xp.minimum(gamma, n - kept)
        # Ranks of the smallest and of the largest entry that is kept.
        ranks = [n - top - kept + 1, n - top][: 1 if self.by == "magnitude" else 2]
        rates = xp.minimum((xp.concatenate(ranks) + 0.5) / n, 1.0)
        rows = dataclasses.replace(problem, num_models=len(ranks) * count)
        found = yield from kth_smallest(deltas, rates, rows)
        low, high = found[:count], found[-count:]
        low = xp.where(density >= 1, 0.0, xp.where(kept > 0, low, xp.inf))
        high = xp.where((density >= 1) | (top == 0), xp.inf, high)
        return {
            "low": low.astype(np.float32),
            "high": high.astype(np.float32),
            "share": kept / n,
            "top": top / n,
        }

    def derive(self, numbers: Numbers, info: Info, xp: Any) -> Info:
        if self.by != "random":
            return info
        return {"threshold": drop_thresholds(1 - numbers["density"], xp)}

    def apply(self, x: Operands, p: Numbers, info: Numbers, draw: Any) -> Operands:
        tau = x.deltas
        if self.by == "random":
            kept = ~draw
        elif self.by == "rank":
            kept = draw.astype(jnp.uint32) >= _rank_thresholds(tau, p)
        else:
            size = magnitudes(tau)
            kept = (size >= info["low"].astype(jnp.float32)) & (
                size <= info["high"].astype(jnp.float32)
            )
        models = x.base[None] + jnp.where(kept, tau, 0 * tau)
        beside = {**x.beside, _WHOLE: tau}
        if not self.draws:
            beside |= _tied(size, kept, info)
        return x._replace(models=models, beside=beside)


def _tied(size: Any, kept: Any, info: Numbers) -> dict[str, Any]:
    """`_TIED`, for the norm of as many entries as should be kept."""
    high = kept & (size == info["high"].astype(jnp.float32))
    low = kept & (size == info["low"].astype(jnp.float32)) & ~high
    above = size > info["high"].astype(jnp.float32)
    counts = [own.astype(size.dtype) for own in (low, high, kept, above)]
    sizes = [jnp.where(own, size, 0 * size) for own in (low, high)]
    wanted = [jnp.broadcast_to(info[n], size.shape) for n in ("share", "top")]
    arrays = (sizes[0], counts[0], sizes[1], counts[1], *counts[2:], *wanted)
    return dict(zip(_TIED, arrays, strict=True))


@register("rescale")
class Rescale(Transform):
    """θ0 + s_i τ'_i with s_i = ‖τ_i‖₁ / ‖τ'_i‖₁: what `sparsify` took is made up for.

    The norms are those of a tensor; s_i = 1 where nothing is left. Of entries tied at a
    threshold, which are all kept, ‖τ'_i‖₁ counts as many as should be.

    Source: agrees with mergekit's `rescale`.
    """

    norm: Any = choice(
        default="none",
        help="what is kept: the `l1` norm, or `none`: off",
        options=("none", "l1"),
    )
    scope = "tensor"

    @property
    def on(self) -> bool:
        return bool(self.norm == "l1")

    def measure(self, problem: Problem) -> Statistics:
        sums = yield from exact_sums(_norms, problem)
        whole, left, *tied = sums.reshape(-1, problem.num_models)
        if tied:
            xp = jnp if problem.traced else np
            low, lows, high, highs, kept, above, share, top = tied
            over = xp.clip(xp.round(top) - above, 0, highs)
            under = xp.clip(kept - over - xp.round(share), 0, lows)
            left = left - over * high / xp.maximum(highs, 1)
            left = left - under * low / xp.maximum(lows, 1)
        return {"whole": whole, "left": left}

    def derive(self, numbers: Numbers, info: Info, xp: Any) -> Info:
        left = info["left"]
        none = left <= 0
        return {"scale": xp.where(none, 1.0, info["whole"] / xp.where(none, 1.0, left))}

    def apply(self, x: Operands, p: Numbers, info: Numbers, draw: Any) -> Operands:
        tau = x.deltas
        # A select between product and sum: see `rounded_product`.
        scaled = jnp.where(tau == 0, 0 * tau, tau * info["scale"])
        return x._replace(models=x.base[None] + scaled)


def _norms(x: Operands) -> Any:
    whole = x.beside.get(_WHOLE, x.deltas)
    tied = [x.beside[name] for name in _TIED if name in x.beside]
    return [jnp.abs(own) for stack in (whole, x.deltas, *tied) for own in stack]


def _rank_thresholds(tau: Any, p: Numbers) -> Any:
    """The lanes from which on an entry is kept, uint32, by its rank in its row."""
    rank, count = ranks_in_rows(tau)
    last = max(count - 1, 1)
    middle = 0.5 * (count == 1)
    place = 2 * (rank.astype(jnp.float32) / last + middle) - 1
    density = p["density"].astype(jnp.float32)
    keep = density + p["epsilon"].astype(jnp.float32) * place
    keep = jnp.where((density <= 0) | (density >= 1), density, jnp.clip(keep, 0, 1))
    return jnp.round((1 - keep) * RATE_STEPS).astype(jnp.uint32)


def ranks_in_rows(tau: Any) -> tuple[Any, int]:
    """The rank of each magnitude in its row, from 0 for the smallest, and the row's c.

    A row is all of the last axis; of equal ones the first is the smaller.
    """
    rows = magnitudes(tau).reshape(*tau.shape, *(1,) * (tau.ndim == 1))
    order = jnp.argsort(rows, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1).reshape(tau.shape), rows.shape[-1]
