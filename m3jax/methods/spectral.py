"""Singular value decompositions of task vectors, as spectral methods need them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from m3jax.lazy import jax, jnp
from m3jax.methods.step import sum_over_models

# U (m, r), singular values (r,) falling, Vᵀ (r, n).
Triples: TypeAlias = "tuple[jax.Array, jax.Array, jax.Array]"


def svd(matrix: jax.Array) -> Triples:
    """U, S, Vᵀ of a matrix (m, n), q = min(m, n) triples."""
    left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    return left, values, right


def significant(values: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Which singular values of a matrix of that shape are more than rounding."""
    largest = jnp.max(values, initial=0.0)
    epsilon = jnp.asarray(max(shape) * np.finfo(np.float32).eps, values.dtype)
    return values > epsilon * largest


def kept_triples(triples: Triples, rank: int) -> Triples:
    """The first `rank` triples; 0 where the singular value is only rounding."""
    left, values, right = triples
    real = significant(values, (left.shape[0], right.shape[1]))[:rank]
    zero = jnp.zeros((), values.dtype)
    return (
        jnp.where(real[None], left[:, :rank], zero),
        jnp.where(real, values[:rank], zero),
        jnp.where(real[:, None], right[:rank], zero),
    )


def concatenated(triples: Sequence[Triples]) -> Triples:
    """The triples of several tasks side by side."""
    left, values, right = zip(*triples, strict=True)
    return (
        jnp.concatenate(left, axis=1),
        jnp.concatenate(values),
        jnp.concatenate(right),
    )


def polar(matrix: jax.Array) -> jax.Array:
    """The polar factor Q Rᵀ of A = Q D Rᵀ over its significant singular values.

    A partial isometry: what A does not reach stays 0.
    """
    if 0 in matrix.shape:
        return matrix
    left, values, right = svd(matrix)
    real = significant(values, matrix.shape)
    return product(jnp.where(real[None], left, jnp.zeros((), left.dtype)), right.T)


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a bᵀ at the highest precision."""
    return jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)


def mean(tasks: jax.Array) -> jax.Array:
    """mean_k τ_k of (K, ...): what becomes of tensors that are no matrices."""
    return sum_over_models(tasks) / jnp.asarray(tasks.shape[0], tasks.dtype)
