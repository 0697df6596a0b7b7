"""Normal equations: what is nearest to several models' outputs, matrix by matrix."""

from __future__ import annotations

import numpy as np

from m3jax.lazy import jax, jnp
from m3jax.methods.spectral import product

_REFINEMENTS = 8


def gram_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """That of the Gram matrix of a linear weight's inputs: (in, in) for (out, in)."""
    return (shape[-1], shape[-1]) if len(shape) == 2 else shape


def solve(matrix: jax.Array, right: jax.Array) -> jax.Array:
    """matrix⁻¹ right for a positive semidefinite matrix (n, n); right in its range.

    By Cholesky, with unit diagonals, a jitter and iterative refinement. Where the
    matrix is singular but for the rounding of float32, the solution near to 0 counts.
    """
    size = len(matrix)
    own = jnp.diagonal(matrix)
    one = jnp.ones((), matrix.dtype)
    scale = jnp.where(own > 0, jax.lax.rsqrt(jnp.where(own > 0, own, one)), 0 * one)
    matrix = matrix * scale[:, None] * scale[None]
    right = right * scale[:, None]
    identity = jnp.eye(size, dtype=matrix.dtype)
    epsilon = float(np.finfo(np.float32).eps)

    def factor(jitter: jax.Array) -> jax.Array:
        return jnp.linalg.cholesky(matrix + jitter * identity)

    # Far above the rounding of the Grams, which is noise on both sides, and no bias:
    # refined t times, an eigenvalue v is off by (jitter / (v + jitter))^t. Rounding may
    # leave the matrix less than semidefinite by ε times its norm, which is at most n:
    # the jitter grows until there is a factor.
    jitter = jnp.asarray(256 * epsilon, matrix.dtype)
    jitter, lower = jax.lax.while_loop(
        lambda state: ~jnp.all(jnp.isfinite(state[1])) & (state[0] < 2 * size),
        lambda state: (8 * state[0], factor(8 * state[0])),
        (jitter, factor(jitter)),
    )

    def refined(_: jax.Array, found: jax.Array) -> jax.Array:
        left = right - product(matrix, found.T)
        return found + jax.scipy.linalg.cho_solve((lower, True), left)

    found = jax.lax.fori_loop(0, _REFINEMENTS, refined, jnp.zeros_like(right))
    return found * scale[:, None]
