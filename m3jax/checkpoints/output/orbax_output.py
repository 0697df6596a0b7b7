"""Orbax checkpoints written tensor by tensor: bounded memory, always the same bytes.

Orbax's own writer wants the whole pytree in memory and makes other files every time;
TensorStore writes whole chunks, so it would read, change and write again what comes in
other pieces, and leaves its lock files where it is killed. So of the layouts that Orbax
reads, the plainest one is written here, as a safetensors file is, at offsets:

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
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.formats import orbax
from m3jax.checkpoints.formats.dtypes import Dtype
from m3jax.checkpoints.formats.safetensors import TensorEntry
from m3jax.checkpoints.formats.tree import KeyPath, path_of
from m3jax.checkpoints.names import is_plain_name
from m3jax.checkpoints.output.shards import Shard

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
        before, behind = self.shape[: self.axis], self.shape[self.axis + 1 :]
        slab = self.size // self.rows * self.shape[self.axis]  # bytes along the axis
        stop = start + count
        while start < stop:
            outer, place = divmod(start, slab)
            chunk, offset = divmod(place, self.size)
            size = min(self.size - offset, slab - place, stop - start)
            places = [*np.unravel_index(outer, before), chunk, *[0] * len(behind)]
            yield ".".join(map(str, places)), offset, size
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

    held = False

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
        metadata = _tree_json(
            [(paths or {}).get(name, path_of(name)) for name in self.entries]
        )
        self._files = [(f"{orbax.ITEM}/{orbax.METADATA}", len(metadata), metadata)]
        for name, chunks in self.chunks.items():
            folder, zarray = f"{orbax.ITEM}/{name}", chunks.zarray()
            self._files.append((f"{folder}/.zarray", len(zarray), zarray))
            self._files += [(f"{folder}/{c}", chunks.size, b"") for c in chunks.names()]
        self.header = b"\n".join(content for *_, content in self._files if content)
        self.size = sum(size for _, size, _ in self._files)
        self._names = [n for n, entry in self.entries.items() if entry.size]
        self._starts = [self.entries[name].start for name in self._names]

    @property
    def largest(self) -> int:
        return max(size for _, size, _ in self._files)

    def files(self) -> Iterator[tuple[str, int, bytes]]:
        yield from self._files

    def pieces(self, offset: int, count: int) -> Iterator[tuple[str, int, int]]:
        if count:
            name = self._names[bisect.bisect_right(self._starts, offset) - 1]
            start = offset - self.entries[name].start
            for chunk, place, size in self.chunks[name].pieces(start, count):
                yield f"{orbax.ITEM}/{name}/{chunk}", place, size


def _tree_json(paths: Sequence[KeyPath]) -> bytes:
    """The content of `_METADATA` for arrays at these paths."""
    tree = {}
    for path in paths:
        kinds = (orbax.SEQUENCE_KEY, orbax.DICT_KEY)
        tree[str(tuple(map(str, path)))] = {
            "key_metadata": [
                {"key": str(key), "key_type": kinds[isinstance(key, str)]}
                for key in path
            ],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
    metadata = {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    return json.dumps(metadata).encode()
