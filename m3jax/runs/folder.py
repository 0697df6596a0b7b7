"""The folder that a long run writes into: for it alone, its files whole or absent."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.places import durable


@contextlib.contextmanager
def claimed(
    folder: Path,
    *,
    overwrite: bool,
    resume: bool,
    what: str,
    files: tuple[str, ...],
    first: str,
) -> Iterator[None]:
    """Makes the folder, and keeps others from writing into it meanwhile.

    A folder that it has made goes again where a run fails before it writes anything.

    Args:
      folder: may hold other files; they are left alone.
      overwrite: remove what an earlier run has written.
      resume: go on from there.
      what: a run is called.
      files: that it writes, as patterns.
      first: of these, the one that says whose they are.

    Raises:
      CheckpointError: a run is there, and neither was asked for; or another process is
        writing.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise CheckpointError(
            f"{folder}: it, or what it lies in, is not a folder; choose another "
            "--output"
        ) from None
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{folder}: another {what} is writing there; wait for it, or "
                "choose another --output"
            ) from None
        there = [own.name for name in files for own in sorted(folder.glob(name))]
        if there and first not in there:
            raise CheckpointError(
                f"{folder}: holds {there[0]}, but no {first}, so it is not m3jax's; "
                "move it away or choose another --output"
            )
        if there and not (overwrite or resume):
            raise CheckpointError(
                f"{folder}: holds an earlier {what}; --resume goes on with it, "
                "--overwrite begins anew"
            )
        if not resume:
            for name in reversed(there):  # the trials last: they say whose it is
                (folder / name).unlink()
        try:
            yield
        except BaseException as error:
            # A ValueError would be raised again: something has to be mended first.
            if (folder / first).exists() and not isinstance(error, ValueError):
                error.add_note(
                    f"what is done so far is kept in {folder}; the same command with "
                    "--resume goes on from there"
                )
            if made:
                with contextlib.suppress(OSError):  # it is not empty
                    folder.rmdir()
            raise
    finally:
        os.close(fd)


def write(path: Path, text: str) -> None:
    """Writes a file that is there completely or not at all."""
    unfinished = path.with_name(f".{path.name}.partial")
    try:
        with durable.naming(path):
            unfinished.write_text(text, encoding="utf-8")
        durable.sync(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
