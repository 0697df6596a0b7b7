"""How many singular triples of a task vector count: rules of the literature, and yours.

A rule is a function of the singular values σ (q,), which fall, and of what it wants of

    num_models   K
    shape        (m, n) of the matrix, q = min(m, n)
    energy       the method's number η

by keyword. It says how many are kept, a scalar that is rounded down, one at the least
(none of a matrix of zeros). To add one:

    from m3jax.methods.ranks import RANKS

    RANKS["half"] = lambda values, **known: jnp.float32(len(values) / 2)
    recipe = m3jax.Recipe(method=m3jax.TsvM(rank="half"))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from m3jax.lazy import jax, jnp
from m3jax.methods import fields

Rule = Callable[..., Any]


def share(values: jax.Array, *, num_models: int, **known: Any) -> jax.Array:
    """⌊q / K⌋: TSV-M's own, arXiv 2412.00081."""
    return jnp.full((), len(values) // num_models, values.dtype)


def energy(values: jax.Array, *, energy: Any, **known: Any) -> jax.Array:
    """The smallest r with Σ_{i≤r} σ_i ≥ η Σ σ_i: STAR's, arXiv 2502.10339."""
    before = jnp.cumsum(values) - values
    return jnp.sum((before < energy * jnp.sum(values)).astype(values.dtype))


def participation(values: jax.Array, **known: Any) -> jax.Array:
    """The participation ratio (Σ √λ)² / Σ λ with λ = σ²: how many directions weigh."""
    scaled = _relative(values)
    squares, total = jnp.sum(scaled * scaled), jnp.sum(scaled)
    return total * total / jnp.where(squares > 0, squares, jnp.ones_like(squares))


def stable(values: jax.Array, **known: Any) -> jax.Array:
    """The stable rank ‖τ‖_F² / σ_1²."""
    scaled = _relative(values)
    return jnp.sum(scaled * scaled)


def gavish_donoho(
    values: jax.Array, *, shape: tuple[int, ...], **known: Any
) -> jax.Array:
    """Those with σ > ω(β) median(σ), β = min(m, n) / max(m, n), arXiv 1305.5870.

    The best hard threshold where the noise is white and its level unknown, with their
    ω(β) ≈ 0.56 β³ − 0.95 β² + 1.82 β + 1.43.
    """
    beta = min(shape) / max(shape)
    omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    limit = jnp.asarray(omega, values.dtype) * jnp.median(values)
    return jnp.sum((values > limit).astype(values.dtype))


RANKS: dict[str, Rule] = {
    "share": share,
    "energy": energy,
    "participation": participation,
    "stable": stable,
    "gavish_donoho": gavish_donoho,
}


def rule(*, default: str) -> Any:
    """The field of a step for the name of a rule."""
    return fields.choice(
        default=default, help="how many triples of each task are kept", options=RANKS
    )


def energy_kept(**settings: Any) -> Any:
    """The field of a step for η."""
    text = "η, share of the sum of singular values that is kept; of rank `energy`"
    return fields.share(default=0.4, help=text, **settings)


def kept(values: jax.Array, rule: str, **known: Any) -> jax.Array:
    """Which singular values count by a rule, (q,) bool."""
    count = jnp.maximum(jnp.floor(RANKS[rule](values, **known)), 1)
    place = jnp.arange(len(values), dtype=values.dtype)
    return (place < count.astype(values.dtype)) & (values > 0)


def _relative(values: jax.Array) -> jax.Array:
    """The values by the largest: their squares neither overflow nor vanish."""
    largest = jnp.max(values, initial=0.0)
    return values / jnp.where(largest > 0, largest, jnp.ones((), values.dtype))
