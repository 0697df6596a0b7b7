"""Writes a checkpoint folder to an object store, which has no renaming.

A store takes whole objects, each at once. So the output is made in a folder of this
machine, as every other one is, and sent when it is complete; TMPDIR needs room for all
of it. While a merge into `URL` runs, and after one that was interrupted,

    TMPDIR/m3jax-USER/.../   holds the lock, the journal and the files, as `output`
                             describes them
    URL/m3jax-partial        says that the output is being sent

The order is: `m3jax-partial`; then, of an output that is replaced, its record, index
and single file are removed; files of tensors and side files; the index; then files
that only the old output had are removed; `m3jax.json`, last of all; and
`m3jax-partial` is removed. A reader therefore finds all of an output, or no
`m3jax.json`; m3jax refuses to read a folder with `m3jax-partial` and no `m3jax.json`.

What this cannot do, other than on a local disk: an output that is replaced is gone as
soon as the first new file is sent; and another machine that writes the same output at
the same time is noticed only at the end, if at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from m3jax.checkpoints.output.folder import (
    MANIFEST,
    OutputError,
    OutputFolder,
    SpaceError,
    check_name,
    check_names,
)
from m3jax.checkpoints.places.files import InputFile, StoreFile
from m3jax.checkpoints.places.store import (
    PARTIAL,
    StoreError,
    StorePath,
    asked,
    is_unfinished,
)
from m3jax.checkpoints.weights import STEMS

_UPLOADS = 2  # at the same time; libraries split a file into parts of their own
_FILES = tuple(f"{stem}.safetensors" for stem in STEMS)
_INDEXES = {f"{file}.index.json" for file in _FILES}
_BLOCK = 64 << 20  # bytes that are compared at a time


class StoreOutput(OutputFolder):
    """The output under construction; see `OutputFolder`, of which this has the methods.

    Attributes:
      url: where the output goes.
      final: its place in the staging folder, under which nothing ever appears.
    """

    def __init__(
        self,
        url: StorePath,
        *,
        overwrite: bool,
        resume: bool,
        note: Callable[[str], None] = lambda line: None,
    ):
        self.url = url
        self._before = check_free(url, overwrite=overwrite, resume=resume)
        self._ours: set[str] = set()  # what was sent, or begun to be
        self._begun = self._complete = False
        try:
            super().__init__(staged(url), overwrite=True, resume=resume, note=note)
        except OutputError as error:
            raise OutputError(f"{url}: {error}") from None

    @property
    def committed(self) -> bool:
        return self._complete

    def check_space(self, needed: int, *, largest: int = 0) -> None:
        try:
            super().check_space(needed, largest=largest)
        except SpaceError as error:
            raise SpaceError(
                f"{error} (files wait there on their way to {self.url}; TMPDIR names "
                "another folder)"
            ) from None

    def commit(self, *, fsync: bool) -> None:
        """Sends all files, the record last, and so completes the output."""
        del fsync  # the store answers when it has an object
        sizes = {
            path.relative_to(self.path).as_posix(): path.stat().st_size
            for path in self.path.rglob("*")
            if not path.is_dir()
        }
        names = sorted(sizes.keys() - {*_INDEXES, MANIFEST})
        resumed = self.journalled and is_unfinished(self._before)
        sent = {name for name in names if resumed and self._is_sent(name)}
        self._begin(sent)
        self._send_all([name for name in names if name not in sent])
        for index in sizes.keys() & _INDEXES:
            self._send(index)
        found = self.url.sizes()
        if MANIFEST in found:
            raise OutputError(
                f"{self.url}: another merge has written this output meanwhile; do it "
                "again"
            )
        for name in sizes.keys() - {MANIFEST}:
            if "/" not in name and found.get(name) != sizes[name]:
                raise StoreError(
                    f"{self.url}: {name} is not there as it was sent; does another "
                    "merge write the same output?"
                )
        for name in found.keys() & self._before.keys() - {PARTIAL, *sizes}:
            self._remove(name)
        if MANIFEST in sizes:  # only a merge has a record
            self._send(MANIFEST)
            self._complete = True
        try:
            self._remove(PARTIAL)
        except StoreError as error:
            if not self._complete:
                raise
            self._note(f"{self.url / PARTIAL}: remove it yourself ({error})")
        self._complete = True

    def _is_sent(self, name: str) -> bool:
        """Whether the interrupted merge has sent these very bytes."""
        with InputFile(self.path / name) as file:
            if self._before.get(name) != file.size:
                return False
            there, size = StoreFile(self.url / name), file.size
            blocks = ((at, min(_BLOCK, size - at)) for at in range(0, size, _BLOCK))
            return all(file.read(*block) == there.read(*block) for block in blocks)

    def _begin(self, sent: Collection[str]) -> None:
        """Says that there is an unfinished output, and ends the one it replaces."""
        marker = self.path.parent / PARTIAL
        marker.write_text("An output of m3jax that is not complete.\n")
        self._put(marker, self.url / PARTIAL)
        for name in (MANIFEST, *sorted(_INDEXES), *_FILES):
            if name in self._before and name not in sent:
                self._remove(name)
        self._begun = True

    def _send_all(self, names: list[str]) -> None:
        with ThreadPoolExecutor(_UPLOADS, "upload") as pool:
            try:
                for sending in [pool.submit(self._send, name) for name in names]:
                    sending.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _send(self, name: str) -> None:
        self._ours.add(name)
        self._put(self.path / name, self.url / name)

    def _put(self, source: Path, target: StorePath) -> None:
        size = source.stat().st_size
        with asked(target, "written"):
            target.file_system.put_file(str(source), target.inner)
        found = (target.info() or {}).get("size")
        if found != size:
            raise StoreError(f"{target}: has {found} bytes, {size} were written")

    def _remove(self, name: str) -> None:
        target = self.url / name
        with asked(target, "removed"), contextlib.suppress(FileNotFoundError):
            target.file_system.rm_file(target.inner)

    def _leave(self, *, keep: bool) -> None:
        super()._leave(keep=keep)
        if keep:
            return
        with contextlib.suppress(OSError):
            (self._work / PARTIAL).unlink(missing_ok=True)
            self._work.rmdir()
        with contextlib.suppress(OSError):
            self._work.parent.rmdir()
        if self._begun and not self._complete:
            self._withdraw()

    def _withdraw(self) -> None:
        """Removes what was sent of an output that will not be continued."""
        try:
            for name in [*sorted(self._ours), PARTIAL]:
                self._remove(name)
        except StoreError as error:
            self._note(f"{self.url}: remove what is left of it yourself ({error})")


def check_free(
    url: StorePath, *, overwrite: bool, resume: bool
) -> Mapping[str, int | None]:
    """Raises OutputError unless `url` may become the output; returns what is there."""
    check_name(url)
    found = url.sizes()
    if is_unfinished(found):
        if not (overwrite or resume):
            raise OutputError(
                f"{url}: holds an unfinished output of m3jax; --resume goes on from "
                "there where this machine began it, --overwrite starts again"
            )
        overwrite, names = True, {MANIFEST, *found}
    else:
        names = set(found)
    if names:
        check_names(url, sorted(names - {PARTIAL}), overwrite=overwrite)
    return found


def staged(url: StorePath) -> Path:
    """Where on this machine an output for a store is made; nobody else may write there.

    The same output has the same place, so that a second merge into it is refused and
    an interrupted one finds what it has left.
    """
    root = Path(tempfile.gettempdir()) / f"m3jax-{os.getuid()}"
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = root.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise OutputError(f"{root}: is not your folder; set TMPDIR to one that is")
    digest = hashlib.sha256(str(url).encode()).hexdigest()[:16]
    return root / digest / url.name
