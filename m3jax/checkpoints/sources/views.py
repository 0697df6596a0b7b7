"""Tensors seen in another layout than they are stored in: cut, put together, turned.

One model is stored with its experts one by one or stacked, with q, k and v apart or in
one tensor. Each view is a `Source`, so nothing whole is held and no file is rewritten.

`inverted` goes the other way: given what makes a tensor F out of stored ones, it finds
each stored one in another model's F.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from m3jax.checkpoints.formats import boxes
from m3jax.checkpoints.formats.boxes import Box
from m3jax.checkpoints.formats.dtypes import FLOAT32, Dtype
from m3jax.checkpoints.source import Converted, Derived, Source, read

_PART = 1 << 18  # elements that are put in their places at a time


@dataclasses.dataclass(frozen=True)
class Part(Derived):
    """A box of a tensor, in a shape of as many elements.

    Attributes:
      box: in `source`.
      own_shape: of the part; axes of one element may be left out.
    """

    box: Box
    own_shape: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.own_shape

    def read_into(self, out: np.ndarray, start: int) -> None:
        done = 0
        for first, count in _runs(self.box, self.source.shape, start, len(out)):
            self.source.read_into(out[done : done + count], first)
            done += count


@dataclasses.dataclass(frozen=True)
class Assembled:
    """A tensor put together of others, which fill it without overlapping.

    Attributes:
      shape: of the whole.
      pieces: each tensor with its box in the whole; sorted by box, of one dtype.
    """

    shape: tuple[int, ...]
    pieces: tuple[tuple[Source, Box], ...]

    @property
    def dtype(self) -> Dtype:
        return self.pieces[0][0].dtype

    @property
    def output_dtype(self) -> Dtype:
        return self.pieces[0][0].output_dtype

    @functools.cached_property
    def _starts(self) -> list[int]:
        return [box[0][0] for _, box in self.pieces]

    def read_into(self, out: np.ndarray, start: int) -> None:
        done = 0
        for box in boxes.of_run(start, len(out), self.shape) if len(out) else ():
            size = math.prod(boxes.box_shape(box))
            whole = out[done : done + size].reshape(boxes.box_shape(box))
            # Pieces are cells of a grid: those that begin last before it, or with it.
            before = self._starts[bisect.bisect_right(self._starts, box[0][0]) - 1]
            first = bisect.bisect_left(self._starts, before)
            for source, place in itertools.islice(self.pieces, first, None):
                if place[0][0] >= box[0][1]:
                    break
                if (common := boxes.overlap(box, place)) is not None:
                    _copy(source, place, common, whole, box)
            done += size


@dataclasses.dataclass(frozen=True)
class Transposed(Derived):
    """A tensor with its last two axes exchanged; holds one matrix at a time."""

    @property
    def shape(self) -> tuple[int, ...]:
        *outer, rows, columns = self.source.shape
        return (*outer, columns, rows)

    def read_into(self, out: np.ndarray, start: int) -> None:
        rows, columns = self.source.shape[-2:]
        size, done = rows * columns, 0
        while done < len(out):
            index, first = divmod(start + done, size)
            count = min(len(out) - done, size - first)
            out[done : done + count] = self._matrix(index)[first : first + count]
            done += count

    def _matrix(self, index: int) -> np.ndarray:
        """The elements of one matrix, turned; the last one that was asked for is kept.

        One attribute is set at once, so that threads that share it read a whole one.
        """
        kept = self.__dict__.get("_kept")
        if kept is not None and kept[0] == index:
            return kept[1]
        rows, columns = self.source.shape[-2:]
        matrix = read(self.source, index * rows * columns, rows * columns)
        turned = matrix.reshape(rows, columns).T.reshape(-1)
        self.__dict__["_kept"] = (index, turned)
        return turned


def stacked(sources: Sequence[Source]) -> Source:
    """Tensors of one shape on a new first axis."""
    shape = (len(sources), *sources[0].shape)
    inner = boxes.whole(sources[0].shape)
    alike = _alike(sources)
    pieces = [(source, ((i, i + 1), *inner)) for i, source in enumerate(alike)]
    return Assembled(shape, tuple(pieces))


def concatenated(sources: Sequence[Source], axis: int) -> Source:
    """Tensors one behind the other along an axis."""
    shape = list(sources[0].shape)
    pieces, start = [], 0
    for source in _alike(sources):
        box = list(boxes.whole(source.shape))
        box[axis] = (start, start + source.shape[axis])
        start = box[axis][1]
        pieces.append((source, tuple(box)))
    shape[axis] = start
    return Assembled(tuple(shape), tuple(pieces))


def chunks(source: Source, count: int, axis: int) -> list[Source]:
    """A tensor cut into `count` parts of one size along an axis."""
    step = source.shape[axis] // count
    found: list[Source] = []
    for i in range(count):
        box = list(boxes.whole(source.shape))
        box[axis] = (i * step, (i + 1) * step)
        found.append(Part(source, tuple(box), boxes.box_shape(tuple(box))))
    return found


Found = dict[int, list[tuple[Source, Box, Source]]]


def inverted(made: Source, other: Source, found: Found) -> None:
    """Finds the stored tensors of one model in another's tensor.

    Args:
      made: what a model's stored tensors make, of views of this file.
      other: the other model's, of the same shape.
      found: gets, by `id` of each stored tensor, it, the box of it that was found,
        and the other model's elements of that box.
    """
    match made:
        case Assembled():
            for source, box in made.pieces:
                inverted(source, Part(other, box, source.shape), found)
        case Transposed():
            inverted(made.source, Transposed(other), found)
        case Converted():
            inverted(made.source, other, found)
        case Part():
            entry = (made.source, made.box, other)
            found.setdefault(id(made.source), []).append(entry)
        case _:
            entry = (made, boxes.whole(made.shape), other)
            found.setdefault(id(made), []).append(entry)


def gathered(entries: Sequence[tuple[Source, Box, Source]]) -> Source | None:
    """One stored tensor of what `inverted` found of it; None where parts lack."""
    stored = entries[0][0]
    if len(entries) == 1 and entries[0][1] == boxes.whole(stored.shape):
        return entries[0][2]
    entries = sorted(entries, key=lambda entry: entry[1])
    held = sum(math.prod(boxes.box_shape(box)) for _, box, _ in entries)
    if held != math.prod(stored.shape):
        return None
    others = _alike([other for _, _, other in entries])
    placed = [(other, e[1]) for other, e in zip(others, entries, strict=True)]
    return Assembled(stored.shape, tuple(placed))


def equal(a: Source, b: Source) -> bool:
    """Whether two tensors are equal bit for bit; read until they differ."""
    if a is b:
        return True
    if (a.dtype.code, a.shape) != (b.dtype.code, b.shape):
        return False
    size = math.prod(a.shape)
    for start in range(0, size, _PART):
        one, other = (read(own, start, min(_PART, size - start)) for own in (a, b))
        if not np.array_equal(one.view(np.uint8), other.view(np.uint8)):
            return False
    return True


def _alike(sources: Sequence[Source]) -> Sequence[Source]:
    """Sources of one dtype: their own, or float32 where they differ."""
    if len({source.dtype.code for source in sources}) == 1:
        return sources
    return [Converted(source, FLOAT32) for source in sources]


def _runs(
    box: Box, shape: Sequence[int], start: int, count: int
) -> Iterator[tuple[int, int]]:
    """(first element, count) of elements [start, start + count) of a box."""
    if not count:
        return
    for part in boxes.of_run(start, count, boxes.box_shape(box)):
        moved = tuple(
            (low + first, high + first)
            for (low, high), (first, _) in zip(part, box, strict=True)
        )
        yield from boxes.runs(moved, shape)


def _copy(source: Source, place: Box, common: Box, whole: np.ndarray, box: Box) -> None:
    """Puts the elements of `common` of a piece that lies in `place` where they go."""
    shape = boxes.box_shape(place)
    for part in boxes.cut(common, _PART):
        target = whole[boxes.within(part, box)]
        own = tuple(
            (low - first, high - first)
            for (low, high), (first, _) in zip(part, place, strict=True)
        )
        size = math.prod(boxes.box_shape(part))
        direct = target.flags.c_contiguous
        values = target.reshape(-1) if direct else np.empty(size, whole.dtype)
        done = 0
        for first, count in boxes.runs(own, shape):
            source.read_into(values[done : done + count], first)
            done += count
        if not direct:
            target[...] = values.reshape(target.shape)
