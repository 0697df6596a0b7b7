"""DARE: drop entries of each task vector, rescale the rest; comes before a method."""

from __future__ import annotations

from typing import Any

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
from m3jax.methods.sums import deltas, weights
from m3jax.prng import RATE_STEPS, drop_thresholds


@register("dare")
class Dare(Transform):
    """θ0 + τ'_i, where τ'_i is 0 where dropped and c_i τ_i elsewhere.

    An element is dropped with probability p_i; c_i = 1/(1 − p_i), or 1. By
    ``magnitude``, the k = int(n · p) smallest |τ_i| of each tensor are dropped, and all
    that equal the k-th. p = 1 drops everything and does not divide.

        >>> import jax.numpy as jnp, m3jax
        >>> base, a = {"w": jnp.zeros(8)}, {"w": jnp.ones(8)}
        >>> dare = m3jax.Dare(drop_rate=0.5)
        >>> recipe = m3jax.Recipe(method="task_arithmetic", dare=dare)
        >>> m3jax.merge_params(base, [a], recipe, 0)["w"].tolist()
        [0.0, 2.0, 2.0, 2.0, 2.0, 0.0, 0.0, 0.0]

    Source: arXiv 2311.03099. Agrees with the authors' `mask_merging`; mergekit
    rescales by the ratio of L1 norms per tensor instead of 1/(1 − p).
    """

    studies = (
        "lowered the average wherever it was reported in long-to-short reasoning "
        "merges (2503.20641); collapses with eight models, and before RegMean at "
        "a drop rate of 0.1 already (2405.17461)"
    )
    drop_rate: Any = share(
        default=None,
        help="p, share that is dropped, one number or one per model; None: off",
        per_model=True,
        optional=True,
        search=(0.0, 0.9),
    )
    rescale: Any = choice(default=True, help="multiply what is kept by 1/(1 − p)")
    strategy: Any = choice(
        default="random",
        help="what is dropped: `random`, or per tensor the smallest (`magnitude`)",
        options=("random", "magnitude"),
    )
    target: Any = choice(
        default="delta",
        help="mask the task vectors (`delta`) or the `weights` themselves",
        options=("delta", "weights"),
    )

    @property
    def draws(self) -> str:
        return "mask" if self.strategy == "random" else ""

    @property
    def scope(self) -> str:
        return "tensor" if self.strategy == "magnitude" else ""

    @property
    def needs_base(self) -> bool:
        return self.target == "delta"

    def measure(self, problem: Problem) -> Statistics:
        masked = deltas if self.target == "delta" else weights
        rates = problem.numbers["drop_rate"]
        # A rank of 0 drops nothing: no magnitude is at most −1.
        found = yield from kth_smallest(masked, rates, problem, none=-1)
        return {"thresholds": found}

    def derive(self, numbers: Numbers, info: Info, xp: Any) -> Info:
        rates = numbers["drop_rate"]
        kept = 1 - rates
        if self.strategy == "random":
            threshold = drop_thresholds(rates, xp)
            kept = 1 - threshold / RATE_STEPS
            info = {"threshold": threshold}
        scale = 1 / xp.where(kept > 0, kept, 1.0) if self.rescale else 1 + 0 * kept
        return {**info, "scale": scale}

    def apply(self, x: Operands, p: Numbers, info: Numbers, draw: Any) -> Operands:
        values = x.models if self.target == "weights" else x.deltas
        dropped = draw if draw is not None else _small(values, info)
        # The select between product and sum also keeps XLA from contracting the two,
        # so that every kernel that recomputes this sees the same bits.
        kept = jnp.where(dropped, 0.0, values * info["scale"])
        return x._replace(
            models=kept if self.target == "weights" else x.base[None] + kept
        )


def _small(values: Any, info: Numbers) -> Any:
    return magnitudes(values) <= info["thresholds"].astype(jnp.float32)
