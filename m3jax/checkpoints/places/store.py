"""Folders and files of object stores: gs://, s3://, and whatever fsspec knows.

`etils.epath` opens such paths through fsspec, too, but only of four kinds, and it has
no reading of byte ranges; its paths are accepted, since `os.fspath` gives their URLs.

A `StorePath` does what this package needs of a `pathlib.Path`. A folder is listed
once. What a store lists is not trusted: an entry whose name could lead out of the
folder is as good as absent. There are no links, and every read asks for its bytes by
offset, so a file is read from many threads at once (`files.StoreFile`).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.names import is_plain_name

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
# An object of this name says that an output has begun; it is removed after the last
# of all objects, the record m3jax.json, is written.
PARTIAL = "m3jax-partial"
_RECORD = "m3jax.json"
_LOCAL = ("file", "local")
_NO_STORES = ("http", "https")  # they list no folders
# Of m3jax's own extras; for other schemes fsspec says what to install.
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}


class StoreError(OSError):
    """A store did not do what it was asked for; one line with its reason."""


def parse(path: str) -> Location:
    """A `StorePath` for a URL, a `Path` for everything else, its ~ expanded.

    Raises:
      CheckpointError: no installed package knows the URL's scheme.
    """
    found = _SCHEME.match(path)
    scheme = found[1].lower() if found else ""
    if found is None or scheme in _NO_STORES:
        return Path(os.path.expanduser(path))  # noqa: PTH111 - Path's own may raise
    if scheme in _LOCAL:  # local files have a faster way, with checks of their own
        return Path(path[found.end() :])
    # Imported here: it takes a tenth of a second, and most merges are local.
    import fsspec

    for name in ("gcsfs", "s3fs"):  # they log, at length, what they raise as well
        logging.getLogger(name).setLevel(logging.CRITICAL)
    url = path.rstrip("/")
    with asked(path, "opened"):
        try:
            file_system, inner = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            extra, why = _EXTRAS.get(scheme), " ".join(str(error).split())
            if extra and isinstance(error, ImportError):
                why = f"its package is missing: pip install '.[{extra}]' in a checkout"
            raise CheckpointError(f"{path}: cannot open {scheme}://: {why}") from None
    return StorePath(file_system, url, inner.rstrip("/"))


class StorePath:
    """A folder or file of a store, used like a `pathlib.Path`."""

    def __init__(self, file_system: Any, url: str, inner: str):
        """`inner` is the path as the fsspec file system has it."""
        self.file_system = file_system
        self.inner = inner
        self._url = url

    def __str__(self) -> str:
        return self._url

    def __fspath__(self) -> str:
        return self._url

    def __truediv__(self, name: str) -> StorePath:
        path = StorePath(
            self.file_system, f"{self._url}/{name}", f"{self.inner}/{name}"
        )
        path.parent = self  # which may have been listed already
        return path

    @property
    def name(self) -> str:
        return self.inner.rpartition("/")[2]

    @functools.cached_property
    def parent(self) -> StorePath:
        url, inner = (path.rpartition("/")[0] for path in (self._url, self.inner))
        return StorePath(self.file_system, url, inner)

    def resolve(self) -> StorePath:
        return self

    def is_relative_to(self, other: StorePath) -> bool:
        """Whether this is `other`, or something in it."""
        same = self.file_system == other.file_system
        return same and f"{self.inner}/".startswith(f"{other.inner}/")

    def is_dir(self) -> bool:
        return self._kind == "directory"

    def is_file(self) -> bool:
        return self._kind == "file"

    def exists(self) -> bool:
        """Whether the folder that this path is in lists it."""
        return self.name in self.parent._entries

    def iterdir(self) -> Iterator[StorePath]:
        """What is in the folder, in order of names."""
        return (self / name for name in sorted(self._entries))

    def sizes(self) -> dict[str, int | None]:
        """Bytes of every file of the folder as of now, None for a folder in it.

        A folder that does not exist has none.
        """
        self.__dict__.pop("_entries", None)
        return {
            name: entry.get("size") if entry.get("type") == "file" else None
            for name, entry in self._entries.items()
        }

    def info(self) -> dict[str, Any] | None:
        """What fsspec knows of it as of now, None if there is no such thing."""
        with asked(self, "found"):
            # It keeps what it has heard, and others may have written since.
            self.file_system.invalidate_cache()
            try:
                return self.file_system.info(self.inner)
            except FileNotFoundError:
                return None

    @functools.cached_property
    def _kind(self) -> str | None:
        return (self.info() or {}).get("type")

    @functools.cached_property
    def _entries(self) -> dict[str, dict[str, Any]]:
        """What fsspec says of each entry of a folder, by name."""
        with asked(self, "listed"):
            self.file_system.invalidate_cache()
            try:
                listed = self.file_system.ls(self.inner, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return {}
        entries = {}
        for entry in listed:
            before, _, name = str(entry["name"]).rstrip("/").rpartition("/")
            if before == self.inner and is_plain_name(name):
                entries[name] = entry
        return entries


# On this machine, or in an object store; `parse` tells which.
Location: TypeAlias = Path | StorePath


def locate(path: StorePath) -> StorePath:
    """The path, once it is known to be a folder or a file.

    Raises:
      CheckpointError: there is no such thing, or a merge has not finished it.
      StoreError: the store does not answer, or allows no access.
    """
    if path.is_dir():
        if is_unfinished(path.sizes()):
            raise CheckpointError(
                f"{path}: is an unfinished output of m3jax; let its merge finish, or "
                "do it again with --resume or --overwrite"
            )
    elif not path.is_file():
        raise CheckpointError(f"{path}: the store has no such folder or file")
    return path


def is_unfinished(names: Collection[str]) -> bool:
    """Whether a folder of these files is one that m3jax has begun and not finished."""
    return PARTIAL in names and _RECORD not in names


@contextlib.contextmanager
def asked(path: StorePath | str, what: str) -> Iterator[None]:
    """Turns what any store's library may raise into one line; `what` was to be done."""
    try:
        yield
    except (CheckpointError, StoreError):
        raise
    except Exception as error:  # each library has a dozen of its own
        reason = shown(str(error).strip().split("\n")[0], limit=200)
        raise StoreError(
            f"{path}: cannot be {what} ({type(error).__name__}: {reason}); check the "
            "name, your access and the network"
        ) from None
