"""Opens files that may be hostile, and reads them from many threads."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeAlias

from m3jax.checkpoints.errors import CheckpointError, shown

if TYPE_CHECKING:  # it is made of what stands here
    from m3jax.checkpoints.store import StorePath

# On this machine, or in an object store; `store.parse` tells which.
Location: TypeAlias = "Path | StorePath"

_MAX_FILE_NAME = 255  # characters; the limit of file systems


def open_regular(path: Path) -> int:
    """Opens a regular file for reading and returns its descriptor.

    A FIFO, a device or a folder is refused before it can block, never end, or do
    something on being opened.

    Raises:
      CheckpointError: it is not a regular file.
      OSError: it is missing or may not be read, or too many files are open.
    """
    _check_regular(path, path.stat())
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        raise OSError(
            f"{path}: this process may not open more files; allow more of them "
            "(ulimit -n 65536), or merge fewer models at a time"
        ) from None
    try:
        _check_regular(path, os.fstat(fd))  # it may have been replaced since
    except BaseException:
        os.close(fd)
        raise
    return fd


def exists(path: Location) -> bool:
    """Whether a folder holds this name, be it a link that leads nowhere."""
    return os.path.lexists(path) if isinstance(path, Path) else path.exists()


def open_file(path: Location) -> InputFile:
    """Opens a regular file; see `open_regular` for the errors."""
    return InputFile(path) if isinstance(path, Path) else path.open()


def open_small(path: Location, limit: int) -> InputFile:
    """Opens a regular file of at most `limit` bytes.

    Raises:
      CheckpointError: it is larger, or no regular file.
    """
    file = open_file(path)
    if file.size > limit:
        file.close()
        raise CheckpointError(
            f"{path}: has {file.size} bytes, at most {limit} are read of such a file; "
            "it is damaged, or not what its name says"
        )
    return file


def read_small(path: Location, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes; see `open_small`."""
    with open_small(path, limit) as file:
        return file.read(0, file.size)


def is_plain_name(name: object) -> bool:
    """Whether `name` can only be that of a file in the folder that speaks of it."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and 0 < len(name) <= _MAX_FILE_NAME
        and name not in (".", "..")
        and not set("/\\") & set(name)
    )


def inside(folder: Location, name: str) -> Location:
    """The path of a file of the folder; a link may lead only into the hub's cache.

    A downloaded folder must not be able to name a file of its reader's and have it
    copied into a merged model.

    Raises:
      CheckpointError: the file is missing, or a link that leads elsewhere.
    """
    path = folder / name
    if not (isinstance(folder, Path) and isinstance(path, Path)):
        if not exists(path):
            raise CheckpointError(f"{folder}: file {shown(name)} is missing")
        return path  # stores have no links
    # Path's own methods raise where the name is too long.
    if not os.path.exists(path):  # noqa: PTH110
        what = "a link to nothing" if os.path.islink(path) else "missing"  # noqa: PTH114
        raise CheckpointError(
            f"{folder}: file {shown(name)} is {what}; copy or download it again"
        )
    home, target = folder.resolve(), path.resolve()
    # The hub's cache holds snapshots/COMMIT/NAME -> ../../blobs/CHECKSUM.
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not (target.is_relative_to(home) or target.is_relative_to(blobs)):
        raise CheckpointError(
            f"{path}: a link that leads out of the folder, to {shown(str(target))}; "
            "copy the file into the folder"
        )
    return path


class InputFile:
    """A file of a checkpoint, opened once and read from many threads at offsets."""

    def __init__(self, path: Path):
        """Opens a regular file; see `open_regular` for the errors."""
        self.path: Location = path
        self._fd = open_regular(path)
        self._stat = os.fstat(self._fd)

    @property
    def size(self) -> int:
        """Bytes of the file when it was opened."""
        return self._stat.st_size

    @property
    def modified_ns(self) -> int:
        """Time of the last change before it was opened, in nanoseconds."""
        return self._stat.st_mtime_ns

    @property
    def version(self) -> int | str:
        """Changes when the file is written to."""
        return self.modified_ns

    def read_into(self, out: memoryview, offset: int) -> None:
        """Fills `out` with the bytes from `offset` on.

        Raises:
          CheckpointError: the file ends before that.
          OSError: the disk; it names the file.
        """
        while len(out):
            try:
                count = os.preadv(self._fd, [out], offset)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.path)) from None
            if count == 0:
                raise CheckpointError(
                    f"{self.path}: ends at byte {offset}, {len(out)} bytes short; the "
                    "file became shorter while it was read: fetch it again"
                )
            out, offset = out[count:], offset + count

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` on, which the caller knows to be there."""
        content = bytearray(count)
        self.read_into(memoryview(content), offset)
        return bytes(content)

    def check_unchanged(self) -> None:
        """Raises CheckpointError if the file was written to since it was opened."""
        now = os.fstat(self._fd)
        if (now.st_size, now.st_mtime_ns) != (self.size, self.modified_ns):
            raise CheckpointError(
                f"{self.path}: the file was changed while it was read; merge again"
            )

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> InputFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _check_regular(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        kinds = (
            (stat.S_ISDIR, "a folder"),
            (stat.S_ISFIFO, "a FIFO"),
            (stat.S_ISSOCK, "a socket"),
        )
        what = next((kind for test, kind in kinds if test(found.st_mode)), "a device")
        raise CheckpointError(f"{path}: is {what}, needs to be a regular file")
