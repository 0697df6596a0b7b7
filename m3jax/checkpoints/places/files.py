"""Opens files that may be hostile, and reads them from many threads."""

from __future__ import annotations

import errno
import functools
import operator
import os
import re
import stat
from pathlib import Path

from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.places import direct
from m3jax.checkpoints.places.durable import naming
from m3jax.checkpoints.places.store import Location, StorePath, asked

# The most precise facts about an object come first; the first that is known decides.
_VERSIONS = (
    *("generation", "etag", "ETag", "content_md5", "blob_id"),
    *("mtime", "LastModified", "last_modified", "updated", "modified", "created"),
)
_CACHED = re.compile(r"models--[\w.-]+")  # a model's folder in the hub's cache
# Bytes of one request to a store. Requests of a read run at the same time where the
# store's library can do that; smaller ones would wait for their answers more than they
# read.
_REQUEST = 8 << 20
_POINTER = b"version https://git-lfs.github.com/spec/"
_MAX_POINTER = 1024  # bytes, by its specification


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
    """Opens a regular file; see `open_regular` for the errors.

    Raises:
      CheckpointError: it is what Git LFS leaves in a file's place.
    """
    if not isinstance(path, Path):
        return StoreFile(path)
    file = InputFile(path)
    try:
        if file.size < _MAX_POINTER and file.read(0, file.size).startswith(_POINTER):
            raise CheckpointError(
                f"{path}: a pointer of Git LFS, not the file itself; fetch it with git "
                "lfs pull, or download it again"
            )
    except BaseException:
        file.close()
        raise
    return file


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


def inside(folder: Location, name: str) -> Location:
    """The path of a file of the folder; a link may lead only into the hub's cache.

    A downloaded folder must not be able to name a file of its reader's and have it
    copied into a merged model.

    Raises:
      CheckpointError: the file is missing, or a link that leads elsewhere.
    """
    path = functools.reduce(operator.truediv, name.split("/"), folder)
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
    if not (target.is_relative_to(home) or _is_blob(target, home)):
        raise CheckpointError(
            f"{path}: a link that leads out of the folder, to {shown(str(target))}; "
            "copy the file into the folder"
        )
    return path


def _is_blob(target: Path, home: Path) -> bool:
    """Whether a link's target is a file of the hub's cache that the folder may have.

    The cache holds snapshots/COMMIT/NAME -> ../../blobs/CHECKSUM, and NAME may be in a
    folder of its own. Older versions of the hub's library made folders elsewhere whose
    files are links to .../models--ORG--NAME/blobs/CHECKSUM.
    """
    if _CACHED.fullmatch(target.parent.parent.name) and target.parent.name == "blobs":
        return True
    for folder in (home, *home.parents[:2]):
        if folder.parent.name == "snapshots":
            return target.parent == folder.parent.parent / "blobs"
    return False


class InputFile:
    """A file of a checkpoint, opened once and read from many threads at offsets."""

    path: Location

    def __init__(self, path: Path):
        """Opens a regular file; see `open_regular` for the errors."""
        self.path = path
        self._fd = open_regular(path)
        self._direct: direct.DirectInput | None = None
        self._state = self._look()

    @property
    def size(self) -> int:
        """Bytes of the file when it was opened."""
        return self._state[0]

    @property
    def version(self) -> int | str:
        """Changes when the file is written to.

        Of a local file, the time of its last change in nanoseconds; of a store, its
        tag or time of the last change, empty where it has neither.
        """
        return self._state[1]

    def read_into(self, out: memoryview, offset: int) -> None:
        """Fills `out` with the bytes from `offset` on.

        Raises:
          CheckpointError: the file ends before that.
          OSError: the disk; it names the file.
        """
        if self._direct is not None and len(out) >= direct.LEAST:
            count = self._direct.read_into(out, offset)
            out, offset = out[count:], offset + count
        with naming(self.path):
            while len(out):
                count = os.preadv(self._fd, [out], offset)
                if count == 0:
                    raise CheckpointError(
                        f"{self.path}: ends at byte {offset}, {len(out)} bytes short; "
                        "the file became shorter while it was read: fetch it again"
                    )
                out, offset = out[count:], offset + count

    def read_directly(self, buffers: direct.Buffers) -> bool:
        """Has large reads go past the page cache; False where that cannot be done."""
        assert isinstance(self.path, Path)
        self._direct = direct.DirectInput(self.path, self._fd, buffers)
        return self._direct.works

    def is_cached(self, offset: int) -> bool | None:
        """Whether a byte could be read without the disk; None: the system keeps mum."""
        if not hasattr(os, "RWF_NOWAIT"):
            return None
        try:
            os.preadv(self._fd, [bytearray(1)], offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return False
        except OSError:  # this file system cannot say
            return None
        return True

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` on, which the caller knows to be there."""
        content = bytearray(count)
        self.read_into(memoryview(content), offset)
        return bytes(content)

    def check_unchanged(self) -> None:
        """Raises CheckpointError if the file was written to since it was opened."""
        if self._look() != self._state:
            raise CheckpointError(
                f"{self.path}: was changed while it was read; merge again"
            )

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if self._direct is not None:
            self._direct.close()
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> InputFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _look(self) -> tuple[int, int | str]:
        """Size and version, as of now."""
        found = os.fstat(self._fd)
        return found.st_size, found.st_mtime_ns


class StoreFile(InputFile):
    """A file of a store; see `InputFile`."""

    path: StorePath

    def __init__(self, path: StorePath):
        self.path = path
        self._state = self._look()

    def read_into(self, out: memoryview, offset: int) -> None:
        stop = offset + len(out)
        starts = list(range(offset, stop, _REQUEST))
        stops = [min(start + _REQUEST, stop) for start in starts]
        with asked(self.path, "read"):
            parts = self.path.file_system.cat_ranges(
                [self.path.inner] * len(starts), starts, stops, on_error="raise"
            )
        for part, start, end in zip(parts, starts, stops, strict=True):
            if len(part) != end - start:
                raise CheckpointError(
                    f"{self.path}: bytes {start} to {end} came as {len(part)} bytes; "
                    "the file became shorter while it was read: fetch it again"
                )
            out[start - offset : end - offset] = part

    def close(self) -> None:
        """Nothing is held."""

    def _look(self) -> tuple[int, int | str]:
        facts = self.path.info()
        if facts is None or facts.get("type") != "file":
            raise CheckpointError(
                f"{self.path}: is {'no file' if facts else 'missing'}"
            )
        size = facts.get("size")
        if type(size) is not int or size < 0:
            raise CheckpointError(
                f"{self.path}: the store says its size is {shown(size)}; copy the file "
                "here"
            )
        known = (f"{key} {facts[key]}" for key in _VERSIONS if facts.get(key))
        return size, next(known, "")


def _check_regular(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        kinds = (
            (stat.S_ISDIR, "a folder"),
            (stat.S_ISFIFO, "a FIFO"),
            (stat.S_ISSOCK, "a socket"),
        )
        what = next((kind for test, kind in kinds if test(found.st_mode)), "a device")
        raise CheckpointError(f"{path}: is {what}, needs to be a regular file")
