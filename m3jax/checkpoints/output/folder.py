"""Writes a checkpoint folder so that its final name never shows a part of it.

While a merge into `NAME` runs, a hidden folder beside it, `.NAME.m3jax-partial`, holds

    lock             held as long as the merge runs: a second one is refused
    journal.jsonl    what was found out and completely written, for `--resume`; where
                     several processes write, journal-1.jsonl and so on are the others'
    checkpoint/      the output under construction, renamed to `NAME` when it is whole
    old/             only where two names cannot be swapped in one step, for a moment:
                     the output that is being replaced

and goes away with the end of the merge, unless there is something to resume.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import resource
import shutil
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from types import TracebackType
from typing import Any

from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.formats.json_text import load_json
from m3jax.checkpoints.formats.orbax import ITEM
from m3jax.checkpoints.names import is_inner_name
from m3jax.checkpoints.places import durable
from m3jax.checkpoints.places.files import Location, read_small
from m3jax.checkpoints.side_files import SIDE_FILES
from m3jax.checkpoints.weights import STEMS

MANIFEST = "m3jax.json"
MODEL_CARD = "README.md"
_JOURNAL, _LOCK, _CHECKPOINT, _OLD = "journal.jsonl", "lock", "checkpoint", "old"
_MAX_RECORD = 100_000_000  # bytes; see `record`
_SHARD = re.compile(
    rf"(({'|'.join(STEMS)})-\d{{5,}}-of-\d{{5,}}|(mask|head)-\d+)\.safetensors"
)
# What flock says where the file system has no locks, as Lustre mounted without them.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class OutputError(CheckpointError):
    """The output's place is taken, or in use."""


class SpaceError(OSError):
    """The disk has too little room for the output, or the system allows no such file.

    The message is one line with both numbers.
    """


class OutputFolder:
    """The folder under construction. Use as a context manager.

    Leaving it by an exception keeps the partial folder for `--resume`, and says so in
    a note on the exception, unless nothing worth keeping was journalled.

    Attributes:
      final: the folder's final path.
      path: where its files are written.
      journalled: entries of the interrupted merge that is resumed.
    """

    def __init__(
        self,
        final: Path,
        *,
        overwrite: bool,
        resume: bool,
        note: Callable[[str], None] = lambda line: None,
    ):
        """Takes the lock; see `check_free` for the conditions.

        Args:
          final: the folder's final path.
          overwrite: replace a previous m3jax output or an empty folder.
          resume: keep what an interrupted merge has left.
          note: is told what the user should know.
        """
        check_name(final)
        self.final = final
        self._work = work_folder(final)
        self.path = self._work / _CHECKPOINT
        self._overwrite = overwrite
        self._note = note
        self._journal_lock = threading.Lock()
        self.journalled: list[dict[str, Any]] = []
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise OutputError(
                f"{final}: {final.parent} is not a folder; choose another --output"
            ) from None
        self._lock = self._take_lock()
        try:
            if durable.put_back(final, self._work / _OLD):
                note(f"{final}: put back, a crash had interrupted its replacement")
            check_free(final, overwrite=overwrite)
            self._start(resume)
            self._identity = self.path.stat()
        except BaseException:
            self._leave(keep=self.resumable)
            raise

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        keep = error is not None and self.resumable
        if error is not None and self.committed:
            error.add_note(f"{self.final} is complete")
        elif keep and error is not None:
            mend = isinstance(error, CheckpointError)  # the same would fail again
            error.add_note(
                f"what is done so far is kept in {self._work}"
                + (
                    " for --resume"
                    if mend
                    else "; the same command with --resume goes on from there"
                )
            )
        self._leave(keep=keep)

    @property
    def resumable(self) -> bool:
        """Whether an interrupted merge could go on from here."""
        return bool(self._journals()) and not self.committed

    @property
    def committed(self) -> bool:
        """Whether the final name is that of the folder which was written here."""
        if not hasattr(self, "_identity"):
            return False
        try:
            return os.path.samestat(self.final.stat(), self._identity)
        except FileNotFoundError:
            return False

    def clear(self, *, keep: Collection[str] = ()) -> None:
        """Removes what an earlier merge has left.

        Args:
          keep: files that stay, and the journal with them.
        """
        if not keep:
            self.journalled = []
            # First of all: without its files it would be of no use.
            self._remove_journals()
        for path in self.path.iterdir():
            if path.name not in keep:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def journal(self, *entries: dict[str, Any]) -> None:
        """Appends lines to the journal; they survive the death of this process."""
        with self._journal_lock:
            durable.append_lines(self._work / _JOURNAL, list(entries))

    def write(self, name: str, content: bytes) -> None:
        """Writes a whole file."""
        path = self.path / name
        path.parent.mkdir(exist_ok=True)
        with path.open("wb", 0) as file:
            durable.write_at(file.fileno(), memoryview(content), 0, path)

    def check_space(self, needed: int, *, largest: int = 0) -> None:
        """Raises SpaceError if there is no room for the output.

        Args:
          needed: bytes of all its files.
          largest: bytes of the largest of them.
        """
        held = sum(path.stat().st_blocks * 512 for path in self.path.rglob("*"))
        stats = os.statvfs(self.path)
        free = stats.f_bavail * stats.f_frsize + held
        if free < needed:
            raise SpaceError(
                f"{self.final.parent}: the merged model needs {needed:,} bytes, "
                f"{free:,} are free; free some space or choose another --output"
            )
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        if limit != resource.RLIM_INFINITY and limit < largest:
            raise SpaceError(
                f"{self.final}: needs a file of {largest:,} bytes, this process may "
                f"write {limit:,}; allow more (ulimit -f); files of safetensors get "
                "smaller with --config.max_shard_size"
            )

    def commit(self, *, fsync: bool) -> None:
        """Gives the complete folder its final name."""
        if fsync:
            try:
                for path in [*self.path.rglob("*"), self.path]:
                    durable.sync(path)
            except OSError:
                # Reading back shows what is in memory, not what the disk has lost, so
                # no checksum could tell what is left to do.
                self.clear()
                raise
        # What was allowed in the beginning may have changed during a long merge.
        check_free(self.final, overwrite=self._overwrite)
        durable.put_in_place(self.path, self.final, self._work / _OLD)
        if fsync:
            durable.sync(self.final.parent)

    def _start(self, resume: bool) -> None:
        if (self._work / _OLD).exists():  # its replacement is in place
            shutil.rmtree(self._work / _OLD)
        for path in self._work.glob("token-*"):  # of `part.described`
            path.unlink(missing_ok=True)
        self.path.mkdir(exist_ok=True)
        if resume:
            self.journalled = [
                entry for path in self._journals() for entry in durable.read_lines(path)
            ]
            if not self.journalled:
                self._note("nothing to resume; starting from the beginning")
        elif self._journals():
            self._note(
                f"{self._work}: discarding what an interrupted merge has left; "
                "--resume would go on from there"
            )
        if not self.journalled:
            self.clear()

    def _journals(self) -> list[Path]:
        """The journals of all processes that have written one, this process's first."""
        return sorted(
            self._work.glob("journal*.jsonl"),
            key=lambda path: path != self._work / _JOURNAL,
        )

    def _remove_journals(self) -> None:
        for path in self._journals():
            path.unlink(missing_ok=True)

    def _take_lock(self) -> int:
        while True:
            self._work.mkdir(exist_ok=True)
            if self._work.is_symlink():
                raise OutputError(f"{self._work}: is a link; remove it")
            try:
                fd = os.open(self._work / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
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
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    os.close(fd)
                    raise
                self._note(
                    f"{self.final.parent}: this file system has no locks; see to it "
                    "that no other merge writes the same output"
                )
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(fd).st_ino == (self._work / _LOCK).stat().st_ino:
                    return fd
            os.close(fd)

    def _leave(self, *, keep: bool) -> None:
        """Lets go of the lock; removes the partial folder unless it is to be kept."""
        try:
            if not keep:
                self._remove_journals()
                shutil.rmtree(self.path, ignore_errors=True)
                if self.path.exists():
                    self._note(f"{self.path}: cannot be removed; remove it yourself")
                if self.final.exists():
                    shutil.rmtree(self._work / _OLD, ignore_errors=True)
                (self._work / _LOCK).unlink(missing_ok=True)
        finally:
            os.close(self._lock)
        if not keep:
            # Only now: NFS keeps an entry for a file that is open. Another merge may
            # have begun in it.
            with contextlib.suppress(OSError):
                self._work.rmdir()


def check_name(final: Location) -> None:
    """Raises OutputError unless `final` ends with the name of a folder."""
    if final.name in ("", ".."):
        raise OutputError(f"{final}: needs to end with the name of the folder to make")


def work_folder(final: Path) -> Path:
    """Where an output is while it is made, and what an interruption leaves of it."""
    return final.parent / f".{final.name}.m3jax-partial"


def check_free(final: Path, *, overwrite: bool) -> None:
    """Raises OutputError unless `final` may become the output folder."""
    check_name(final)
    if not (final.exists() or final.is_symlink()):
        return
    if final.is_symlink() or not final.is_dir():
        raise OutputError(
            f"{final}: exists and is not a folder; choose another --output"
        )
    check_names(final, _names_within(final), overwrite=overwrite)
    if final.is_mount():
        raise OutputError(
            f"{final}: is a mount point, which cannot be replaced; choose a new folder "
            "in it"
        )


def check_names(final: Location, names: list[str], *, overwrite: bool) -> None:
    """Raises OutputError unless a folder of these files may be replaced."""
    ours = MANIFEST in names
    if not overwrite:
        foreign = bool(names) and not ours
        replace = "pass --overwrite to replace it"
        hint = "choose another --output" if foreign else replace
        raise OutputError(f"{final}: exists already; {hint}")
    if names and not ours:
        raise OutputError(
            f"{final}: holds no {MANIFEST}, so it is no output of m3jax and is not "
            "overwritten; choose another --output or remove it yourself"
        )
    recorded = _recorded(final) if ours else set()
    others = [n for n in names if not (_is_ours(n) or n in recorded)]
    if others:
        raise OutputError(
            f"{final}: also holds {', '.join(map(shown, others[:3]))}"
            f"{', …' * (len(others) > 3)}, which m3jax did not write and "
            "--overwrite would remove; move it away or choose another --output"
        )


def _names_within(final: Path) -> list[str]:
    """The files of an output, as its record names them; others' folders as such."""
    found = []
    for path in final.iterdir():
        inner = path.is_dir() and not path.is_symlink() and path.name != ITEM
        below = [f"{path.name}/{own.name}" for own in path.iterdir()] if inner else []
        found += below or [path.name]
    return sorted(found)


def _recorded(final: Location) -> set[str]:
    """The side files that an output's record names, and the folders they are in."""
    try:
        content = read_small(final / MANIFEST, _MAX_RECORD)
        files = load_json(content, MANIFEST).get("files")
    except CheckpointError:
        return set()
    names = {name for name in files or () if is_inner_name(name)}
    return names | {name.partition("/")[0] for name in names}


def _is_ours(name: str) -> bool:
    """Whether a file of this name is part of an output."""
    files = [f"{stem}.safetensors" for stem in STEMS]
    indexes = [f"{file}.index.json" for file in files]
    known = (MANIFEST, MODEL_CARD, ITEM, *files, *indexes, *SIDE_FILES)
    return name in known or _SHARD.fullmatch(name) is not None
