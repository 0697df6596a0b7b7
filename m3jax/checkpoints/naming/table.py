"""What the steps of naming take and give: tensors by name, and lines for the user."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from m3jax.checkpoints.errors import shown
from m3jax.checkpoints.source import Source

Table = dict[str, Source]


def renamed(table: Mapping[str, Source], rename: Callable[[str], str]) -> Table | None:
    """The table under other names; None where two tensors would get the same."""
    names = [rename(name) for name in table]
    if len(set(names)) < len(names):
        return None
    return dict(zip(names, table.values(), strict=True))


def counted(names: Sequence[str], what: str = "tensor") -> str:
    """How many there are, with an example."""
    plural = "" if len(names) == 1 else "s"
    such = "" if len(names) == 1 else "such as "
    return f"{len(names)} {what}{plural} ({such}{shown(names[0], 80)})"


def fits(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether shapes are equal, or differ in rows alone, as vocabularies do."""
    return len(a) == len(b) and a[1:] == b[1:]
