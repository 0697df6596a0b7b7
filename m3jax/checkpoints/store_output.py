"""Writes a checkpoint folder to an object store, which has no renaming.

A store takes whole objects, each at once. So every file is made in a folder of this
machine and sent when it is complete, by one writer, and its room is free again. While
a merge into `URL` runs, and after one that was interrupted,

    URL/m3jax-partial        says that the output has begun
    TMPDIR/m3jax-USER/.../   holds the lock, the journal and the files not yet sent, as
                             `output` describes them

The order is: `m3jax-partial`; then, of an output that is replaced, its record, index
and single file are removed; files of tensors as they are completed; side files; the
index; then files that only the old output had are removed; `m3jax.json`, last of all;
and `m3jax-partial` is removed. A reader therefore finds all of an output, or no
`m3jax.json`; m3jax refuses to read a folder with `m3jax-partial` and no `m3jax.json`.

What this cannot do, other than on a local disk: an output that is replaced is gone as
soon as the first new file is sent; and another machine that writes the same output at
the same time is noticed only at the end, if at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import tempfile
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np

from m3jax.checkpoints.files import StoreFile
from m3jax.checkpoints.folder import INDEX, WEIGHTS
from m3jax.checkpoints.output import (
    MANIFEST,
    OutputError,
    OutputFolder,
    SpaceError,
    check_name,
    check_names,
)
from m3jax.checkpoints.shards import Shard, ShardWriter
from m3jax.checkpoints.store import (
    PARTIAL,
    StoreError,
    StorePath,
    asked,
    is_unfinished,
)

_UPLOADS = 2  # at the same time; libraries split a file into parts of their own
# Files that are here at once: those being sent, one that waits, those being written.
_STAGED = _UPLOADS + 3
_TENSOR_FILE = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors")


class StoreOutput(OutputFolder):
    """The output under construction; see `OutputFolder`, of which this has the methods.

    Attributes:
      url: where the output goes.
      final: its place in the staging folder, under which nothing ever appears.
      sent: bytes of each object that this merge, or the one it resumes, has sent.
    """

    def __init__(
        self,
        url: StorePath,
        *,
        overwrite: bool,
        resume: bool,
        note: Callable[[str], None] = lambda line: None,
    ):
        before = check_free(url, overwrite=overwrite, resume=resume)
        self.url = url
        self.sent: dict[str, int] = {}
        self._before = set(before)
        self._ours: set[str] = set()
        self._begun = self._complete = False
        self._turn = threading.Lock()  # to send something
        self._pool = ThreadPoolExecutor(_UPLOADS, "upload")
        self._beginning: Future[None] | None = None
        self._sending: list[Future[None]] = []
        try:
            super().__init__(staged(url), overwrite=True, resume=resume, note=note)
        except OutputError as error:
            raise OutputError(f"{url}: {error}") from None
        if self.journalled and is_unfinished(before):
            self.sent = {
                name: size
                for name, size in before.items()
                if size is not None and _TENSOR_FILE.fullmatch(name)
            }
            self._ours = set(self.sent)

    @property
    def committed(self) -> bool:
        return self._complete

    def clear(self, *, keep: Collection[str] = ()) -> None:
        if not keep:
            self.sent = {}
        super().clear(keep=keep)

    def check_space(self, needed: int, *, largest: int = 0) -> None:
        try:
            super().check_space(min(needed, _STAGED * largest), largest=largest)
        except SpaceError as error:
            raise SpaceError(
                f"{error} (files wait there on their way to {self.url}; TMPDIR names "
                "another folder, a smaller max_shard_size needs less room)"
            ) from None

    def send(self, name: str) -> None:
        """Sends a complete file and removes it here; waits while others are waiting."""
        with self._turn:
            running = [sending for sending in self._sending if not sending.done()]
            if len(running) > _UPLOADS:
                wait(running, return_when=FIRST_COMPLETED)
            self._raise_failure()
            self._begin_once()
            self._sending.append(self._pool.submit(self._send, name))

    def commit(self, *, fsync: bool) -> None:
        """Sends what is left, the record last, and so completes the output."""
        del fsync  # the store answers when it has an object
        wait(self._sending)
        self._raise_failure()
        self._begin_once()
        here = {path.name for path in self.path.iterdir()}
        for name in [*sorted(here - {INDEX, MANIFEST}), *here & {INDEX}]:
            self._send(name)
        found = self.url.sizes()
        if MANIFEST in found:
            raise OutputError(
                f"{self.url}: another merge has written this output meanwhile; do it "
                "again"
            )
        wrong = [name for name, size in self.sent.items() if found.get(name) != size]
        if wrong:
            raise StoreError(
                f"{self.url}: {wrong[0]} is not there as it was sent; does another "
                "merge write the same output?"
            )
        for name in found.keys() & self._before - {PARTIAL, *self.sent}:
            self._remove(name)
        if MANIFEST in here:  # only a merge has a record
            self._send(MANIFEST)
            self._complete = True
        try:
            self._remove(PARTIAL)
        except StoreError as error:
            if not self._complete:
                raise
            self._note(f"{self.url / PARTIAL}: remove it yourself ({error})")
        self._complete = True

    def _send(self, name: str) -> None:
        assert self._beginning is not None
        self._beginning.result()  # or what went wrong with it
        source = self.path / name
        size = source.stat().st_size
        self._ours.add(name)
        self._put(source, self.url / name)
        self.sent[name] = size
        source.unlink()

    def _begin_once(self) -> None:
        """Before anything is sent; what fails is not tried again by the next upload."""
        if self._beginning is None:
            self._beginning = self._pool.submit(self._begin)

    def _begin(self) -> None:
        """Says that there is an unfinished output, and ends the one it replaces."""
        marker = self.path.parent / PARTIAL
        marker.write_text("An output of m3jax that is not complete.\n")
        self._put(marker, self.url / PARTIAL)
        for name in (MANIFEST, INDEX, WEIGHTS):
            if name in self._before and name not in self.sent:
                self._remove(name)
        self._begun = True

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

    def _raise_failure(self) -> None:
        """Raises what went wrong with an upload."""
        for sending in self._sending:
            if sending.done():
                sending.result()

    def _leave(self, *, keep: bool) -> None:
        self._pool.shutdown(cancel_futures=True)
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


class StoreShardWriter(ShardWriter):
    """Writes the files of tensors in the staging folder; see `ShardWriter`.

    What an interrupted merge has sent already is read from the store, and fetched
    from there should something in it have to be written again.
    """

    def __init__(self, output: StoreOutput, shards: Sequence[Shard]):
        self._output = output
        self._fetching = threading.Lock()
        self._sent: dict[str, StoreFile] = {}
        super().__init__(output, shards)

    def _open(self, shard: Shard, create: bool) -> None:
        is_here = (self._folder / shard.name).exists()
        if self._output.sent.get(shard.name) == shard.size and not is_here:
            self._sent[shard.name] = StoreFile(self._output.url / shard.name)
        else:
            super()._open(shard, create)

    def write(self, shard: int, offset: int, values: np.ndarray) -> None:
        self._fetch(self._shards[shard])
        super().write(shard, offset, values)

    def read(self, shard: int, offset: int, out: np.ndarray) -> None:
        sent = self._sent.get(self._shards[shard].name)
        if sent is None:
            super().read(shard, offset, out)
        else:
            sent.read_into(memoryview(out), offset)

    def complete(self, shard: int) -> None:
        name = self._shards[shard].name
        if name in self._held:
            os.close(self._held.pop(name))  # or it would keep its room when removed
            self._output.send(name)

    def _fetch(self, shard: Shard) -> None:
        with self._fetching:
            source = self._sent.pop(shard.name, None)
            if source is not None:
                with asked(source.path, "read"):
                    source.path.file_system.get_file(
                        source.path.inner, str(self._folder / shard.name)
                    )
                del self._output.sent[shard.name]
                super()._open(shard, create=True)


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
