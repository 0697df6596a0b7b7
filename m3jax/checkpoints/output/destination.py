"""Where an output goes, on this machine or to a store: decided here alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from m3jax.checkpoints.output import folder as output
from m3jax.checkpoints.output import store_output
from m3jax.checkpoints.output.folder import OutputError, OutputFolder
from m3jax.checkpoints.output.orbax_output import OrbaxShard
from m3jax.checkpoints.output.shards import Shard, ShardWriter
from m3jax.checkpoints.output.store_output import StoreOutput
from m3jax.checkpoints.places.files import Location

if TYPE_CHECKING:
    from m3jax.checkpoints.output.part import OutputPart


def check_free(final: Location, *, overwrite: bool, resume: bool) -> None:
    """Raises OutputError unless `final` may become the output."""
    if isinstance(final, Path):
        output.check_free(final, overwrite=overwrite)
    else:
        store_output.check_free(final, overwrite=overwrite, resume=resume)


def open_output(
    final: Location,
    *,
    overwrite: bool,
    resume: bool,
    note: Callable[[str], None] = lambda line: None,
) -> OutputFolder:
    """The output under construction; see `OutputFolder`."""
    if isinstance(final, Path):
        return OutputFolder(final, overwrite=overwrite, resume=resume, note=note)
    return StoreOutput(final, overwrite=overwrite, resume=resume, note=note)


def local(final: Location) -> Path:
    """The folder of this machine beside which the output is made."""
    return final if isinstance(final, Path) else store_output.staged(final)


def open_writer(
    folder: OutputFolder | OutputPart, shards: Sequence[Shard], *, create: bool = True
) -> ShardWriter:
    """Opens the files of tensors; see `ShardWriter`."""
    orbax = any(isinstance(shard, OrbaxShard) for shard in shards)
    if orbax and isinstance(folder, StoreOutput):
        raise OutputError(
            f"{folder.url}: Orbax checkpoints are written to folders of this machine "
            "only; write one and copy it, or choose --output_format=safetensors"
        )
    return ShardWriter(folder, shards, create=create)
