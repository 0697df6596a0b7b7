"""JSON lines that survive the death of the process, under a header that binds them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.places import durable

Line = dict[str, Any]


class Log:
    """The lines of a file, the first of which says what they belong to.

    Attributes:
      lines: that were there when it was opened, without the header.
    """

    def __init__(self, path: Path | None, header: Line):
        """Opens a file, or begins it.

        A last line that is torn is cut off: the process died while it wrote it.

        Args:
          path: of the file; None: nothing is kept.
          header: JSON values; compared with that of the file.

        Raises:
          CheckpointError: the file belongs to something else; one line says what
            differs.
        """
        self._path = path
        self.lines: list[Line] = []
        if path is None:
            return
        header = json.loads(_encode(header))  # tuples become lists
        found = _read(path)
        if found:
            compare(path, found[0], header)
            self.lines = found[1:]
        else:
            self.append(header)

    def append(self, line: Line) -> None:
        """Writes a line, and waits until the disk has it."""
        if self._path is None:
            return
        with durable.naming(self._path), self._path.open("ab") as file:
            file.write(_encode(line))
            file.flush()
            os.fsync(file.fileno())


def _encode(line: Line) -> bytes:
    text = json.dumps(line, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def _read(path: Path) -> list[Line]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        os.truncate(path, len(whole))
    lines = []
    for number, text in enumerate(whole.splitlines(), start=1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict):
            raise CheckpointError(
                f"{path}, line {number}: is not as m3jax wrote it; choose another "
                "output, or begin anew with --overwrite"
            )
        lines.append(line)
    return lines


def compare(path: Path | str, found: Line, wanted: Line, what: str = "output") -> None:
    """Raises CheckpointError, saying what differs, unless two headers are equal.

    Args:
      path: of what was begun with the one that was found.
      what: it is, of which another one may be chosen.
    """
    differing = [
        name for name in {**wanted, **found} if found.get(name) != wanted.get(name)
    ]
    if differing:
        name = differing[0]
        more = f" (and {', '.join(differing[1:])})" if differing[1:] else ""
        raise CheckpointError(
            f"{path}: was begun with {name} = {shown(found.get(name))}, now it is "
            f"{shown(wanted.get(name))}{more}; resume with the same command, or "
            f"choose another {what}"
        )
