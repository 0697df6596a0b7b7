"""Weights with a low-rank change, θ + s·B·A, made as they are read.

Rounding: θ, B and A are taken as float64, where the product, the sum and DoRA's
quotient are made; what enters the merge is that, rounded once to float32 (float64 where
θ is). Nothing is rounded to the dtype of the base or of the adapter in between.

No order of summation shows: B and A are split, row by row and column by column, into
integers under a power of two (two limbs of 20 to 26 bits), whose products a float64
adds up without rounding. So any range of elements, read by any number of threads with
any library, has the same bits. What the two limbs do not hold is below 2^-40 of the
largest entry of a row of B times that of a column of A.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.formats.dtypes import FLOAT32, FLOAT64, Dtype
from m3jax.checkpoints.source import Derived, Source, read

_PART = 1 << 18  # elements of a product that are made at a time
KEPT = 4  # right factors of an adapter, in limbs, that are kept for the next read


@dataclasses.dataclass(frozen=True)
class Factor:
    """A matrix (rows, rank), stored as it is or transposed.

    Attributes:
      source: all axes but the rank are taken as one.
      transposed: it is stored as (rank, rows).
      name: for errors.
    """

    source: Source
    transposed: bool
    name: str

    @property
    def rank(self) -> int:
        return self.source.shape[0 if self.transposed else 1]

    @property
    def rows(self) -> int:
        shape = self.source.shape
        return math.prod(shape[1:]) if self.transposed else shape[0]

    def read(self, first: int, count: int) -> np.ndarray:
        """Rows [first, first + count), (count, rank) float64.

        Raises:
          CheckpointError: one of them holds NaN or infinity.
        """
        stored = np.empty(count * self.rank, self.source.dtype.numpy)
        if self.transposed:
            for k in range(self.rank):
                own = stored[k * count : (k + 1) * count]
                self.source.read_into(own, k * self.rows + first)
            values = stored.reshape(self.rank, count).T
        else:
            self.source.read_into(stored, first * self.rank)
            values = stored.reshape(count, self.rank)
        wide = values.astype(np.float64)
        if not np.isfinite(wide).all():
            raise CheckpointError(
                f"{self.name}: holds NaN or infinity; the training of this adapter "
                "failed, take an earlier one"
            )
        return wide


class Limbs(NamedTuple):
    """A matrix (n, rank) as (high + low · 2^-bits) · scale, row by row.

    Attributes:
      high, low: (n, rank) float64, integers of at most `bits` bits.
      scale: (n, 1) float64, powers of two.
    """

    high: np.ndarray
    low: np.ndarray
    scale: np.ndarray


def _bits(rank: int) -> int:
    """So that `rank` products of two limbs add up to no more than 2^53."""
    return (53 - math.ceil(math.log2(max(rank, 1)))) // 2


def split(values: np.ndarray) -> Limbs:
    """The limbs of a float64 matrix (n, rank)."""
    bits = _bits(values.shape[1])
    largest = np.abs(values).max(axis=1, keepdims=True, initial=0.0)
    scale = np.ldexp(1.0, np.frexp(largest)[1] - bits)
    scaled = values / scale
    high = np.rint(scaled)
    return Limbs(high, np.rint((scaled - high) * 2.0**bits), scale)


def product(left: Limbs, right: Limbs) -> np.ndarray:
    """left · rightᵀ, float64, without a rounding that depends on an order."""
    total = left.high @ right.high.T
    small = np.zeros((), np.float64)
    for a, b in ((left.high, right.low), (left.low, right.high)):
        if a.any() and b.any():
            small = small + a @ b.T
    return (total + small * 2.0 ** -_bits(left.high.shape[1])) * (
        left.scale * right.scale.T
    )


def whole(factor: Factor) -> Limbs:
    return split(factor.read(0, factor.rows))


class _Changed(Derived):
    """A tensor that is computed: float32, or float64 where it was."""

    @property
    def dtype(self) -> Dtype:
        return FLOAT64 if self.source.dtype == FLOAT64 else FLOAT32


@dataclasses.dataclass(frozen=True)
class Adapted(_Changed):
    """θ + s·L·Rᵀ, or DoRA's m ⊙ (θ + s·L·Rᵀ) / ‖θ + s·L·Rᵀ‖.

    Of a tensor of more than two dimensions, all but the first are columns.

    Attributes:
      source: θ.
      left: L, (rows, rank).
      right: R, (columns, rank).
      scaling: s.
      place: the file of the adapter.
      limbs: of a right factor; keeps the last ones.
      magnitude: DoRA's m, one number for each output of the layer.
      by_column: the outputs are the columns of θ, as in GPT-2 and embeddings.
    """

    left: Factor
    right: Factor
    scaling: float
    place: str
    limbs: Callable[[Factor], Limbs] = whole
    magnitude: Source | None = None
    by_column: bool = False

    def read_into(self, out: np.ndarray, start: int) -> None:
        # NaN and infinity are for the check for non-finite values to report.
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            for first, values in self._blocks(start, len(out)):
                if self.magnitude is not None:
                    places = np.arange(first, first + len(values))
                    columns = self.right.rows
                    places = places % columns if self.by_column else places // columns
                    values *= self._factors[places]
                out[first - start : first - start + len(values)] = values

    @functools.cached_property
    def _factors(self) -> np.ndarray:
        """DoRA's m / ‖·‖ for each output."""
        assert self.magnitude is not None
        columns = self.right.rows
        squares = np.zeros(columns if self.by_column else self.left.rows)
        for first, values in self._blocks(0, math.prod(self.shape)):
            rows = np.square(values).reshape(-1, columns)
            if self.by_column:
                squares += rows.sum(axis=0)
            else:
                row = first // columns
                squares[row : row + len(rows)] = rows.sum(axis=1)
        magnitude = read(self.magnitude, 0, len(squares))
        return magnitude.astype(np.float64) / np.sqrt(squares)

    def _blocks(self, start: int, count: int) -> Iterator[tuple[int, np.ndarray]]:
        """θ + s·L·Rᵀ in float64: (first element, elements), of whole rows but at the
        ends; from element 0 the blocks are the same for every reader."""
        columns, stop = self.right.rows, start + count
        if not count:
            return
        right = self.limbs(self.right)
        step = max(1, _PART // columns)
        for row in range(start // columns, -(-stop // columns), step):
            rows = min(step, -(-stop // columns) - row)
            change = product(split(self.left.read(row, rows)), right)
            first = max(start, row * columns)
            last = min(stop, (row + rows) * columns)
            values = read(self.source, first, last - first)
            within = change.reshape(-1)[first - row * columns : last - row * columns]
            yield first, values.astype(np.float64) + self.scaling * within


@dataclasses.dataclass(frozen=True)
class Shifted(_Changed):
    """A bias with an adapter's own bias added: b + s·c, rounded as `Adapted` is."""

    change: Source
    scaling: float
    place: str

    def read_into(self, out: np.ndarray, start: int) -> None:
        values, change = (
            read(source, start, len(out)).astype(np.float64)
            for source in (self.source, self.change)
        )
        with np.errstate(over="ignore", invalid="ignore"):
            out[:] = values + self.scaling * change


@dataclasses.dataclass(frozen=True)
class Replaced(Derived):
    """A tensor that an adapter brings whole; written in the dtype of the base's own."""

    own: Source | None
    place: str

    @property
    def output_dtype(self) -> Dtype:
        return self.source.output_dtype if self.own is None else self.own.output_dtype


@dataclasses.dataclass(frozen=True)
class WithRows(_Changed):
    """A matrix some of whose rows an adapter brings: the tokens that it trained.

    Attributes:
      rows: (len(places), width).
      places: of the rows, ascending.
    """

    rows: Source
    places: tuple[int, ...]
    place: str

    def read_into(self, out: np.ndarray, start: int) -> None:
        width = math.prod(self.shape[1:])
        out[:] = read(self.source, start, len(out))
        for i, row in enumerate(self.places):
            first, last = row * width, (row + 1) * width
            first, last = max(first, start), min(last, start + len(out))
            if first < last:
                values = read(self.rows, first + (i - row) * width, last - first)
                out[first - start : last - start] = values
