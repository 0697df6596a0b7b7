"""Low-rank matrices as pairs of factors, in NumPy's float64.

A change of rank r is b·a, of b (out, r) and a (r, in). Nothing of size out × in is made
but by `dense`. Singular values at or below max(out, in) · 2^-52 of the largest count as
zero. LAPACK's results differ in their last bits between machines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

OVERSAMPLING, POWERS = 16, 4  # of the randomised SVD; ours


class Pair(NamedTuple):
    """The matrix b·a."""

    a: np.ndarray
    b: np.ndarray

    @property
    def rank(self) -> int:
        return len(self.a)

    @property
    def dense(self) -> np.ndarray:
        return self.b @ self.a


class Svd(NamedTuple):
    """u · diag(values) · vt, values descending."""

    u: np.ndarray
    values: np.ndarray
    vt: np.ndarray

    def cut(self, rank: int) -> Pair:
        """The first triples, the root of each singular value on either side."""
        roots = np.sqrt(self.values[:rank])
        return Pair(roots[:, None] * self.vt[:rank], self.u[:, :rank] * roots)


def exact(matrix: np.ndarray) -> Svd:
    return Svd(*np.linalg.svd(matrix, full_matrices=False))


def randomised(matrix: np.ndarray, rank: int, sketch: np.ndarray) -> Svd:
    """The first `rank` triples, nearly: subspace iteration on a random sketch.

    Args:
      matrix: (m, n).
      rank: how many.
      sketch: (n, rank + OVERSAMPLING), normal.

    Source: Halko, Martinsson, Tropp, arXiv 0909.4061, algorithm 4.4.
    """
    basis, _ = np.linalg.qr(matrix @ sketch)
    for _ in range(POWERS):
        other, _ = np.linalg.qr(matrix.T @ basis)
        basis, _ = np.linalg.qr(matrix @ other)
    u, values, vt = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    return Svd((basis @ u)[:, :rank], values[:rank], vt[:rank])


def kept(svd: Svd, rank: int | None, energy: float | None, total: float) -> int:
    """How many triples are kept: as few as hold `energy` of the sum of squares.

    Args:
      svd: of the matrix.
      rank: at most so many; None: no limit.
      energy: share of `total`, 0 to 1; None: all that is not zero.
      total: sum of the matrix's squares.
    """
    edge = max(len(svd.u), svd.vt.shape[-1]) * 2.0**-52
    count = int(np.count_nonzero(svd.values > edge * svd.values[:1]))
    if energy is not None:
        sums = np.cumsum(np.square(svd.values[:count]))
        count = min(count, int(np.searchsorted(sums, energy * total)) + 1)
    return count if rank is None else min(count, rank)


def joined(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """Σ_k w_k b_k a_k, exactly: the factors side by side, without those of weight 0."""
    used = [(pair, w) for pair, w in zip(pairs, weights, strict=True) if w]
    if not used:
        return Pair(pairs[0].a[:0], pairs[0].b[:, :0])
    a = np.concatenate([pair.a for pair, _ in used])
    b = np.concatenate([w * pair.b for pair, w in used], axis=1)
    return Pair(a, b)


def decomposed(pair: Pair) -> Svd:
    """The SVD of b·a by way of its factors: b = Q_b R_b, aᵀ = Q_a R_a, and the SVD of
    R_b R_aᵀ."""
    left, rb = np.linalg.qr(pair.b)
    right, ra = np.linalg.qr(pair.a.T)
    u, values, vt = np.linalg.svd(rb @ ra.T, full_matrices=False)
    return Svd(left @ u, values, vt @ right.T)


def norm(pair: Pair) -> float:
    """‖b·a‖_F."""
    _, rb = np.linalg.qr(pair.b)
    _, ra = np.linalg.qr(pair.a.T)
    return float(np.linalg.norm(rb @ ra.T))


class Core(NamedTuple):
    """Matrices b_k a_k as u · m_k · vt: all of them in one small space.

    Attributes:
      u: (out, p), orthonormal, spans all b_k.
      vt: (q, in), orthonormal, spans all a_k.
      cores: (p, q) of each matrix.
    """

    u: np.ndarray
    vt: np.ndarray
    cores: list[np.ndarray]

    def back(self, core: np.ndarray) -> Svd:
        """The SVD of u · core · vt."""
        u, values, vt = exact(core)
        return Svd(self.u @ u, values, vt @ self.vt)


def core(pairs: Sequence[Pair], scalings: Sequence[float]) -> Core:
    """The space that all adapters share, and each of them in it.

    u is the left singular basis of [b_1 … b_K], vt the right one of [a_1; …; a_K],
    m_k = s_k uᵀ b_k a_k v. Exact, whatever the ranks.

    Source: Core Space, arXiv 2509.17786.
    """
    u, _, _ = exact(np.concatenate([pair.b for pair in pairs], axis=1))
    _, _, vt = exact(np.concatenate([pair.a for pair in pairs]))
    each = zip(pairs, scalings, strict=True)
    return Core(u, vt, [s * (u.T @ p.b) @ (p.a @ vt.T) for p, s in each])


def relative_error(change: float, left: float) -> float:
    """‖left‖ / ‖change‖; 0 where there is no change."""
    return left / change if change else math.inf if left else 0.0
