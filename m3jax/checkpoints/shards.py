"""The safetensors files of an output: what stands where, and writing it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from m3jax.checkpoints import durable, safetensors
from m3jax.checkpoints.folder import INDEX, WEIGHTS
from m3jax.checkpoints.output import OutputFolder
from m3jax.checkpoints.part import OutputPart

_PAGE = 1 << 16  # bytes; no page of memory is larger


class Shard:
    """One safetensors file of an output: its name, header and tensors' places."""

    def __init__(self, name: str, tensors: list[Any]):
        """`tensors`: (name, Dtype, shape) of each."""
        # transformers asks for this piece of metadata; one key, so its order is fixed.
        self.header, self.entries = safetensors.layout(tensors, {"format": "pt"})
        self.name = name
        self.size = max(
            [len(self.header), *(entry.stop for entry in self.entries.values())]
        )

    @property
    def largest(self) -> int:
        """Bytes of its largest file, of which it may have several in other formats."""
        return self.size


class ShardWriter:
    """The safetensors files of an output, written at offsets from many threads.

    Several processes may write disjoint parts of one file. On NFS that is safe as long
    as no client holds a page of the file that it could write back whole: so files are
    opened for writing only, and what was read back is not kept in memory.
    """

    def __init__(
        self,
        folder: OutputFolder | OutputPart,
        shards: Sequence[Shard],
        *,
        create: bool = True,
    ):
        """Opens the files.

        Args:
          folder: in which they are.
          shards: the files.
          create: make them with their headers and full sizes; tensors that a file
            holds already stay as they are. False: another process has made them.
        """
        self._files: list[int] = []
        self._paths = [folder.path / shard.name for shard in shards]
        flags = os.O_WRONLY | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        try:
            for shard, path in zip(shards, self._paths, strict=True):
                fd = os.open(path, flags, 0o666)
                self._files.append(fd)
                if create:
                    durable.resize(fd, shard.size, path)
                    durable.write_at(fd, memoryview(shard.header), 0, path)
        except BaseException:
            self.close()
            raise

    def write(self, shard: int, offset: int, values: np.ndarray) -> None:
        """Writes the bytes of `values` at `offset` of file number `shard`."""
        view = memoryview(values.view(np.uint8))
        durable.write_at(self._files[shard], view, offset, self._paths[shard])

    def read(self, shard: int, offset: int, out: np.ndarray) -> None:
        """Reads back bytes that were written."""
        path = self._paths[shard]
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            durable.read_at(fd, memoryview(out), offset, path)
            if hasattr(os, "posix_fadvise"):
                start = max(0, offset - _PAGE)
                end = offset + len(out) + _PAGE
                os.posix_fadvise(fd, start, end - start, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)

    def sync(self) -> None:
        """Waits until the disk has what this process has written."""
        for fd, path in zip(self._files, self._paths, strict=True):
            durable.sync_file(fd, path)

    def complete(self, shard: int) -> None:
        """Is told when all of a file is written; a store's writer then sends it."""

    def close(self) -> None:
        """Closes the files; a second call does nothing."""
        with contextlib.ExitStack() as stack:  # closes all, even if one fails
            while self._files:
                stack.callback(os.close, self._files.pop())


def make_shards(tensors: list[list[Any]]) -> list[Shard]:
    """Shards named as transformers names them, one per list of tensors."""
    if len(tensors) == 1:
        return [Shard(WEIGHTS, tensors[0])]
    return [
        Shard(f"model-{i:05d}-of-{len(tensors):05d}.safetensors", group)
        for i, group in enumerate(tensors, start=1)
    ]


def of_model(shards: Sequence[Shard]) -> list[Shard]:
    """Those that hold the model itself, rather than other parts of the output."""
    stem = WEIGHTS.partition(".")[0]
    return [shard for shard in shards if shard.name.startswith(stem)]


def index_json(shards: Sequence[Shard]) -> bytes:
    """The content of `model.safetensors.index.json`."""
    places = {name: shard.name for shard in shards for name in shard.entries}
    size = sum(e.stop - e.start for shard in shards for e in shard.entries.values())
    index = {
        "metadata": {"total_size": size},
        "weight_map": dict(sorted(places.items())),
    }
    return (json.dumps(index, indent=2) + "\n").encode()


def write_index(folder: OutputFolder, shards: Sequence[Shard]) -> None:
    own = of_model(shards)
    if len(own) > 1:
        folder.write(INDEX, index_json(own))
