"""How a merge tells what it is doing; the commands draw it."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes as text, in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


class Progress:
    """Receives a merge's stages. The default says nothing."""

    def stage(self, label: str, total: int) -> None:
        """A pass begins that will read and write `total` bytes."""

    def advance(self, count: int) -> None:
        """`count` more bytes were read or written; called from many threads."""

    def note(self, line: str) -> None:
        """Something the user should know."""
