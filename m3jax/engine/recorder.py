"""Writes what is merged, and keeps the checksums of what was read and written."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash

from m3jax.checkpoints.output.shards import ShardWriter
from m3jax.engine.journal import Journal
from m3jax.engine.output_files import written_name
from m3jax.engine.prepared import Prepared
from m3jax.engine.progress import Progress
from m3jax.engine.streamed import Emit, Made

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
        self._lock = threading.Lock()
        self._running: dict[int, list[Any]] = {}
        self._input_checksums: dict[int, list[str]] = {}
        self.checksums: dict[int, dict[str, str]] = {}
        for i, item in enumerate(prepared.items):
            if item.size == 0:
                tensor = prepared.inputs.tensors[i]
                empty = xxhash.xxh3_128().hexdigest()
                parts = dict.fromkeys(tensor.parts, empty)
                self._finish(i, parts, [empty] * len(tensor.sources))

    def write(self, item: int, part: str, start: int, values: np.ndarray) -> None:
        entry = self._entry(item, part)
        packed = self._prepared.inputs.tensors[item].parts[part].packed
        offset = start // 8 if packed else start * entry.dtype.itemsize
        place = self._prepared.places[item, part]
        self._writer.write(place, entry.start + offset, values)

    def record(self, made: Sequence[Made]) -> None:
        done = []
        for item, start, parts, inputs in made:
            arrays = [*parts.values(), *inputs]
            last = start + len(inputs[0]) == self._prepared.items[item].size
            if start == 0 and last:  # the whole of it
                digests = [xxhash.xxh3_128_hexdigest(a.view(np.uint8)) for a in arrays]
            else:
                running = self._running.setdefault(
                    item, [xxhash.xxh3_128() for _ in arrays]
                )
                for checksum, array in zip(running, arrays, strict=True):
                    checksum.update(array.view(np.uint8))
                if not last:
                    continue
                digests = [c.hexdigest() for c in self._running.pop(item)]
            own = dict(zip(parts, digests, strict=False))
            done.append((item, own, digests[len(own) :]))
        self.keep(done)

    def keep(self, done: Sequence[tuple[int, dict[str, str], list[str]]]) -> None:
        """Notes, when it is so, that tensors are completely written, and of what made.

        Args:
          done: the place of each, its checksums by part, and those of its inputs.
        """
        if done:
            self._writer.when_written(lambda: self._keep(done))

    def _keep(self, done: Sequence[tuple[int, dict[str, str], list[str]]]) -> None:
        tensors = self._prepared.inputs.tensors
        with self._lock:
            named = [(tensors[i].name, own, digests) for i, own, digests in done]
            self._journal.keep_tensors(named)
            for item, checksums, inputs in done:
                self._finish(item, checksums, inputs)

    def checksums_on_disk(self, item: int, block: np.ndarray | None = None) -> Any:
        """Of what is written of a tensor, by part."""
        block = np.empty(_BLOCK, np.uint8) if block is None else block
        return {
            part: self._checksum_on_disk(item, part, block)
            for part in self._prepared.inputs.tensors[item].parts
        }

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
        sizes = [tensors[i].written_bytes for i, _ in written]
        progress.stage("checking what was written", sum(sizes))
        block = np.empty(min(_BLOCK, max(sizes)), np.uint8)
        count = 0
        for (i, entry), size in zip(written, sizes, strict=True):
            if self.checksums_on_disk(i, block) == entry["checksums"]:
                self._finish(i, entry["checksums"], entry["inputs"])
                count += 1
            progress.advance(size)
        return count

    def records(self) -> list[Any]:
        """All that is known here, for another process's `add`."""
        return [[i, c, self._input_checksums[i]] for i, c in self.checksums.items()]

    def add(self, records: list[Any]) -> None:
        """Takes over what another process has found."""
        for item, checksums, inputs in records:
            self._finish(item, checksums, inputs)

    def named_checksums(self) -> dict[str, str]:
        """The checksum of each tensor, by its name, in the output's order."""
        tensors = self._prepared.inputs.tensors
        return {
            written_name(tensors[i].name, part): checksum
            for i, own in sorted(self.checksums.items())
            for part, checksum in own.items()
        }

    def input_checksums(self) -> list[str | None]:
        """Per checkpoint, one checksum over those of the tensors read from it."""
        checkpoints = self._prepared.checkpoints
        lines: dict[int, list[str]] = {id(own): [] for own in checkpoints}
        for i, digests in self._input_checksums.items():
            tensor = self._prepared.inputs.tensors[i]
            # Of a tensor that is copied unseen, the first origin alone was hashed.
            for origin, digest in zip(tensor.origins, digests, strict=False):
                lines[id(origin.owner)].append(f"{origin.name} {digest}\n")
        return [
            xxhash.xxh3_128("".join(sorted(own)).encode()).hexdigest() if own else None
            for own in lines.values()
        ]

    def _finish(self, item: int, checksums: dict[str, str], inputs: list[str]) -> None:
        self.checksums[item] = checksums
        self._input_checksums[item] = inputs

    def _entry(self, item: int, part: str) -> Any:
        shard = self._prepared.shards[self._prepared.places[item, part]]
        name = self._prepared.inputs.tensors[item].name
        return shard.entries[written_name(name, part)]

    def _checksum_on_disk(self, item: int, part: str, block: np.ndarray) -> str:
        entry = self._entry(item, part)
        checksum = xxhash.xxh3_128()
        place = self._prepared.places[item, part]
        for offset in range(entry.start, entry.stop, len(block)):
            read = block[: min(len(block), entry.stop - offset)]
            self._writer.read(place, offset, read)
            checksum.update(read)
        return checksum.hexdigest()
