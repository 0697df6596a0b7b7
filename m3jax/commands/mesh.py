"""`--mesh=rows=2,columns=4`: how devices split tensors."""

from __future__ import annotations

from m3jax.commands.cli import UsageError


def sizes(entries: list[str] | None) -> dict[str, int] | None:
    """The sizes of the axes that the flag names; None where it is not given.

    Raises:
      UsageError: they cannot be read.
    """
    if entries is None:
        return None
    pairs = [entry.partition("=") for entry in entries]
    if not all(size.isdecimal() for _, _, size in pairs):
        raise UsageError(f"--mesh={','.join(entries)} needs AXIS=SIZE[,AXIS=SIZE]")
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise UsageError(f"--mesh={','.join(entries)} names an axis twice")
    return {name: int(size) for name, _, size in pairs}
