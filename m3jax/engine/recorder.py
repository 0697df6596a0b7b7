"""Writes what is merged, and keeps the checksums of what was read and written."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash

from m3jax.checkpoints.shards import ShardWriter
from m3jax.engine.journal import Journal
from m3jax.engine.prepare import Prepared
from m3jax.engine.progress import Progress
from m3jax.engine.streamed import Emit

_BLOCK = 8 << 20  # bytes that are read back at a time


class Recorder(Emit):
    """Writes what is merged and keeps the checksums of what was read and written."""

    def __init__(
        self,
        prepared: Prepared,
        writer: ShardWriter,
        journal: Journal,
    ):
        self._prepared = prepared
        self._writer = writer
        self._journal = journal
        self._running: dict[int, list[Any]] = {}
        self._input_checksums: dict[int, list[str]] = {}
        self.checksums: dict[int, str] = {}
        self._left = collections.Counter(prepared.places)  # tensors of each file
        for i, item in enumerate(prepared.items):
            if item.size == 0:
                sources = prepared.inputs.tensors[i].sources
                empty = xxhash.xxh3_128().hexdigest()
                self._finish(i, empty, [empty] * len(sources))

    def write(self, item: int, start: int, values: np.ndarray) -> None:
        entry = self._entry(item)
        offset = entry.start + start * entry.dtype.itemsize
        self._writer.write(self._prepared.places[item], offset, values)

    def record(
        self, item: int, start: int, values: np.ndarray, inputs: list[np.ndarray]
    ) -> None:
        parts = [values, *inputs]
        running = self._running.setdefault(item, [xxhash.xxh3_128() for _ in parts])
        for checksum, part in zip(running, parts, strict=True):
            checksum.update(part.view(np.uint8))
        if start + len(values) == self._prepared.items[item].size:
            digests = [c.hexdigest() for c in self._running.pop(item)]
            self.keep(item, digests[0], digests[1:])

    def keep(self, item: int, checksum: str, inputs: list[str]) -> None:
        """Notes that a tensor is completely written, with what it was made of."""
        name = self._prepared.inputs.tensors[item].name
        self._journal.keep_tensor(name, checksum, inputs)
        self._finish(item, checksum, inputs)

    def checksum_on_disk(self, item: int) -> str:
        """Of what is written of a tensor."""
        return self._checksum_on_disk(item, np.empty(_BLOCK, np.uint8))

    def recover(self, items: Sequence[int], progress: Progress) -> int:
        """Takes over the journalled tensors whose bytes are still what was written.

        Args:
          items: those of this process.
          progress: is told.

        Returns:
          How many there are.
        """
        known = self._journal.tensors()
        tensors = self._prepared.inputs.tensors
        written = [
            (i, known[tensors[i].name]) for i in items if tensors[i].name in known
        ]
        if not written:
            return 0
        sizes = [self._entry(i).stop - self._entry(i).start for i, _ in written]
        progress.stage("checking what was written", sum(sizes))
        block = np.empty(min(_BLOCK, max(sizes)), np.uint8)
        count = 0
        for (i, entry), size in zip(written, sizes, strict=True):
            if self._checksum_on_disk(i, block) == entry["checksum"]:
                self._finish(i, entry["checksum"], entry["inputs"])
                count += 1
            progress.advance(size)
        return count

    def records(self) -> list[Any]:
        """All that is known here, for another process's `add`."""
        return [[i, c, self._input_checksums[i]] for i, c in self.checksums.items()]

    def add(self, records: list[Any]) -> None:
        """Takes over what another process has found."""
        for item, checksum, inputs in records:
            self._finish(item, checksum, inputs)

    def named_checksums(self) -> dict[str, str]:
        """The checksum of each tensor, by its name, in the output's order."""
        tensors = self._prepared.inputs.tensors
        return {tensors[i].name: c for i, c in sorted(self.checksums.items())}

    def input_checksums(self) -> list[str | None]:
        """Per checkpoint, one checksum over those of the tensors read from it."""
        checkpoints = self._prepared.checkpoints
        lines: list[list[str]] = [[] for _ in checkpoints]
        for i, digests in self._input_checksums.items():
            tensor = self._prepared.inputs.tensors[i]
            copied = not tensor.merged and len(digests) == 1
            first = 0 if copied else len(checkpoints) - len(digests)
            for place, digest in enumerate(digests, start=first):
                lines[place].append(f"{tensor.name} {digest}\n")
        return [
            xxhash.xxh3_128("".join(sorted(own)).encode()).hexdigest() if own else None
            for own in lines
        ]

    def _finish(self, item: int, checksum: str, inputs: list[str]) -> None:
        known = item in self.checksums
        self.checksums[item] = checksum
        self._input_checksums[item] = inputs
        place = self._prepared.places[item]
        self._left[place] -= not known
        if not (known or self._left[place]):
            self._writer.complete(place)

    def _entry(self, item: int) -> Any:
        shard = self._prepared.shards[self._prepared.places[item]]
        return shard.entries[self._prepared.inputs.tensors[item].name]

    def _checksum_on_disk(self, item: int, block: np.ndarray) -> str:
        entry = self._entry(item)
        checksum = xxhash.xxh3_128()
        for offset in range(entry.start, entry.stop, len(block)):
            part = block[: min(len(block), entry.stop - offset)]
            self._writer.read(self._prepared.places[item], offset, part)
            checksum.update(part)
        return checksum.hexdigest()
