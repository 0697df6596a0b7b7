"""Writes Orbax checkpoints tensor by tensor: bounded memory, always the same bytes.

Orbax's own writer wants the whole pytree in memory and makes other files every time.
Of the layouts that it reads, the plainest one is written here:

    default/                     the item, as `CheckpointManager` calls it
        _METADATA                the tree
        PATH.JOINED.BY.DOTS/     one zarr array (version 2, not compressed) per tensor
            .zarray
            0.0, 1.0, …          its chunks

A chunk holds whole slices of the tensor, so its elements follow each other in the
tensor, too: a run of elements has its place in a file that can be written at an
offset, as in a safetensors file. The last chunk of a row of chunks is padded.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from m3jax.checkpoints import durable, orbax
from m3jax.checkpoints.dtypes import Dtype
from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.files import is_plain_name
from m3jax.checkpoints.output import OutputFolder
from m3jax.checkpoints.part import OutputPart
from m3jax.checkpoints.safetensors import TensorEntry
from m3jax.checkpoints.shards import Shard, ShardWriter
from m3jax.checkpoints.tree import KeyPath, path_of

# Bytes, at most, unless one element has more. Whoever restores a part of a tensor
# reads whole chunks; a model of 140 GB has some 4400 files.
CHUNK = 32 << 20


@dataclasses.dataclass(frozen=True)
class Chunks:
    """How a tensor is cut into chunks.

    Attributes:
      shape: of the tensor.
      dtype: of it.
      axis: that is cut; along the axes before it a chunk holds one slice.
      rows: slices of that axis in a chunk.
    """

    shape: tuple[int, ...]
    dtype: Dtype
    axis: int
    rows: int

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: Dtype, limit: int) -> Chunks:
        """As few chunks as hold at most `limit` bytes, about equally full."""
        for axis in range(len(shape)):
            row = math.prod(shape[axis + 1 :]) * dtype.itemsize
            if row <= limit and 0 not in shape:
                count = -(-shape[axis] // (limit // row))
                return cls(shape, dtype, axis, -(-shape[axis] // count))
        return cls(shape, dtype, 0, max(shape[0], 1) if shape else 1)

    @property
    def chunk_shape(self) -> list[int]:
        if not self.shape:
            return []
        behind = [max(size, 1) for size in self.shape[self.axis + 1 :]]
        return [1] * self.axis + [self.rows, *behind]

    @property
    def size(self) -> int:
        """Bytes of a chunk."""
        return math.prod(self.chunk_shape) * self.dtype.itemsize

    def pieces(self, start: int, count: int) -> Iterator[tuple[str, int, int]]:
        """The files that hold `count` bytes of the tensor from byte `start` on.

        Yields:
          Name of the chunk, offset in it, and bytes.
        """
        if not self.shape:
            yield "0", start, count
            return
        axis_size = self.shape[self.axis]
        slab = self.size // self.rows * axis_size  # bytes along the whole axis
        stop = start + count
        while start < stop:
            outer, place = divmod(start, slab)
            chunk, offset = divmod(place, self.size)
            size = min(self.size - offset, slab - place, stop - start)
            places: list[int] = []  # along the axes before the one that is cut
            for axis in reversed(range(self.axis)):
                outer, index = divmod(outer, self.shape[axis])
                places.insert(0, index)
            zeros = [0] * (len(self.shape) - self.axis - 1)
            name = ".".join(map(str, [*places, chunk, *zeros]))
            yield name, offset, size
            start += size

    def names(self) -> list[str]:
        """Of all chunks; none for a tensor without elements."""
        total = math.prod(self.shape) * self.dtype.itemsize
        return [name for name, _, _ in self.pieces(0, total)]

    def zarray(self) -> bytes:
        """The content of `.zarray`."""
        dtype = self.dtype.numpy
        plain = dtype.kind in "biuf" and dtype.isbuiltin == 1
        facts = {
            "chunks": self.chunk_shape,
            "compressor": None,
            "dimension_separator": ".",
            "dtype": dtype.newbyteorder("<").str if plain else dtype.name,
            "fill_value": None,
            "filters": None,
            "order": "C",
            "shape": list(self.shape),
            "zarr_format": 2,
        }
        return json.dumps(facts).encode()


class OrbaxShard(Shard):
    """All tensors of an Orbax item, addressed as if one file held them."""

    def __init__(
        self,
        tensors: Sequence[tuple[str, Dtype, tuple[int, ...]]],
        paths: Mapping[str, KeyPath] | None,
        limit: int = CHUNK,
    ):
        """
        Args:
          tensors: name, dtype and shape of each.
          paths: in the pytree, of those that are not the name, split at ".".
          limit: bytes of a chunk.

        Raises:
          CheckpointError: a name cannot be that of a folder.
        """
        self.name = orbax.ITEM
        self.chunks: dict[str, Chunks] = {}
        self.entries: dict[str, TensorEntry] = {}
        stop = 0
        for name, dtype, shape in tensors:
            if not is_plain_name(name) or name == orbax.METADATA:
                raise CheckpointError(
                    f"tensor {shown(name)} cannot be written: Orbax needs the name of "
                    "a folder, without '/' and at most 255 characters; rename it, or "
                    "choose --output_format=safetensors"
                )
            self.chunks[name] = Chunks.of(shape, dtype, limit)
            start, stop = stop, stop + math.prod(shape) * dtype.itemsize
            self.entries[name] = TensorEntry(dtype, shape, start, stop)
        self.metadata = orbax.tree_json(
            {n: (paths or {}).get(n, path_of(n)) for n in self.entries},
            use_ocdbt=False,
        )
        zarrays = [chunks.zarray() for chunks in self.chunks.values()]
        self.header = b"\n".join([self.metadata, *zarrays])
        padded = sum(len(c.names()) * c.size for c in self.chunks.values())
        self.size = len(self.header) + padded
        self._names = [n for n, entry in self.entries.items() if entry.size]
        self._starts = [self.entries[name].start for name in self._names]

    @property
    def largest(self) -> int:
        """Bytes of the largest file."""
        return max(chunks.size for chunks in self.chunks.values())

    def pieces(self, offset: int, count: int) -> Iterator[tuple[str, int, int]]:
        """The files that hold `count` bytes of one tensor; see `Chunks.pieces`."""
        if count:
            name = self._names[bisect.bisect_right(self._starts, offset) - 1]
            start = offset - self.entries[name].start
            for chunk, place, size in self.chunks[name].pieces(start, count):
                yield f"{name}/{chunk}", place, size


class OrbaxWriter:
    """Writes an `OrbaxShard` at offsets from many threads, as `ShardWriter` does."""

    def __init__(
        self,
        folder: OutputFolder | OutputPart,
        shards: Sequence[OrbaxShard],
        *,
        create: bool = True,
    ):
        """Makes the folders and all files, in their full sizes; see `ShardWriter`."""
        (self._shard,) = shards
        self._folder: Path = folder.path / orbax.ITEM
        if create:
            self._folder.mkdir(exist_ok=True)
            _write(self._folder / orbax.METADATA, self._shard.metadata)
            for name, chunks in self._shard.chunks.items():
                (self._folder / name).mkdir(exist_ok=True)
                _write(self._folder / name / ".zarray", chunks.zarray())
                for chunk in chunks.names():
                    path = self._folder / name / chunk
                    with _opened(path, os.O_WRONLY | os.O_CREAT) as fd:
                        durable.resize(fd, chunks.size, path)

    def write(self, shard: int, offset: int, values: np.ndarray) -> None:
        """Writes the bytes of `values`, which are of one tensor."""
        del shard
        view = memoryview(values.view(np.uint8))
        for name, place, size in self._shard.pieces(offset, len(view)):
            path = self._folder / name
            with _opened(path, os.O_WRONLY) as fd:
                durable.write_at(fd, view[:size], place, path)
            view = view[size:]

    def read(self, shard: int, offset: int, out: np.ndarray) -> None:
        """Reads back bytes that were written."""
        del shard
        view = memoryview(out)
        for name, place, size in self._shard.pieces(offset, len(view)):
            path = self._folder / name
            with _opened(path, os.O_RDONLY) as fd:
                durable.read_at(fd, view[:size], place, path)
            view = view[size:]

    def complete(self, shard: int) -> None:
        """See `ShardWriter`."""

    def sync(self) -> None:
        """Waits until the disk has what was written."""
        for path in self._folder.rglob("*"):
            durable.sync(path)

    def close(self) -> None:
        """Nothing is held."""


def open_writer(
    folder: OutputFolder | OutputPart, shards: Sequence[Shard], *, create: bool = True
) -> ShardWriter | OrbaxWriter:
    """The writer for these shards."""
    orbax_shards = [shard for shard in shards if isinstance(shard, OrbaxShard)]
    if orbax_shards:
        return OrbaxWriter(folder, orbax_shards, create=create)
    return ShardWriter(folder, shards, create=create)


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        yield fd
    finally:
        os.close(fd)


def _write(path: Path, content: bytes) -> None:
    with _opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as fd:
        durable.write_at(fd, memoryview(content), 0, path)
