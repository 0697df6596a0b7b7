"""Writes large files past the page cache, and reads them so, where the system can.

Through the page cache every byte is copied, kept and written back by the kernel, which
costs several times what the disk does. Direct writes take whole blocks at multiples of
a block, from memory that starts at one, so what is written is copied into a buffer that
does, and from there another thread writes it (`behind`); a buffer is one of few and
used again, so it is in the processor's cache.

A page of a file is never written both ways at once: the blocks that lie within one call
are written directly, and the bytes before and behind them, whose blocks other calls or
other processes share, through the page cache, which keeps neighbours' bytes apart. It
follows that pages which the cache holds are not those that are written directly.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import threading
from pathlib import Path

import numpy as np

from m3jax.checkpoints.places import durable
from m3jax.checkpoints.places.behind import Behind

# Bytes. No page of the cache is larger, and no disk's block.
BLOCK = max(4096, mmap.PAGESIZE)
# Of a direct write at most: disks are fastest with megabytes at a time.
BUFFER = 4 << 20
# Of one at least: its wait for the disk costs what copying so much does.
LEAST = 64 << 10
# Of a file that is worth it.
LEAST_FILE = 16 << 20
# What a file system says that has no direct writes, if it does not on opening.
_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)


class Buffers(threading.local):
    """A buffer for each thread that reads, made when it is first needed."""

    def __init__(self) -> None:
        self._whole: np.ndarray | None = None

    def get(self) -> np.ndarray:
        """Of `BUFFER` bytes, at the start of a page."""
        if self._whole is None:
            memory = np.empty(BUFFER + BLOCK, np.uint8)
            start = -memory.ctypes.data % BLOCK
            self._whole = memory[start : start + BUFFER]
        return self._whole


class OutputFile:
    """A file of an output, written at offsets from many threads."""

    def __init__(self, path: Path, size: int, behind: Behind, *, create: bool):
        """Opens the file.

        Args:
          path: of the file.
          size: bytes that it is to have.
          behind: from `writes_behind`; may be shared by many files.
          create: make it if it is not there.

        Raises:
          OSError: it cannot be opened; the error names it.
        """
        self._path = path
        self._behind = behind
        flags = os.O_WRONLY | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        self.fd = os.open(path, flags, 0o666)
        self._direct = _open_direct(path, os.O_WRONLY) if size >= LEAST_FILE else -1
        self._refused = self._direct < 0

    def write(self, values: np.ndarray, offset: int) -> None:
        """Writes bytes at an offset; `behind` may do so later, from a copy.

        Raises:
          OSError: the disk, now or at an earlier write; it names the file.
        """
        start, stop = _blocks(values, offset)
        if self._refused or stop - start < LEAST:
            self._write_cached(values, offset)
            return
        while len(values):
            count = (offset + BUFFER) // BLOCK * BLOCK - offset
            if len(values) <= BUFFER + BLOCK:  # rather than a few bytes alone
                count = len(values)
            self._behind.write(self._write_piece, values[:count], offset)
            values, offset = values[count:], offset + count

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        fds, self.fd, self._direct = (self.fd, self._direct), -1, -1
        with contextlib.ExitStack() as stack:  # closes both, even if one fails
            for fd in fds:
                if fd >= 0:
                    stack.callback(os.close, fd)

    def _write_cached(self, values: np.ndarray, offset: int) -> None:
        durable.write_at(self.fd, memoryview(values), offset, self._path)

    def _write_piece(self, values: np.ndarray, offset: int) -> None:
        """`values`: as far behind the start of a page of memory as of a block."""
        start, stop = _blocks(values, offset)
        if start < stop:
            first, last = start - offset, stop - offset
            self._write_cached(values[:first], offset)
            count = first + self._pwrite(memoryview(values[first:last]), start)
            # Of a direct write that ended early the rest need not start at a block;
            # the ordinary way writes it, or says why that cannot be done.
            values, offset = values[count:], offset + count
        self._write_cached(values, offset)

    def _pwrite(self, blocks: memoryview, offset: int) -> int:
        """Writes blocks directly; returns how many bytes it wrote."""
        if self._refused:
            return 0
        with durable.naming(self._path):
            try:
                return os.pwrite(self._direct, blocks, offset)
            except OSError as error:
                if error.errno not in _REFUSALS:
                    raise
        self._refused = True
        return 0


def writes_behind() -> Behind:
    """What writes for `OutputFile`s."""
    return Behind(BUFFER + 2 * BLOCK, BLOCK)


def _blocks(values: np.ndarray, offset: int) -> tuple[int, int]:
    """Where the whole blocks begin and end among bytes at an offset."""
    return offset + -offset % BLOCK, (offset + len(values)) // BLOCK * BLOCK


class DirectInput:
    """Reads a file past the page cache, from many threads."""

    def __init__(self, path: Path, fd: int, buffers: Buffers):
        """Opens the file; `works` says whether it can be read so.

        Args:
          path: of the file.
          fd: of the same file, opened the ordinary way.
          buffers: may be shared by many files.
        """
        self._path = path
        self._buffers = buffers
        self._direct = _open_direct(path, os.O_RDONLY | os.O_NONBLOCK)
        if self.works and not os.path.samestat(os.fstat(fd), os.fstat(self._direct)):
            self.close()  # it was replaced meanwhile

    @property
    def works(self) -> bool:
        return self._direct >= 0

    def read_into(self, out: memoryview, offset: int) -> int:
        """Reads bytes from an offset on; returns how many, from none to all.

        Fewer where the file ends, a read is cut short, or the file system refuses:
        the ordinary way reads the rest, or says what is wrong.

        Raises:
          OSError: the disk; it names the file.
        """
        whole = self._buffers.get()
        done = 0
        while done < len(out) and self.works:
            start = (offset + done) // BLOCK * BLOCK
            skipped = offset + done - start
            wanted = min(len(out) - done, len(whole) - skipped)
            buffer = whole[: skipped + wanted + -(skipped + wanted) % BLOCK]
            count = min(self._pread(memoryview(buffer), start) - skipped, wanted)
            if count <= 0:
                break
            out[done : done + count] = memoryview(whole[skipped : skipped + count])
            done += count
            if count < wanted:
                break
        return done

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        fd, self._direct = self._direct, -1
        if fd >= 0:
            os.close(fd)

    def _pread(self, blocks: memoryview, offset: int) -> int:
        with durable.naming(self._path):
            try:
                return os.preadv(self._direct, [blocks], offset)
            except OSError as error:
                if error.errno not in _REFUSALS:
                    raise
        return 0  # the next may be refused as well: it costs little to ask


def _open_direct(path: Path, mode: int) -> int:
    """A descriptor that goes past the page cache; -1 where there is none."""
    uncached = getattr(fcntl, "F_NOCACHE", None)  # macOS has it for O_DIRECT
    if not hasattr(os, "O_DIRECT") and uncached is None:
        return -1
    flags = mode | os.O_CLOEXEC | getattr(os, "O_DIRECT", 0)
    try:
        fd = os.open(path, flags)
    except OSError:  # it was opened the ordinary way, which is enough
        return -1
    try:
        if uncached is not None:
            fcntl.fcntl(fd, uncached, 1)
    except OSError:
        os.close(fd)
        return -1
    return fd
