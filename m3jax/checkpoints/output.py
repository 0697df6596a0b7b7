"""Writes a checkpoint folder so that its final name never shows a part of it.

Everything is written to a hidden folder beside the final one, `.NAME.m3jax-partial`,
which is renamed when it is complete. While a merge runs it holds a lock on it; after
an interruption it stays, with a journal of what was completely written, and
`--resume` goes on from there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np

from m3jax.checkpoints import safetensors
from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.folder import INDEX, WEIGHTS

MANIFEST = "m3jax.json"
_JOURNAL = "journal.jsonl"
_LOCK = "lock"


class OutputError(CheckpointError):
    """The output's place is taken, in use, or has too little room."""


class OutputFolder:
    """The folder under construction. Use as a context manager.

    Leaving it by an exception keeps the partial folder for `--resume`, unless nothing
    worth keeping was journalled.
    """

    def __init__(self, final: Path, *, overwrite: bool, resume: bool):
        """Takes the lock; see `check_free` for the conditions.

        Args:
          final: the folder's final path.
          overwrite: replace a previous m3jax output or an empty folder.
          resume: keep what an interrupted merge has left.
        """
        self.final = final
        self.path = final.parent / f".{final.name}.m3jax-partial"
        self._overwrite = overwrite
        check_free(final, overwrite=overwrite)
        final.parent.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()
        self._journal_lock = threading.Lock()
        self.journalled: list[dict[str, Any]] = []
        if resume:
            self.journalled = self._read_journal()
        else:
            self.clear()

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None and not self.resumable:
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    @property
    def resumable(self) -> bool:
        return (self.path / _JOURNAL).exists()

    def clear(self) -> None:
        """Removes what an earlier merge has left."""
        self.journalled = []
        for path in self.path.iterdir():
            if path.name != _LOCK:
                path.unlink()

    def journal(self, entry: dict[str, Any]) -> None:
        """Appends a line; it survives the death of this process."""
        line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
        with self._journal_lock, (self.path / _JOURNAL).open("ab", 0) as file:
            file.write(line)

    def write(self, name: str, content: bytes) -> None:
        (self.path / name).write_bytes(content)

    def check_space(self, needed: int) -> None:
        """Raises OutputError if the disk has less than `needed` bytes to spare."""
        held = sum(path.stat().st_blocks * 512 for path in self.path.iterdir())
        stats = os.statvfs(self.path)
        free = stats.f_bavail * stats.f_frsize + held
        if free < needed:
            raise OutputError(
                f"{self.final.parent}: the merged model needs {needed:,} bytes, "
                f"{free:,} are free; free some space or choose another --output"
            )

    def commit(self, *, fsync: bool) -> None:
        """Gives the complete folder its final name."""
        for name in (_JOURNAL, _LOCK):
            (self.path / name).unlink(missing_ok=True)
        if fsync:
            for path in [*self.path.iterdir(), self.path]:
                _fsync(path)
        # What `check_free` allowed may have changed during a long merge.
        check_free(self.final, overwrite=self._overwrite)
        old = self.final.parent / f".{self.final.name}.m3jax-old"
        if self.final.exists():
            shutil.rmtree(old, ignore_errors=True)
            self.final.rename(old)
        self.path.rename(self.final)
        if fsync:
            _fsync(self.final.parent)
        shutil.rmtree(old, ignore_errors=True)

    def _take_lock(self) -> int:
        while True:
            self.path.mkdir(exist_ok=True)
            try:
                fd = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
            except FileNotFoundError:  # the other merge has just finished
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                raise OutputError(
                    f"{self.final}: another merge is writing this output; wait for it "
                    "or choose another --output"
                ) from None
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(fd).st_ino == (self.path / _LOCK).stat().st_ino:
                    return fd
            os.close(fd)

    def _read_journal(self) -> list[dict[str, Any]]:
        try:
            lines = (self.path / _JOURNAL).read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        entries = []
        for line in lines[:-1]:  # what follows the last newline was cut off
            try:
                entries.append(json.loads(line))
            except ValueError:
                break
        return entries


def check_free(final: Path, *, overwrite: bool) -> None:
    """Raises OutputError unless `final` may become the output folder."""
    if not (final.exists() or final.is_symlink()):
        return
    if final.is_symlink() or not final.is_dir():
        raise OutputError(
            f"{final}: exists and is not a folder; choose another --output"
        )
    ours = (final / MANIFEST).is_file()
    empty = not any(final.iterdir())
    if not overwrite:
        hint = "pass --overwrite to replace it" if ours or empty else "choose another"
        raise OutputError(f"{final}: exists already; {hint}")
    if not (ours or empty):
        raise OutputError(
            f"{final}: holds no {MANIFEST}, so it is no output of m3jax and is not "
            "overwritten; choose another --output or remove it yourself"
        )


class ShardWriter:
    """The safetensors files of an output, written at offsets from many threads."""

    def __init__(self, folder: OutputFolder, shards: list[Shard], *, keep: bool):
        """Creates the files with their headers and full sizes.

        Args:
          folder: where to.
          shards: the files.
          keep: leave what the files hold already (to resume).
        """
        self._files: list[int] = []
        for shard in shards:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (0 if keep else os.O_TRUNC)
            fd = os.open(folder.path / shard.name, flags, 0o666)
            self._files.append(fd)
            os.ftruncate(fd, shard.size)
            _write_all(fd, memoryview(shard.header), 0)

    def write(self, shard: int, offset: int, values: np.ndarray) -> None:
        """Writes the bytes of `values` at `offset` of file number `shard`."""
        _write_all(self._files[shard], memoryview(values.view(np.uint8)), offset)

    def read(self, shard: int, offset: int, out: np.ndarray) -> None:
        """Reads back bytes that were written."""
        view = memoryview(out)
        while len(view):
            count = os.preadv(self._files[shard], [view], offset)
            if count == 0:
                raise OSError("an output file became shorter while it was written")
            view, offset = view[count:], offset + count

    def close(self) -> None:
        for fd in self._files:
            os.close(fd)


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


def make_shards(tensors: list[list[Any]]) -> list[Shard]:
    """Shards named as transformers names them, one per list of tensors."""
    if len(tensors) == 1:
        return [Shard(WEIGHTS, tensors[0])]
    return [
        Shard(f"model-{i:05d}-of-{len(tensors):05d}.safetensors", group)
        for i, group in enumerate(tensors, start=1)
    ]


def index_json(shards: list[Shard]) -> bytes:
    """The content of `model.safetensors.index.json`."""
    places = {name: shard.name for shard in shards for name in shard.entries}
    size = sum(e.stop - e.start for shard in shards for e in shard.entries.values())
    index = {
        "metadata": {"total_size": size},
        "weight_map": dict(sorted(places.items())),
    }
    return (json.dumps(index, indent=2) + "\n").encode()


def write_index(folder: OutputFolder, shards: list[Shard]) -> None:
    if len(shards) > 1:
        folder.write(INDEX, index_json(shards))


def _write_all(fd: int, view: memoryview, offset: int) -> None:
    while len(view):
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
