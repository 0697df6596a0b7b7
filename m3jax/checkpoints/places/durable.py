"""What a crash must not break: synced files, replaced folders, lines of a journal."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's fcntl.h and fs.h


class naming:
    """Has an OSError name the file, which those of a write do not.

    No generator: it stands around each of the many reads of small tensors.
    """

    def __init__(self, path: object):
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, at: object) -> None:
        if isinstance(error, OSError) and error.filename is None:
            raise OSError(error.errno, error.strerror, str(self._path)) from None


def sync(path: Path) -> None:
    """Waits until the disk has a file's bytes, or a folder's entries.

    Raises:
      OSError: it does not; the error names the file.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with naming(path):
            os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Where to write a file, which gets its name when it is complete, or never."""
    unfinished = path.with_name(f".{path.name}.partial")
    try:
        with naming(path):
            yield unfinished
        sync(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def put_in_place(new: Path, final: Path, spare: Path) -> None:
    """Gives the folder `new` the name `final`, with all that it holds at once.

    A folder that had that name is then called `new`. Where the file system cannot
    swap two names in one step, it is called `spare`, and for the moment between two
    renames nothing has the name `final`: `put_back` mends it after a crash.
    """
    if not final.exists():
        new.rename(final)
    elif not _exchange(new, final):
        try:
            final.rename(spare)
            new.rename(final)
        except BaseException:
            put_back(final, spare)
            raise


def put_back(final: Path, spare: Path) -> bool:
    """Gives `spare` its old name if nothing has it; returns whether it did."""
    if final.exists() or not spare.exists():
        return False
    spare.rename(final)
    return True


def write_at(fd: int, view: memoryview, offset: int, path: Path) -> None:
    """Writes all bytes of `view` at an offset; an OSError names the file, `path`."""
    with naming(path):
        while len(view):
            count = os.pwrite(fd, view, offset)
            view, offset = view[count:], offset + count


def read_at(fd: int, view: memoryview, offset: int, path: Path) -> None:
    """Fills `view` from an offset; an OSError names the file, `path`."""
    with naming(path):
        while len(view):
            count = os.preadv(fd, [view], offset)
            if count == 0:
                raise OSError(errno.EIO, "became shorter while it was written")
            view, offset = view[count:], offset + count


def resize(fd: int, size: int, path: Path) -> None:
    """Makes a file `size` bytes long; an OSError names the file, `path`."""
    with naming(path):
        os.ftruncate(fd, size)


def append_lines(path: Path, entries: list[dict[str, Any]]) -> None:
    """Appends entries to a journal, in one write; they survive this process's death.

    Raises:
      OSError: the error names the file; half a line may have been written.
    """
    left = memoryview(b"".join(map(_encode, entries)))
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        with naming(path):
            while len(left):
                left = left[os.write(fd, left) :]
    finally:
        os.close(fd)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The entries of a journal up to the first line that is torn; none without a file.

    What follows them is cut off, so that more can be appended.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    entries: list[dict[str, Any]] = []
    size = 0
    for line in lines[:-1]:  # what follows the last newline is torn
        checksum, _, text = line.partition(b" ")
        if checksum != _checksum(text):
            break
        entries.append(json.loads(text))
        size += len(line) + 1
    os.truncate(path, size)
    return entries


def _encode(entry: dict[str, Any]) -> bytes:
    text = json.dumps(entry, separators=(",", ":")).encode()
    return _checksum(text) + b" " + text + b"\n"


def _checksum(text: bytes) -> bytes:
    return xxhash.xxh3_64(text).hexdigest().encode()


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two names in one step; returns False where that cannot be done."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)  # Linux has it
    if renameat2 is None:
        return False
    failed = renameat2(
        ctypes.c_int(_AT_FDCWD),
        ctypes.c_char_p(os.fsencode(first)),
        ctypes.c_int(_AT_FDCWD),
        ctypes.c_char_p(os.fsencode(second)),
        ctypes.c_uint(_RENAME_EXCHANGE),
    )
    return not failed
