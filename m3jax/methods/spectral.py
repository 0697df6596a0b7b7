"""Singular value decompositions of task vectors, as spectral methods need them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from m3jax.lazy import jax, jnp
from m3jax.methods.step import sum_over_models

# U (m, r), singular values (r,) falling, Vᵀ (r, n).
Triples: TypeAlias = "tuple[jax.Array, jax.Array, jax.Array]"


def svd(matrix: jax.Array, rank: int | None = None) -> Triples:
    """U, S, Vᵀ of a matrix (m, n): the first `rank` triples, or all min(m, n).

    What is only rounding is 0. Where float64 is at hand by the eigenvectors of the Gram
    matrix, and U = A V / σ: faster than LAPACK's singular values, and nearer to the
    exact ones, since the squares in float64 lose (σ_1 / σ)² 2⁻⁵³, 1e-9 where σ ends to
    be `significant`. Elsewhere, as under a caller's `jax.jit`, LAPACK's.
    """
    dtype, shape = matrix.dtype, matrix.shape
    if not _doubled() or 0 in shape:
        left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
        first = left[:, :rank], values[:rank], right[:rank]
        return masked(first, significant(values, shape)[:rank])
    if shape[0] < shape[1]:
        left, values, right = svd(matrix.T, rank)
        return right.T, values, left.T
    squares, vectors = jnp.linalg.eigh(_gram([matrix]))  # rising
    values = jnp.sqrt(jnp.maximum(squares[::-1], 0))
    inverse = _inverse(values, significant(values, shape))[:rank]
    values, vectors = values[:rank], vectors[:, ::-1][:, :rank]
    left = _by_rows([matrix], vectors * inverse[None])
    real, zero = inverse > 0, jnp.zeros((), dtype)  # the others' U is 0 by it
    values = jnp.where(real, values.astype(dtype), zero)
    return left, values, jnp.where(real[:, None], vectors.T.astype(dtype), zero)


def significant(values: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Which singular values of a matrix of that shape are more than rounding."""
    largest = jnp.max(values, initial=0.0)
    epsilon = jnp.asarray(max(shape) * np.finfo(np.float32).eps, values.dtype)
    return values > epsilon * largest


def masked(triples: Triples, kept: jax.Array) -> Triples:
    """Triples, 0 where they are not kept."""
    left, values, right = triples
    zero = jnp.zeros((), values.dtype)
    return (
        jnp.where(kept[None], left, zero),
        jnp.where(kept, values, zero),
        jnp.where(kept[:, None], right, zero),
    )


def polar_product(triples: Sequence[Triples]) -> jax.Array:
    """P(U) diag(S) P(V)ᵀ, (m, n), of the triples of several tasks side by side.

    P(A) = Q Rᵀ for the SVD A = Q D Rᵀ, over the singular values above max(shape) ε
    times the largest: a partial isometry, and what A does not reach stays 0. Where
    float64 is at hand it is A (AᵀA)^(−½), of which A is multiplied last.
    """
    left = [own for own, _, _ in triples]
    values = jnp.concatenate([own for _, own, _ in triples])
    right = [own.T for _, _, own in triples]
    if not _doubled() or 0 in (len(left[0]), len(values), len(right[0])):
        sides = [_polar(jnp.concatenate(own, axis=1)) for own in (left, right)]
        return product(sides[0] * values[None], sides[1])
    inner = _root(left) * values.astype(jnp.float64)[None]
    other = jnp.concatenate(right, axis=1).astype(jnp.float64)
    other = product(other, _root(right))  # which is symmetric
    return _by_rows(left, product(inner, other))


def _polar(matrix: jax.Array) -> jax.Array:
    if 0 in matrix.shape:
        return matrix
    left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    real = significant(values, matrix.shape)
    return product(jnp.where(real[None], left, jnp.zeros((), left.dtype)), right.T)


def _root(parts: Sequence[jax.Array]) -> jax.Array:
    """(AᵀA)^(−½) over what is significant, float64 (R, R), of A (m, R).

    A is parts side by side, the columns of each orthonormal but for rounding, or 0.
    """
    gram = _gram(parts)
    shape = len(parts[0]), len(gram)
    if len(parts) == 2:
        return _root_of_two(gram, parts[0].shape[1], shape)
    squares, vectors = jnp.linalg.eigh(gram)
    values = jnp.sqrt(jnp.maximum(squares, 0))
    inverse = _inverse(values, significant(values, shape))
    return product(vectors * inverse[None], vectors)


def _root_of_two(gram: jax.Array, size: int, shape: Sequence[int]) -> jax.Array:
    """The same of two parts, by the eigenvectors of one: an eighth of the work.

    Made orthonormal to the last bit they have the Gram matrix [[1, C], [Cᵀ, 1]] with
    eigenvalues 1 ± c, C = X c Yᵀ. Its root is [[1 + X (a − 1) Xᵀ, X b Yᵀ],
    [Y b Xᵀ, Y a Yᵀ]], a and b being half of (1 + c)^(−½) ± (1 − c)^(−½).
    """
    # C to the last bit: of tasks that are alike 1 − c is then 0, and not rounding.
    first, second = _to_unit(gram[:size, :size]), _to_unit(gram[size:, size:])
    cross = product(product(first, gram[size:, :size]), second)
    squares, y = jnp.linalg.eigh(product(cross.T, cross.T))
    c = jnp.sqrt(jnp.clip(squares, 1e-12, 1))  # X c is C Y: where it is 0, c divides 0
    both = jnp.sqrt(jnp.stack([1 + c, 1 - c]))
    plus, minus = _inverse(both, significant(both, shape))
    a, b, xc = (plus + minus) / 2, (plus - minus) / 2, product(cross, y.T)
    identity = jnp.eye(size, dtype=c.dtype)
    across = product(xc * (b / c)[None], y)
    return jnp.block(
        [
            [identity + product(xc * ((a - 1) / (c * c))[None], xc), across],
            [across.T, product(y * a[None], y)],
        ]
    )


def _to_unit(gram: jax.Array) -> jax.Array:
    """T with T G Tᵀ = 1, but for columns of 0, of a Gram matrix that is all but 1."""
    nothing = jnp.diagonal(gram) == 0
    lower = jnp.linalg.cholesky(gram + jnp.diag(nothing.astype(gram.dtype)))
    identity = jnp.eye(len(gram), dtype=gram.dtype)
    return jax.scipy.linalg.solve_triangular(lower, identity, lower=True)


def _inverse(values: jax.Array, real: jax.Array) -> jax.Array:
    """1 / σ, 0 where σ is not real."""
    one, zero = jnp.ones((), values.dtype), jnp.zeros((), values.dtype)
    return jnp.where(real, one / jnp.where(real, values, one), zero)


def _doubled() -> bool:
    """Whether what is traced now may have float64, whatever its inputs are."""
    return jax.dtypes.canonicalize_dtype(np.float64) == np.float64


_ROWS = 2048  # that are float64 at once: a vocabulary's matrix is never so whole
_STRIPS = 4  # of columns, of a Gram matrix: what is left of the diagonal is known


def _by_rows(parts: Sequence[jax.Array], other: jax.Array) -> jax.Array:
    """A B, A being parts side by side, B in float64; in the dtype of A."""

    def write(rows: jax.Array, start: Any, done: Any, made: jax.Array) -> jax.Array:
        own = product(rows, other.T).astype(made.dtype)
        return jax.lax.dynamic_update_slice_in_dim(made, own, start, 0)

    # Of B's, so that the compiler does not make it before B is there.
    first = other[:1, :1].astype(parts[0].dtype)
    made = jnp.broadcast_to(first, (len(parts[0]), other.shape[1]))
    return _over_rows(parts, write, made)


def _gram(parts: Sequence[jax.Array]) -> jax.Array:
    """AᵀA in float64, A being parts side by side."""
    columns = sum(part.shape[1] for part in parts)
    width = max(1, -(-columns // _STRIPS))
    starts = range(0, columns, width)

    def add(rows: jax.Array, start: Any, done: Any, strips: Any) -> list[jax.Array]:
        new = jax.lax.broadcasted_iota(jnp.int32, (len(rows), 1), 0) >= done
        rows = jnp.where(new, rows, jnp.zeros((), rows.dtype))
        return [
            own + product(rows[:, at : at + width].T, rows[:, at:].T)
            for own, at in zip(strips, starts, strict=True)
        ]

    zeros = [
        jnp.zeros((min(width, columns - at), columns - at), jnp.float64)
        for at in starts
    ]
    strips = zip(_over_rows(parts, add, zeros), starts, strict=True)
    upper = jnp.concatenate([jnp.pad(own, ((0, 0), (at, 0))) for own, at in strips])
    return jnp.triu(upper) + jnp.triu(upper, 1).T


def _over_rows(parts: Sequence[jax.Array], function: Any, state: Any) -> Any:
    """The state after all function(rows in float64, start, done, state).

    In a loop: the compiler would have all the rows at once otherwise. Of the last rows
    so many are done already, so that all loops are of one shape.
    """
    rows = len(parts[0])
    count = min(rows, _ROWS)

    def step(i: Any, state: Any) -> Any:
        start = jnp.minimum(i * count, rows - count)
        own = [jax.lax.dynamic_slice_in_dim(part, start, count) for part in parts]
        wide = jnp.concatenate(own, axis=1).astype(jnp.float64)
        return function(wide, start, (i * count - start).astype(jnp.int32), state)

    return jax.lax.fori_loop(0, -(-rows // count), step, state)


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a bᵀ at the highest precision."""
    return jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)


def mean(tasks: Sequence[jax.Array]) -> jax.Array:
    """mean_k τ_k: what becomes of tensors that are no matrices."""
    return sum_over_models(tasks) / jnp.asarray(len(tasks), tasks[0].dtype)
