"""Which bytes of a row-major tensor a part of it takes: integers only.

A box is a (start, stop) pair per axis. A device's shard of a tensor is a box, and so
is what is read from or written to a file at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

Box = tuple[tuple[int, int], ...]


def box_of(index: Sequence[slice], shape: Sequence[int]) -> Box:
    """The box of an index into an array, as `jax.Sharding` hands them out."""
    return tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))


def whole(shape: Sequence[int]) -> Box:
    return tuple((0, size) for size in shape)


def box_shape(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def overlap(box: Box, other: Box) -> Box | None:
    """What two boxes have in common, None if that is nothing."""
    common = tuple(
        (max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, other, strict=True)
    )
    return common if all(start < stop for start, stop in common) else None


def within(box: Box, outer: Box) -> tuple[slice, ...]:
    """Where `box` is in an array that holds `outer`."""
    return tuple(
        slice(start - first, stop - first)
        for (start, stop), (first, _) in zip(box, outer, strict=True)
    )


def joined(boxes: Iterable[Box]) -> list[Box]:
    """Boxes joined where they touch along one axis, the last axes first.

    The shards of one process, joined, are read or written in long runs, each byte
    once. The boxes must not overlap.
    """
    boxes = sorted(boxes)
    for axis in reversed(range(len(boxes[0]) if boxes else 0)):
        boxes.sort(key=lambda box: (box[:axis], box[axis + 1 :], box[axis]))
        found: list[Box] = []
        for box in boxes:
            last = found[-1] if found else None
            touches = last is not None and (
                last[:axis] + last[axis + 1 :] == box[:axis] + box[axis + 1 :]
                and last[axis][1] == box[axis][0]
            )
            if touches:
                edge = (found[-1][axis][0], box[axis][1])
                found[-1] = (*box[:axis], edge, *box[axis + 1 :])
            else:
                found.append(box)
        boxes = found
    return sorted(boxes)


def cut(box: Box, limit: int) -> Iterator[Box]:
    """Cuts a box into boxes of at most `limit` elements, in row-major order.

    Each is as many whole slices as fit; an empty box has none.
    """
    shape = box_shape(box)
    if math.prod(shape) <= limit:
        yield from [box] if math.prod(shape) else []
        return
    axis = next(a for a in range(len(shape)) if math.prod(shape[a + 1 :]) <= limit)
    step = max(1, limit // math.prod(shape[axis + 1 :]))
    outer = [range(start, stop) for start, stop in box[:axis]]
    first, last = box[axis]
    for place in itertools.product(*outer):
        before = tuple((index, index + 1) for index in place)
        for start in range(first, last, step):
            yield (*before, (start, min(start + step, last)), *box[axis + 1 :])


def runs(box: Box, shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first element, count) of the stretches of a tensor that make up a box, in order.

    Args:
      box: not empty.
      shape: of the whole tensor.
    """
    split = [axis for axis, size in enumerate(box_shape(box)) if size != shape[axis]]
    axis = max(split, default=0)  # all axes behind it are whole
    strides = [math.prod(shape[a + 1 :]) for a in range(len(shape))]
    if not strides:
        yield 0, 1
        return
    start, stop = box[axis]
    for place in itertools.product(*(range(*edges) for edges in box[:axis])):
        before = sum(i * stride for i, stride in zip(place, strides, strict=False))
        yield before + start * strides[axis], (stop - start) * strides[axis]


def of_run(start: int, count: int, shape: Sequence[int]) -> Iterator[Box]:
    """The boxes that make up elements [start, start + count) of a tensor, in order.

    At most two for each axis, since whole slices are taken together: the inverse of
    `runs`, for files that are read by boxes.

    Args:
      start: of the first element, in row-major order.
      count: at least 1.
      shape: of the whole tensor.
    """
    if not shape:
        yield ()
        return
    width = math.prod(shape[1:])
    row, first = divmod(start, width)
    if first or count < width:  # the rest of a row, or a part of it
        head = min(count, width - first)
        for box in of_run(first, head, shape[1:]):
            yield ((row, row + 1), *box)
        if head < count:
            yield from of_run(start + head, count - head, shape)
        return
    rows, rest = divmod(count, width)
    yield ((row, row + rows), *whole(shape[1:]))
    if rest:
        yield from of_run(start + rows * width, rest, shape)
