"""The files of an output that hold tensors: what stands where, and writing it."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from m3jax.checkpoints.formats import safetensors
from m3jax.checkpoints.output.folder import OutputFolder
from m3jax.checkpoints.output.part import OutputPart
from m3jax.checkpoints.places import durable
from m3jax.checkpoints.places.direct import OutputFile, writes_behind
from m3jax.checkpoints.weights import STEMS

_PAGE = 1 << 16  # bytes; no page of memory is larger


class Shard:
    """One safetensors file of an output, or what is addressed as if it were one.

    Attributes:
      name: of the file.
      header: what makes it another one, in bytes.
      entries: the place of each tensor, by name.
      size: bytes of it.
      held: whether its files are few enough to be held open.
    """

    held = True

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

    def files(self) -> Iterator[tuple[str, int, bytes]]:
        """Name, size and first bytes of each file."""
        yield self.name, self.size, self.header

    def pieces(self, offset: int, count: int) -> Iterator[tuple[str, int, int]]:
        """The files that hold bytes of one tensor: name, offset in it, and bytes."""
        yield self.name, offset, count


class ShardWriter:
    """The files of tensors of an output, written at offsets from many threads.

    Several processes may write disjoint parts of one file. On NFS that is safe as long
    as no client holds a page of the file that it could write back whole: so files are
    opened for writing only, and what was read back is not kept in memory. Nor is more
    read than was asked for: a page of the cache that reached beyond it could be written
    back over what another process writes past the cache (see `direct`).
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
        self._folder = folder.path
        self._shards = shards
        self._held: dict[str, OutputFile] = {}
        self._passing: set[OutputFile] = set()  # that are too many to be held
        self._behind = writes_behind()
        try:
            for shard in shards:
                for name, size, content in (
                    shard.files() if create or shard.held else ()
                ):
                    path = self._folder / name
                    path.parent.mkdir(exist_ok=True)
                    file = self._held[name] = OutputFile(
                        path, size, self._behind, create=create
                    )
                    if create:
                        durable.resize(file.fd, size, path)
                        durable.write_at(file.fd, memoryview(content), 0, path)
                    if not shard.held:
                        self._held.pop(name).close()
        except BaseException:
            self.close()
            raise

    def write(self, shard: int, offset: int, values: np.ndarray) -> None:
        """Writes the bytes of `values`, of one tensor, at `offset` of a shard.

        They may be overwritten at once; `when_written` tells when the file has them.

        Raises:
          OSError: the disk, now or at an earlier write; it names the file.
        """
        left, own = values.view(np.uint8), self._shards[shard]
        for name, place, size in own.pieces(offset, len(left)):
            file = self._held.get(name)
            if file is None:
                path = self._folder / name
                file = OutputFile(path, own.largest, self._behind, create=False)
                self._passing.add(file)
            file.write(left[:size], place)
            if not own.held:
                self.when_written(functools.partial(self._let_go, file))
            left = left[size:]

    def when_written(self, call: Callable[[], None]) -> None:
        """Calls, from any thread, when the files have all that was given to `write`."""
        self._behind.then(call)

    def read(self, shard: int, offset: int, out: np.ndarray) -> None:
        """Reads back bytes of one tensor that were written."""
        self._behind.flush()
        view = memoryview(out)
        for name, place, size in self._shards[shard].pieces(offset, len(view)):
            path = self._folder / name
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if hasattr(os, "posix_fadvise"):  # nothing ahead, no large pages
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
                durable.read_at(fd, view[:size], place, path)
                if hasattr(os, "posix_fadvise"):
                    start, end = max(0, place - _PAGE), place + size + _PAGE
                    os.posix_fadvise(fd, start, end - start, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
            view = view[size:]

    def sync(self) -> None:
        """Waits until the disk has what this process has written."""
        self._behind.flush()
        for shard in self._shards:
            for name, *_ in shard.files():
                durable.sync(self._folder / name)

    def close(self) -> None:
        """Writes what is left and closes the files; a second call does nothing.

        Raises:
          OSError: the disk, for a write of which nobody has heard yet.
        """
        with contextlib.ExitStack() as stack:  # closes all, even if one fails
            while self._held:
                stack.callback(self._held.popitem()[1].close)
            while self._passing:
                stack.callback(self._passing.pop().close)
            stack.callback(self._behind.close)  # first of all

    def _let_go(self, file: OutputFile) -> None:
        self._passing.discard(file)
        file.close()


def make_shards(tensors: list[list[Any]], stem: str = STEMS[0]) -> list[Shard]:
    """Shards named as transformers names them, one per list of tensors.

    Args:
      tensors: (name, Dtype, shape) of each tensor of each file.
      stem: what the names begin with; see `stem_of`.
    """
    if len(tensors) == 1:
        return [Shard(f"{stem}.safetensors", tensors[0])]
    return [
        Shard(f"{stem}-{i:05d}-of-{len(tensors):05d}.safetensors", group)
        for i, group in enumerate(tensors, start=1)
    ]


def of_model(file: str) -> bool:
    """Whether a file holds the model itself, rather than another part of the output."""
    return file.startswith(STEMS)


def stem_of(files: Iterable[str]) -> str:
    """What the names of a model's files begin with, so that its library finds them."""
    names = list(files)
    return next((s for s in STEMS if any(n.startswith(s) for n in names)), STEMS[0])


def index_of(files: Iterable[str]) -> str:
    """The name of the index of these files."""
    return f"{stem_of(files)}.safetensors.index.json"


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
    own = [shard for shard in shards if of_model(shard.name)]
    if len(own) > 1:
        name = index_of(shard.name for shard in own)
        folder.write(name, index_json(own))
