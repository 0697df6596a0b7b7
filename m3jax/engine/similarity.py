"""How like each other K checkpoints are: streamed, tensor by tensor, all pairs at once.

For tensors x_i of one shape, seen as flat vectors of float64, of parameters θ_i or of
task vectors τ_i = θ_i − θ0:

    norm              ‖x_i‖
    cosine            ⟨x_i, x_j⟩ / (‖x_i‖ ‖x_j‖)
    sign agreement    of the entries that are 0 in neither, the share of equal sign

The sums are taken over tiles of fixed size, so no result depends on threads or chunks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.folder import Checkpoint
from m3jax.checkpoints.source import Source, byte_size, read
from m3jax.engine.pipeline import Clock, for_each, reading_threads
from m3jax.engine.progress import Progress

OF = ("parameters", "task vectors")
# Entries widened to float64 at a time; below what BLAS splits between its own threads.
_TILE = 4096


@dataclasses.dataclass(frozen=True)
class Pairs:
    """What is added up over the entries of tensors, for all pairs of K vectors.

    Attributes:
      elements: entries of each.
      products: ⟨x_i, x_j⟩, (K, K) float64.
      alike: entries of equal sign, 0 in neither, (K, K) int64.
      both: entries that are 0 in neither, (K, K) int64.
    """

    elements: int
    products: np.ndarray
    alike: np.ndarray
    both: np.ndarray

    @property
    def norms(self) -> np.ndarray:
        """‖x_i‖, (K,)."""
        return np.sqrt(np.diagonal(self.products))

    @property
    def cosines(self) -> np.ndarray:
        """(K, K); NaN where a side is 0 or not finite."""
        norms = self.norms
        with np.errstate(all="ignore"):
            return np.clip(self.products / np.outer(norms, norms), -1.0, 1.0)

    @property
    def sign_agreement(self) -> np.ndarray:
        """(K, K); NaN where no entry differs from 0 on both sides."""
        with np.errstate(all="ignore"):
            return self.alike / self.both


def add(pairs: Iterable[Pairs]) -> Pairs:
    """The sums over several tensors, one at the least."""
    own = list(pairs)
    return Pairs(
        sum(p.elements for p in own),
        np.sum([p.products for p in own], axis=0),
        np.sum([p.alike for p in own], axis=0),
        np.sum([p.both for p in own], axis=0),
    )


@dataclasses.dataclass(frozen=True)
class Similarity:
    """K checkpoints, compared.

    Attributes:
      names: of the checkpoints.
      tensors: for each of `OF`, the pairs of each tensor of floats by name; without a
        base of parameters alone.
      notes: what the user should know, one line each.
    """

    names: tuple[str, ...]
    tensors: Mapping[str, Mapping[str, Pairs]]
    notes: tuple[str, ...]

    def total(self, of: str) -> Pairs:
        """The sums over all tensors."""
        return add(self.tensors[of].values())


def similarity(
    models: Sequence[Checkpoint],
    base: Checkpoint | None = None,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Similarity:
    """Compares all pairs of checkpoints in one pass over their tensors of floats.

    Memory: a tile of each checkpoint per thread.

    Args:
      models: K checkpoints, two or more.
      base: θ0, for task vectors.
      threads: that read and compute; None: one more than cores, at most 16.
      progress: is told the bytes read.

    Raises:
      CheckpointError: no tensor of floats is in all of them, or a file was changed or
        cut off while it was read.
    """
    every = [*models, *(() if base is None else (base,))]
    names, notes = _shared(every)
    progress = progress or Progress()
    sources = {name: [own.tensors[name] for own in every] for name in names}
    progress.stage(
        "comparing", sum(byte_size(s) for own in sources.values() for s in own)
    )
    found: dict[str, list[Pairs]] = {}

    def work(name: str, worker: None, turn: object) -> None:
        found[name] = _of_tensor(sources[name], base is not None, progress)

    count = max(1, min(reading_threads(threads), len(names)))
    for_each(names, [None] * count, work, Clock())
    return Similarity(
        tuple(model.name for model in models),
        {
            of: {name: found[name][place] for name in names}
            for place, of in enumerate(OF[: 2 - (base is None)])
        },
        tuple(notes),
    )


def _shared(every: Sequence[Checkpoint]) -> tuple[list[str], list[str]]:
    """The tensors of floats that all have, of one shape; notes on the others."""
    names = sorted(set().union(*(own.tensors for own in every)))
    floats, lacking, unlike = [], [], []
    for name in names:
        own = [c.tensors[name] for c in every if name in c.tensors]
        if any(source.dtype.kind == "exact" for source in own):
            continue
        if len(own) < len(every):
            lacking.append(name)
        elif len({source.shape for source in own}) > 1:
            unlike.append(name)
        elif math.prod(own[0].shape):
            floats.append(name)
    if not floats:
        raise CheckpointError(
            f"{every[0].name} and {every[1].name} have no tensor of floats of one name "
            "and shape in common; give models of one architecture"
        )
    notes = [
        f"{len(some)} tensor{'s' * (len(some) > 1)} left out, {shown(some[0])}"
        f"{', …' * (len(some) > 1)}: {why}"
        for some, why in (
            (lacking, "not in all models"),
            (unlike, "shapes differ"),
        )
        if some
    ]
    return floats, notes


def _of_tensor(
    sources: Sequence[Source], has_base: bool, progress: Progress
) -> list[Pairs]:
    """The pairs of parameters, and of task vectors if the last source is the base."""
    size, count = math.prod(sources[0].shape), len(sources) - has_base
    sums = [_Sums(count) for _ in range(1 + has_base)]
    wide = np.zeros((len(sources), _TILE), np.float64)
    chunk = 64 * _TILE
    for start in range(0, size, chunk):
        length = min(chunk, size - start)
        chunks = [read(source, start, length) for source in sources]
        for first in range(0, length, _TILE):
            part = slice(first, min(first + _TILE, length))
            wide[:, part.stop - first :] = 0
            for row, own in zip(wide, chunks, strict=True):
                row[: part.stop - first] = own[part]
            sums[0].add(wide[:count])
            if has_base:
                sums[1].add(wide[:count] - wide[count])
        progress.advance(sum(own.nbytes for own in chunks))
    return [own.pairs(size) for own in sums]


class _Sums:
    """Sums over tiles, in their order."""

    def __init__(self, count: int):
        self._products = np.zeros((count, count))
        self._signs = np.zeros((count, count))
        self._both = np.zeros((count, count))

    def add(self, tile: np.ndarray) -> None:
        signs = np.sign(tile)
        real = np.abs(signs)
        self._products += tile @ tile.T
        self._signs += signs @ signs.T
        self._both += real @ real.T

    def pairs(self, elements: int) -> Pairs:
        both = self._both.astype(np.int64)
        alike = (both + self._signs.astype(np.int64)) // 2
        return Pairs(elements, self._products, alike, both)
