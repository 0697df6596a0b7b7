"""Checks the tensors of a merged Orbax checkpoint against its record, m3jax.json.

They are compared by what they hold, not by the files that hold it: a checkpoint that
Orbax has read and written again is still the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from m3jax.checkpoints import sources
from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.files import Location
from m3jax.checkpoints.orbax import ITEM, OrbaxTensor, read_item
from m3jax.checkpoints.record import Record
from m3jax.engine.pipeline import Clock, for_each
from m3jax.engine.progress import Progress


def orbax_differences(
    folder: Location, record: Record, threads: int, progress: Progress
) -> list[str]:
    """One line for each tensor that is not as recorded; see `verify`.

    Raises:
      CheckpointError: the checkpoint cannot be opened.
    """
    found, *_ = read_item(folder / ITEM)
    problems: dict[str, str] = dict(_descriptions(found, record))
    whole = [name for name in found if name in record.tensors and name not in problems]
    progress.stage("verifying", sum(map(_bytes, map(found.__getitem__, whole))))

    def work(name: str, buffer: Any, turn: Any) -> None:
        try:
            checksum = sources.checksum(found[name], progress.advance)
        except CheckpointError as error:
            problems[name] = str(error)
            return
        if checksum != record.tensors[name].checksum:
            problems[name] = (
                f"{ITEM}: tensor {shown(name)} has checksum {checksum}, recorded is "
                f"{record.tensors[name].checksum}"
            )

    for_each(whole, [None] * threads, work, Clock())
    return [problems[name] for name in sorted(problems)]


def _descriptions(
    found: dict[str, OrbaxTensor], record: Record
) -> Iterator[tuple[str, str]]:
    """Name and problem of each tensor that is missing, extra or of another kind."""
    for name in sorted({*found, *record.tensors}):
        recorded, tensor = record.tensors.get(name), found.get(name)
        if tensor is None:
            yield name, f"{ITEM}: lacks tensor {shown(name)}"
        elif recorded is None:
            yield name, f"{ITEM}: holds tensor {shown(name)}, which is not recorded"
        elif (tensor.dtype.code, tensor.shape) != (recorded.dtype, recorded.shape):
            yield (
                name,
                f"{ITEM}: tensor {shown(name)} is {tensor.dtype.code} of shape "
                f"{shown(list(tensor.shape))}, recorded is {shown(recorded.dtype)} of "
                f"shape {shown(list(recorded.shape))}",
            )


def _bytes(tensor: OrbaxTensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize
