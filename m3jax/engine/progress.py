"""How a merge tells what it is doing; the commands draw it."""

from __future__ import annotations


class Progress:
    """Receives a merge's stages. The default says nothing."""

    def stage(self, label: str, total: int) -> None:
        """A pass begins that will read and write `total` bytes."""

    def advance(self, count: int) -> None:
        """`count` more bytes were read or written; called from many threads."""

    def note(self, line: str) -> None:
        """Something the user should know."""
