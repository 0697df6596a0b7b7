"""Compares two checkpoints tensor by tensor, streamed: memory does not grow with them.

For tensors A and B of one shape, seen as flat vectors of float64:

    relative distance   ‖A − B‖ / ‖A‖
    cosine              A · B / (‖A‖ ‖B‖)
    equal               share of entries with the same bits; where the dtypes differ,
                        with the same value
    largest difference  max |A − B|

The sums are taken in float64 over tiles of fixed size, so no result depends on the
number of threads or the size of a chunk. Entries that are NaN or infinite on a side
are counted and left out of the sums.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.float8 import Dequantised, dequantise
from m3jax.checkpoints.folder import Checkpoint
from m3jax.checkpoints.sources import Source
from m3jax.engine.pipeline import Clock, available_cores, for_each
from m3jax.engine.progress import Progress

# Elements whose products one BLAS call adds up: fixed, so that no sum depends on
# chunks, and below the 10 000 from which OpenBLAS starts threads of its own.
TILE = 4096
_BLOCK = 16 * TILE  # elements widened to float64 at a time; they stay in the cache
CHUNK = 1 << 20  # elements that a thread reads at a time
_MAX_THREADS = 16


@dataclasses.dataclass(frozen=True)
class Sums:
    """What is added up over pairs of entries (a, b); `+` joins tensors.

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

    def __add__(self, other: Sums) -> Sums:
        names = [field.name for field in dataclasses.fields(self)]
        added = {name: getattr(self, name) + getattr(other, name) for name in names}
        return Sums(**{**added, "largest": max(self.largest, other.largest)})

    @property
    def distance(self) -> float:
        """‖A − B‖."""
        return math.sqrt(self.difference_squared)

    @property
    def relative_distance(self) -> float | None:
        """‖A − B‖ / ‖A‖; 0 where both are 0, None where only A is."""
        if self.difference_squared == 0:
            return 0.0
        return _finite(self.distance, math.sqrt(self.a_squared))

    @property
    def cosine(self) -> float | None:
        """None where a side is 0."""
        norms = math.sqrt(self.a_squared) * math.sqrt(self.b_squared)
        cosine = _finite(self.product, norms)
        return None if cosine is None else max(-1.0, min(1.0, cosine))

    @property
    def equal_share(self) -> float | None:
        """None where there are no entries."""
        return self.equal / self.elements if self.elements else None


@dataclasses.dataclass(frozen=True)
class Compared:
    """One tensor that both checkpoints have, of one shape.

    Attributes:
      name: of the tensor.
      shape: of it.
      dtypes: as stored in A and in B.
      sums: over its entries.
    """

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, str]
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
      only_a, only_b: dtype and shape of the tensors that one side alone has.
      shapes: the two shapes of the tensors whose shapes differ.
      notes: what the user should know, one line each.
    """

    tensors: tuple[Compared, ...]
    only_a: Mapping[str, tuple[str, tuple[int, ...]]]
    only_b: Mapping[str, tuple[str, tuple[int, ...]]]
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    notes: tuple[str, ...]

    @property
    def total(self) -> Sums:
        return add(tensor.sums for tensor in self.tensors)

    @property
    def same(self) -> bool:
        """Whether names, dtypes, shapes and all entries are equal."""
        unpaired = self.only_a or self.only_b or self.shapes
        return not unpaired and all(tensor.same for tensor in self.tensors)


def add(sums: Iterable[Sums]) -> Sums:
    """The sums over several tensors."""
    return sum(sums, Sums())


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
      chunk_size: elements read at a time, rounded up to whole tiles.
      progress: is told the bytes read.

    Raises:
      CheckpointError: a file was changed or cut off while it was read.
    """
    notes: list[str] = []
    tables = _weights(a, notes), _weights(b, notes)
    shared = sorted(set(tables[0]) & set(tables[1]))
    paired = [n for n in shared if tables[0][n].shape == tables[1][n].shape]
    sums = _add_up(
        [(tables[0][name], tables[1][name]) for name in paired],
        threads or min(_MAX_THREADS, available_cores() + 1),
        -(-chunk_size // TILE) * TILE,
        progress or Progress(),
    )
    return Comparison(
        tensors=tuple(
            Compared(
                name,
                tables[0][name].shape,
                (a.stored[name].dtype.code, b.stored[name].dtype.code),
                sums_of_tensor,
            )
            for name, sums_of_tensor in zip(paired, sums, strict=True)
        ),
        only_a=_only(a, b),
        only_b=_only(b, a),
        shapes={
            name: (tables[0][name].shape, tables[1][name].shape)
            for name in shared
            if name not in set(paired)
        },
        notes=tuple(notes),
    )


def _weights(checkpoint: Checkpoint, notes: list[str]) -> Mapping[str, Source]:
    """The stored tensors, float8 weights dequantised."""
    stored: dict[str, Source] = dict(checkpoint.stored)
    try:
        weights = dequantise(stored, checkpoint.config)
    except CheckpointError as error:
        notes.append(f"{checkpoint.name}: compared as codes: {error}")
        return stored
    dequantised = {n: w for n, w in weights.items() if isinstance(w, Dequantised)}
    return stored | dequantised


def _only(one: Checkpoint, other: Checkpoint) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {
        name: (tensor.dtype.code, tensor.shape)
        for name, tensor in one.stored.items()
        if name not in other.stored
    }


def _add_up(
    pairs: list[tuple[Source, Source]], threads: int, chunk: int, progress: Progress
) -> list[Sums]:
    """The sums of each pair of tensors; the chunks are shared out to threads."""
    sizes = [math.prod(a.shape) for a, _ in pairs]
    chunks = [
        (item, start, min(chunk, size - start))
        for item, size in enumerate(sizes)
        for start in range(0, size, chunk)
    ]
    progress.stage(
        "comparing",
        sum(
            size * (a.dtype.itemsize + b.dtype.itemsize)
            for size, (a, b) in zip(sizes, pairs, strict=True)
        ),
    )
    left = [-(-size // chunk) for size in sizes]
    parts: list[list[_Part]] = [[] for _ in pairs]
    sums = [Sums() for _ in pairs]
    lock = threading.Lock()

    def work(work_item: tuple[int, int, int], lane: _Lane, turn: Any) -> None:
        item, start, count = work_item
        part = lane.compare(*pairs[item], start, count)
        with lock:
            parts[item].append(part)
            left[item] -= 1
            complete = left[item] == 0
        if complete:  # frees what was kept of its tiles
            sums[item] = _join(parts[item])
            parts[item] = []
        progress.advance(count * sum(side.dtype.itemsize for side in pairs[item]))

    lanes = [_Lane(chunk) for _ in range(max(1, min(threads, len(chunks))))]
    for_each(chunks, lanes, work, Clock())
    return sums


@dataclasses.dataclass
class _Part:
    """What a chunk adds to the sums of a tensor.

    Attributes:
      start: its first element.
      elements: of the chunk.
      tiles: (4, tiles) float64: Σ a², Σ b², Σ a·b, Σ (a − b)² of each tile.
      equal, nonfinite, largest: as in `Sums`.
    """

    start: int
    elements: int
    tiles: np.ndarray
    equal: int = 0
    nonfinite: int = 0
    largest: float = 0.0


def _join(parts: list[_Part]) -> Sums:
    """Adds up a tensor's parts, whose tiles are brought into order first."""
    parts = sorted(parts, key=lambda part: part.start)
    with np.errstate(over="ignore", invalid="ignore"):  # float64 squares may overflow
        sums = np.concatenate([part.tiles for part in parts], axis=1).sum(axis=1)
    a_squared, b_squared, product, difference_squared = sums.tolist()
    return Sums(
        elements=sum(part.elements for part in parts),
        equal=sum(part.equal for part in parts),
        nonfinite=sum(part.nonfinite for part in parts),
        a_squared=a_squared,
        b_squared=b_squared,
        product=product,
        difference_squared=difference_squared,
        largest=max(part.largest for part in parts),
    )


class _Lane:
    """The buffers of one thread, reused for every chunk."""

    def __init__(self, chunk: int):
        # Of the widest dtype; pages that narrower ones do not touch cost nothing.
        self._bytes = np.empty((2, 8 * chunk), np.uint8)
        self._wide = np.empty((3, min(chunk, _BLOCK)), np.float64)
        self._same = np.empty(min(chunk, _BLOCK), np.bool_)

    def compare(self, a: Source, b: Source, start: int, count: int) -> _Part:
        """Compares elements [start, start + count); `start` begins a tile."""
        sides = []
        for source, buffer in zip((a, b), self._bytes, strict=True):
            side = buffer[: count * source.dtype.itemsize].view(source.dtype.numpy)
            source.read_into(side, start)
            sides.append(side)
        part = self._add_up(start, *sides, finite_only=False)
        if not np.isfinite(part.tiles).all():
            part = self._add_up(start, *sides, finite_only=True)
        return part

    def _add_up(
        self, start: int, a: np.ndarray, b: np.ndarray, *, finite_only: bool
    ) -> _Part:
        part = _Part(start, len(a), np.empty((4, -(-len(a) // TILE))))
        with np.errstate(over="ignore", invalid="ignore"):
            for first in range(0, len(a), _BLOCK):
                block = slice(first, first + _BLOCK)
                tiles = part.tiles[:, first // TILE : (first + _BLOCK) // TILE]
                self._add_block(a[block], b[block], part, tiles, finite_only)
        return part

    def _add_block(
        self,
        a: np.ndarray,
        b: np.ndarray,
        part: _Part,
        tiles: np.ndarray,
        finite_only: bool,
    ) -> None:
        """Adds a block's counts to `part` and writes the sums of its tiles."""
        count = len(a)
        wide_a, wide_b, difference = self._wide[:, :count]
        same = self._same[:count]
        np.copyto(wide_a, a, casting="unsafe")
        np.copyto(wide_b, b, casting="unsafe")
        if a.dtype == b.dtype:
            bits = f"u{a.itemsize}"
            np.equal(a.view(bits), b.view(bits), out=same)
        else:
            np.equal(wide_a, wide_b, out=same)
        part.equal += int(np.count_nonzero(same))
        if finite_only:
            bad = ~(np.isfinite(wide_a) & np.isfinite(wide_b))
            part.nonfinite += int(np.count_nonzero(bad))
            wide_a[bad] = wide_b[bad] = 0
        np.subtract(wide_a, wide_b, out=difference)
        part.largest = max(
            part.largest, float(difference.max()), -float(difference.min())
        )
        pairs = (wide_a, wide_a), (wide_b, wide_b), (wide_a, wide_b), (difference,) * 2
        full = count // TILE * TILE
        for (x, y), sums in zip(pairs, tiles, strict=True):
            if full:
                rows = x[:full].reshape(-1, TILE), y[:full].reshape(-1, TILE)
                np.vecdot(*rows, out=sums[: full // TILE])
            if full < count:  # the last tile of a tensor may be shorter
                sums[-1] = np.vecdot(x[full:], y[full:])


def _finite(numerator: float, denominator: float) -> float | None:
    """Their quotient, None where it is not a finite number."""
    if denominator == 0 or not math.isfinite(denominator):
        return None
    quotient = numerator / denominator
    return quotient if math.isfinite(quotient) else None
