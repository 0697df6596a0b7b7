"""The plan of a streamed merge: integers only.

A tensor is a flat run of elements, cut into tiles of `TILE` elements. A chunk is a
fixed number of tiles and may hold runs of many tensors: each run starts on a new
tile, so every tile belongs to one tensor, and one compiled kernel of one shape
serves the whole model. What differs between tensors (mask keys, offsets,
coefficients) is a number per tile.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

# Elements. Small, so that a norm's few thousand weights waste little of a chunk;
# fixed, so that no result can depend on the size of a chunk; a power of two and a
# multiple of the four mask lanes of a block, so that a tile starts a block.
TILE = 1024


@dataclasses.dataclass(frozen=True)
class Item:
    """One tensor of the plan.

    Attributes:
      size: number of elements.
      signature: tensors with equal signatures may share a chunk (their dtypes).
      merged: False for a tensor that is copied.
      shape: of the tensor.
    """

    size: int
    signature: tuple[Any, ...]
    merged: bool = True
    shape: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Run:
    """Elements [start, start + count) of tensor `item`, from tile `row` of a chunk."""

    item: int
    start: int
    count: int
    row: int

    @property
    def rows(self) -> int:
        return -(-self.count // TILE)

    @property
    def elements(self) -> slice:
        """Where its elements lie in the flattened chunk."""
        return slice(self.row * TILE, self.row * TILE + self.count)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Runs that are read, computed and written together.

    Attributes:
      signature, merged: of its tensors.
      runs: the elements; in a block a single one.
      block: the shape of a part of one tensor that a step sees whole, (rows, columns)
        or that of the tensor; None: the chunk is made of tiles.
    """

    signature: tuple[Any, ...]
    merged: bool
    runs: tuple[Run, ...]
    block: tuple[int, ...] | None = None

    @property
    def elements(self) -> int:
        return sum(run.count for run in self.runs)


def cut(items: Sequence[Item], order: Sequence[int], tiles: int) -> list[Chunk]:
    """Cuts tensors into chunks of `tiles` tiles.

    Args:
      items: the tensors.
      order: which of them, in the order in which they are read and written.
      tiles: capacity of a chunk.

    Returns:
      Chunks that hold every element once. Runs of one tensor are in order, and a
      chunk holds tensors of one signature.
    """
    chunks: list[Chunk] = []
    runs: list[Run] = []
    row = 0
    current: Item | None = None

    def close() -> None:
        nonlocal runs, row
        if runs and current is not None:
            chunks.append(Chunk(current.signature, current.merged, tuple(runs)))
        runs, row = [], 0

    for index in order:
        item = items[index]
        if current is None or (item.signature, item.merged) != (
            current.signature,
            current.merged,
        ):
            close()
            current = item
        start = 0
        while start < item.size:
            if row == tiles:
                close()
            count = min(item.size - start, (tiles - row) * TILE)
            runs.append(Run(index, start, count, row))
            start, row = start + count, row + runs[-1].rows
    close()
    return chunks


def whole(items: Sequence[Item], order: Sequence[int], tiles: int) -> list[list[Chunk]]:
    """Cuts tensors into groups of chunks, each of which holds whole tensors.

    Small ones fill a chunk together; larger ones share a few, of which only the last is
    not full, where there is enough for all threads to do.

    Args:
      items, order, tiles: as for `cut`.
    """
    total = sum(-(-items[index].size // TILE) for index in order)
    limit = tiles * max(1, min(4, total // (16 * tiles)))
    groups: list[list[int]] = []
    rows = 0
    for index in order:
        item, own = items[index], -(-items[index].size // TILE)
        alike = groups and items[groups[-1][-1]].signature == item.signature
        if alike and rows + own <= limit:
            groups[-1].append(index)
            rows += own
        else:
            groups.append([index])
            rows = own
    return [cut(items, group, tiles) for group in groups]


def blocks(
    items: Sequence[Item], order: Sequence[int], elements: int, unit: str
) -> list[Chunk]:
    """Cuts tensors into blocks of whole rows, or takes them whole.

    Args:
      items, order: as for `cut`.
      elements: of a block of rows, if a row has no more.
      unit: ``row``: blocks of a tensor are (rows, columns) of one shape but the last,
        which may have fewer rows; ``matrix``: the tensor, in its own shape.
    """
    chunks = []
    for index in order:
        item = items[index]
        shape, size = item.shape, item.size
        columns = item.shape[-1] if item.shape else 1
        if unit == "row" and size:
            size = columns * max(1, min(elements // columns, size // columns))
        for start in range(0, item.size, max(size, 1)):
            run = Run(index, start, min(size, item.size - start), 0)
            if unit == "row":
                shape = (run.count // columns, columns)
            chunks.append(Chunk(item.signature, item.merged, (run,), shape))
    return chunks


def sample(
    items: Sequence[Item], order: Sequence[int], tiles: int, wanted: int
) -> list[Chunk]:
    """Chunks of single tiles, spread evenly over all full tiles of the tensors.

    Args:
      items, order, tiles: as for `cut`.
      wanted: how many tiles to take, about.
    """
    full = [(index, items[index].size // TILE) for index in order]
    stride = max(1, sum(count for _, count in full) // wanted)
    picked: list[tuple[int, int]] = []
    offset = stride // 2
    for index, count in full:
        picked += [(index, tile) for tile in range(offset, count, stride)]
        offset = (offset - count) % stride
    picked.sort(key=lambda pick: items[pick[0]].signature)  # stable
    chunks: list[Chunk] = []
    runs: list[Run] = []
    for i, (index, tile) in enumerate(picked):
        runs.append(Run(index, tile * TILE, TILE, len(runs)))
        signature = items[index].signature
        last = i + 1 == len(picked)
        if last or len(runs) == tiles or items[picked[i + 1][0]].signature != signature:
            chunks.append(Chunk(signature, True, tuple(runs)))
            runs = []
    return chunks


def split_shards(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Shares tensors out to files, in order, each at most `limit` bytes.

    A tensor larger than the limit has a file of its own. At least one file.
    """
    shards: list[list[int]] = [[]]
    used = 0
    for index, size in enumerate(sizes):
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(index)
        used += size
    return shards


def share_out(sizes: Sequence[int], parts: int) -> list[range]:
    """Cuts a sequence into runs, the largest of which is as small as it can be.

    Args:
      sizes: of the elements.
      parts: number of runs; some are empty if there are more than elements.
    """

    def runs(limit: int) -> list[range]:
        found, start, used = [], 0, 0
        for i, size in enumerate(sizes):
            if used + size > limit:
                found.append(range(start, i))
                start, used = i, 0
            used += size
        return [*found, range(start, len(sizes))]

    low, high = max(sizes, default=0), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        if len(runs(middle)) <= parts:
            high = middle
        else:
            low = middle + 1
    found = runs(high)
    return found + [range(len(sizes), len(sizes))] * (parts - len(found))


def natural_order(name: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key that puts layer 10 behind layer 9."""
    parts: Iterator[str] = iter(name.replace("_", ".").split("."))
    return tuple((0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts)


def chunk_tiles(
    chunk_size: int | None, bytes_per_element: int, devices: int, budget: int
) -> int:
    """Tiles of a chunk: `chunk_size` elements, or as many as fit into `budget` bytes.

    Args:
      chunk_size: elements, or None to choose.
      bytes_per_element: of all buffers of one worker.
      devices: the tiles are shared out among them, so their number is a multiple.
      budget: bytes of one worker's buffers.

    Raises:
      ValueError: if the chunk size is not within 1 Ki to 64 Mi elements.
    """
    if chunk_size is None:
        fits = max(1, budget // (TILE * bytes_per_element))
        tiles = 1 << min(11, fits.bit_length() - 1)
    elif not TILE <= chunk_size <= 64 << 20:
        raise ValueError(f"chunk_size={chunk_size} needs {TILE} to {64 << 20} elements")
    else:
        tiles = chunk_size // TILE
    return math.ceil(tiles / devices) * devices
