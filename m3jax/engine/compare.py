"""Compares two checkpoints tensor by tensor, streamed: memory does not grow with them.

For tensors A and B of one shape, seen as flat vectors of float64:

    relative distance   ‖A − B‖ / ‖A‖
    cosine              A · B / (‖A‖ ‖B‖)
    equal               share of entries with the same bits; where the dtypes differ,
                        with the same value
    largest difference  max |A − B|

The sums are taken in float64 over tiles of fixed size, so no result depends on the
number of threads (each compares whole tensors) or the size of a chunk. Entries that
are NaN or infinite on a side are counted and left out of the sums.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.folder import Checkpoint
from m3jax.checkpoints.source import Source, byte_size
from m3jax.checkpoints.sources import quantised
from m3jax.engine.pipeline import Clock, for_each, reading_threads
from m3jax.engine.progress import Progress

# Elements whose products one BLAS call adds up: fixed, so that no sum depends on
# chunks, and below the 10 000 from which OpenBLAS starts threads of its own.
TILE = 4096
_BLOCK = 16 * TILE  # elements widened to float64 at a time; they stay in the cache
CHUNK = 1 << 20  # elements that a thread reads at a time


Described = tuple[str, tuple[int, ...]]  # dtype and shape


class Sums(NamedTuple):
    """What is added up over pairs of entries (a, b); see `add`.

    Attributes:
      elements: number of pairs.
      equal: pairs that are equal.
      nonfinite: pairs with a NaN or an infinity, left out of what follows.
      a_squared, b_squared: Σ a² and Σ b².
      product: Σ a·b.
      difference_squared: Σ (a − b)².
      largest: max |a − b|, 0 without pairs.
    """

    elements: int = 0
    equal: int = 0
    nonfinite: int = 0
    a_squared: float = 0.0
    b_squared: float = 0.0
    product: float = 0.0
    difference_squared: float = 0.0
    largest: float = 0.0

    @property
    def distance(self) -> float:
        """‖A − B‖."""
        return math.sqrt(self.difference_squared)

    @property
    def relative_distance(self) -> float | None:
        """‖A − B‖ / ‖A‖; 0 where both are 0, None where only A is."""
        if self.difference_squared == 0:
            return 0.0
        return _quotient(self.distance, math.sqrt(self.a_squared))

    @property
    def cosine(self) -> float | None:
        """None where a side is 0."""
        norms = math.sqrt(self.a_squared) * math.sqrt(self.b_squared)
        cosine = _quotient(self.product, norms)
        return None if cosine is None else max(-1.0, min(1.0, cosine))

    @property
    def equal_share(self) -> float | None:
        """None where there are no entries."""
        return _quotient(self.equal, self.elements)


def add(sums: Iterable[Sums]) -> Sums:
    """The sums over several tensors."""
    *columns, largest = zip(Sums(), *sums, strict=True)
    return Sums._make([*map(sum, columns), max(largest)])


@dataclasses.dataclass(frozen=True)
class Compared:
    """One tensor that both checkpoints have, of one shape.

    Attributes:
      name: of the tensor.
      shape: of it.
      dtypes: as stored in A and in B.
      integer: whether it holds integers or bools, which merges copy: positions, masks.
      sums: over its entries.
    """

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, str]
    integer: bool
    sums: Sums

    @property
    def same(self) -> bool:
        """Whether dtype and all entries are equal."""
        return len(set(self.dtypes)) == 1 and self.sums.equal == self.sums.elements


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two checkpoints, compared.

    Attributes:
      tensors: those that could be compared, in order of their names.
      unpaired: the others, dtype and shape as stored in A and in B: those that one
        side lacks (None), and those whose shapes differ.
      notes: what the user should know, one line each.
    """

    tensors: tuple[Compared, ...]
    unpaired: Mapping[str, tuple[Described | None, Described | None]]
    notes: tuple[str, ...]

    @property
    def weights(self) -> tuple[Compared, ...]:
        """The tensors of floats; where there is none, all.

        The norm of a list of positions, 0, 1, 2, …, would swamp that of the weights.
        """
        return tuple(t for t in self.tensors if not t.integer) or self.tensors

    @property
    def total(self) -> Sums:
        """The sums over `weights`."""
        return add(tensor.sums for tensor in self.weights)

    @property
    def same(self) -> bool:
        """Whether names, dtypes, shapes and all entries are equal."""
        return not self.unpaired and all(tensor.same for tensor in self.tensors)


def compare(
    a: Checkpoint,
    b: Checkpoint,
    *,
    threads: int | None = None,
    chunk_size: int = CHUNK,
    progress: Progress | None = None,
) -> Comparison:
    """Compares two checkpoints, opened with ``mergeable=False``.

    float8 weights are compared dequantised where the scales beside them are
    understood; the scales are compared as tensors of their own.

    Args:
      a, b: the checkpoints.
      threads: that read and compute; None: one more than cores, at most 16.
      chunk_size: elements read at a time, rounded up to whole blocks.
      progress: is told the bytes read.

    Raises:
      CheckpointError: a file was changed or cut off while it was read.
    """
    notes: list[str] = []
    progress = progress or Progress()
    sides = _weights(a, notes), _weights(b, notes)
    pairs = {
        name: (sides[0][name], sides[1][name])
        for name in sorted(sides[0])
        if name in sides[1]
    }
    paired = [name for name, (x, y) in pairs.items() if x.shape == y.shape]
    progress.stage("comparing", sum(byte_size(s) for n in paired for s in pairs[n]))
    sums: dict[str, Sums] = {}

    def work(name: str, buffers: _Buffers, turn: Any) -> None:
        sums[name] = buffers.compare(*pairs[name], progress)

    chunk = -(-chunk_size // _BLOCK) * _BLOCK
    count = max(1, min(reading_threads(threads), len(paired)))
    buffers = [_Buffers(chunk) for _ in range(count)]
    for_each(paired, buffers, work, Clock())
    return Comparison(
        tensors=tuple(
            Compared(
                name,
                pairs[name][0].shape,
                (a.stored[name].dtype.code, b.stored[name].dtype.code),
                all(side.dtype.kind == "exact" for side in pairs[name]),
                sums[name],
            )
            for name in paired
        ),
        unpaired={
            name: (_described(a, name), _described(b, name))
            for name in sorted({*a.stored, *b.stored} - sums.keys())
        },
        notes=tuple(notes),
    )


def _weights(checkpoint: Checkpoint, notes: list[str]) -> Mapping[str, Source]:
    """The stored tensors, dequantised where that can be."""
    stored: dict[str, Source] = dict(checkpoint.stored)
    if checkpoint.format == "adapter":
        notes.append(
            f"{checkpoint.name}: an adapter (LoRA), compared as it is stored; "
            f"BASE+{checkpoint.name} is what it makes of its base"
        )
    try:
        weights = quantised.weights_of(stored, checkpoint.config).tensors
    except CheckpointError as error:
        notes.append(f"{checkpoint.name}: compared as codes: {error}")
        return stored
    return stored | weights


def _described(checkpoint: Checkpoint, name: str) -> Described | None:
    tensor = checkpoint.stored.get(name)
    return None if tensor is None else (tensor.dtype.code, tensor.shape)


class _Buffers:
    """What one thread reads into and computes in, for every chunk anew."""

    def __init__(self, chunk: int):
        # Of the widest dtype; pages that narrower ones do not touch cost nothing.
        self._bytes = np.empty((2, 8 * chunk), np.uint8)
        self._wide = np.empty((3, _BLOCK), np.float64)
        self._chunk = chunk

    def compare(self, a: Source, b: Source, progress: Progress) -> Sums:
        """The sums over a tensor, which adds up its blocks in their order."""
        size = math.prod(a.shape)
        sums = []
        for start in range(0, size, self._chunk):
            sides = []
            for source, buffer in zip((a, b), self._bytes, strict=True):
                count = min(self._chunk, size - start)
                side = buffer[: count * source.dtype.itemsize].view(source.dtype.numpy)
                source.read_into(side, start)
                sides.append(side)
            for first in range(0, count, _BLOCK):
                block = slice(first, first + _BLOCK)
                sums.append(self._block(sides[0][block], sides[1][block]))
            progress.advance(sum(side.nbytes for side in sides))
        return add(sums)

    def _block(self, a: np.ndarray, b: np.ndarray) -> Sums:
        """The sums over a block: (n,) entries of each side, n <= _BLOCK."""
        count = len(a)
        wide = self._wide[:, : -(-count // TILE) * TILE]  # the last tile ends in zeros
        wide[:2, count:] = 0
        wide[0, :count], wide[1, :count] = a, b
        if a.dtype == b.dtype:
            bits = f"u{a.itemsize}"
            equal = int(np.count_nonzero(a.view(bits) == b.view(bits)))
        else:
            equal = int(np.count_nonzero(wide[0, :count] == wide[1, :count]))
        found, nonfinite = _sums(*wide), 0
        if not np.isfinite(found).all():
            bad = ~np.isfinite(wide[:2]).all(axis=0)
            nonfinite = int(np.count_nonzero(bad))
            wide[:2, bad] = 0
            found = _sums(*wide)
        return Sums(count, equal, nonfinite, *found)


def _sums(x: np.ndarray, y: np.ndarray, difference: np.ndarray) -> list[float]:
    """Σ x², Σ y², Σ x·y, Σ (x − y)² and max |x − y|; `difference` is overwritten."""
    with np.errstate(over="ignore", invalid="ignore"):  # float64 squares may overflow
        np.subtract(x, y, out=difference)
        tiles = [side.reshape(-1, TILE) for side in (x, y, difference)]
        pairs = (0, 0), (1, 1), (0, 1), (2, 2)
        sums = [float(np.vecdot(tiles[i], tiles[j]).sum()) for i, j in pairs]
    return [*sums, max(float(difference.max()), -float(difference.min()))]


def _quotient(numerator: float, denominator: float) -> float | None:
    """None where it is not a finite number."""
    if denominator == 0 or not math.isfinite(denominator):
        return None
    quotient = numerator / denominator
    return quotient if math.isfinite(quotient) else None
