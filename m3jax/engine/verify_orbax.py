"""Checks the tensors of a merged Orbax checkpoint against its record, m3jax.json.

They are compared by what they hold, not by the files that hold it: a checkpoint that
Orbax has read and written again is still the same.
"""

from __future__ import annotations

import math
from typing import Any

from m3jax.checkpoints import sources
from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.files import Location
from m3jax.checkpoints.orbax import ITEM, OrbaxTensor, read_item
from m3jax.checkpoints.record import Record, TensorRecord
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
    problems = {
        name: f"{ITEM}: {problem}"
        for name in {*found, *record.tensors}
        if (problem := _problem(name, found.get(name), record.tensors.get(name)))
    }
    whole = [name for name in found if name not in problems]
    sizes = (math.prod(found[n].shape) * found[n].dtype.itemsize for n in whole)
    progress.stage("verifying", sum(sizes))

    def work(name: str, buffer: Any, turn: Any) -> None:
        recorded = record.tensors[name].checksum
        try:
            checksum = sources.checksum(found[name], progress.advance)
        except CheckpointError as error:
            problems[name] = str(error)
            return
        if checksum != recorded:
            problems[name] = (
                f"{ITEM}: tensor {shown(name)} has checksum {checksum}, recorded is "
                f"{recorded}"
            )

    for_each(whole, [None] * threads, work, Clock())
    return [problems[name] for name in sorted(problems)]


def _problem(
    name: str, tensor: OrbaxTensor | None, recorded: TensorRecord | None
) -> str | None:
    """What is wrong with a tensor before anything of it is read."""
    if tensor is None:
        return f"lacks tensor {shown(name)}"
    if recorded is None:
        return f"holds tensor {shown(name)}, which is not recorded"
    if (tensor.dtype.code, tensor.shape) == (recorded.dtype, recorded.shape):
        return None
    return (
        f"tensor {shown(name)} is {tensor.dtype.code} of shape "
        f"{shown(list(tensor.shape))}, recorded is {shown(recorded.dtype)} of shape "
        f"{shown(list(recorded.shape))}"
    )
