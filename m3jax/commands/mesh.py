"""`--mesh=rows=2,columns=4`: how devices split tensors."""

from __future__ import annotations

import math
from typing import Any

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


def sharding(entries: list[str] | None) -> Any:
    """What `m3jax.load` takes as `sharding`; None: whole, on one device.

    Raises:
      UsageError: the flag cannot be read, or there are not so many devices.
    """
    asked = sizes(entries)
    if asked is None:
        return None
    import jax

    from m3jax.engine.sharding_rules import by_axes, make_mesh

    try:
        count = math.prod(asked.values())
        mesh = make_mesh(asked, jax.local_devices()[:count])
    except ValueError as error:
        raise UsageError(f"--{error}") from None
    return lambda name, shape: by_axes(mesh, shape)
