"""An output folder as the processes see it that help another one to fill it.

`OutputFolder` belongs to one process, which holds the lock and gives the folder its
name. The others write into the same folder, on a file system that all of them see,
and keep journals of their own.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.output.folder import OutputFolder
from m3jax.checkpoints.places import durable

_SECONDS = 10  # in which a file of another machine has to be seen


class OutputPart:
    """The folder under construction, in a process that only helps to fill it.

    Attributes:
      final, path, journalled: as those of `OutputFolder`.
    """

    def __init__(self, whole: dict[str, Any], final: Path, index: int):
        """Looks for the folder of the first process.

        Args:
          whole: what `described` gave the first process.
          final: the folder's final path.
          index: of this process, not 0.

        Raises:
          CheckpointError: this process does not see the folder.
        """
        work = final.parent / whole["work"]
        self.final = final
        self.path = work / whole["path"]
        self.journalled: list[dict[str, Any]] = whole["journalled"]
        self._journal = work / f"journal-{index}.jsonl"
        if not _appears(work / whole["token"]):
            raise CheckpointError(
                f"{final}: process {index} does not see what process 0 writes there; "
                "choose an --output on a file system that all processes share"
            )

    def clear(self, *, keep: Collection[str] = ()) -> None:
        """Removes this process's journal, unless there is something to keep."""
        if not keep:
            self.journalled = []
            self._journal.unlink(missing_ok=True)

    def journal(self, *entries: dict[str, Any]) -> None:
        """Appends lines to this process's journal."""
        durable.append_lines(self._journal, list(entries))


@contextlib.contextmanager
def described(folder: OutputFolder) -> Iterator[dict[str, Any]]:
    """What the other processes have to know of a folder to help filling it.

    A file of a new name stands there meanwhile, by which they know that they see the
    same file system: a name that was never asked for is in no cache.
    """
    token = folder.path.parent / f"token-{secrets.token_hex(8)}"
    token.touch()
    try:
        yield {
            "work": folder.path.parent.name,
            "path": folder.path.name,
            "token": token.name,
            "journalled": folder.journalled,
        }
    finally:
        token.unlink(missing_ok=True)


def _appears(path: Path) -> bool:
    end = time.monotonic() + _SECONDS
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
