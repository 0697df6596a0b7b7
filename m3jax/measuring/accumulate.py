"""Adds up over batches of data, so that an interrupted run goes on where it was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from os import PathLike, fspath
from typing import Any, Generic, TypeVar

import jax
import numpy as np
import safetensors
import safetensors.numpy

from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.output.destination import open_output
from m3jax.checkpoints.output.folder import OutputFolder
from m3jax.checkpoints.places import durable, store
from m3jax.checkpoints.places.files import Location
from m3jax.engine.progress import Progress
from m3jax.engine.save import shards_of, write

RECORD = "measured.json"
_STATE = "state.safetensors"
_BETWEEN = 30.0  # seconds that a crash may cost, and the least between two savings
State = dict[str, jax.Array]
B = TypeVar("B")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accumulation(Generic[B]):
    """What is added up.

    Attributes:
      start: the state before the first batch: arrays by name.
      add: (state, batch) -> the state with it; may take over the state's memory.
      batches: in a fixed order.
      count: examples in a batch.
      finish: the state -> the tensors to write.
      record: what was measured, as JSON, for `measured.json`.
      inputs: what else than record and batches the result depends on, as JSON.
    """

    start: Callable[[], State]
    add: Callable[[State, B], State]
    batches: Sequence[B]
    count: Callable[[B], int]
    finish: Callable[[State], Mapping[str, Any]]
    record: Mapping[str, Any]
    inputs: Any = None

    @property
    def identity(self) -> str:
        """A digest of all that the result depends on."""
        known = json.dumps([self.record, self.inputs], sort_keys=True)
        digest = hashlib.sha256(known.encode())
        for leaf in jax.tree.leaves(list(self.batches)):
            digest.update(repr((leaf.shape, leaf.dtype.str)).encode())
            digest.update(leaf.tobytes())
        return digest.hexdigest()


def accumulate(
    what: Accumulation[B],
    output: str | PathLike[str],
    *,
    resume: bool = False,
    max_shard_size: int | str = "5GB",
    progress: Progress | None = None,
) -> Location:
    """Adds up all batches and writes the tensors as a checkpoint folder.

    What is done so far is kept in the hidden folder beside the output, every half
    minute and when it is interrupted. A resumed run gives the same bytes.

    Args:
      what: see there.
      output: the folder to make; there is none yet.
      resume: go on with what an interrupted run has kept.
      max_shard_size: of a file, in bytes or as text.
      progress: is told the examples.

    Returns:
      The folder.

    Raises:
      CheckpointError: the place is taken, or what was kept is of another measurement.
      OSError: the disk.
    """
    progress = progress or Progress()
    final = store.parse(fspath(output))
    with open_output(
        final, overwrite=False, resume=resume, note=progress.note
    ) as folder:
        state, done = _kept(folder, what) or (what.start(), 0)
        left = what.batches[done:]
        progress.stage("measuring", sum(map(what.count, left)))
        saved = time.monotonic()
        try:
            for batch in left:
                state = jax.block_until_ready(what.add(state, batch))
                done += 1
                progress.advance(what.count(batch))
                if time.monotonic() - saved > _BETWEEN:
                    _keep(folder, what, state, done)
                    saved = time.monotonic()
        except BaseException:
            # What `add` has taken over is gone; then the last saving counts.
            if done and not any(leaf.is_deleted() for leaf in state.values()):
                _keep(folder, what, state, done)
            raise
        tensors = what.finish(state)
        folder.clear(keep=())
        write(folder, shards_of(tensors, max_shard_size), tensors)
        record = json.dumps(what.record, indent=1, ensure_ascii=False) + "\n"
        folder.write(RECORD, record.encode())
        folder.commit(fsync=True)
    return final


def _keep(folder: OutputFolder, what: Accumulation[Any], state: State, n: int) -> None:
    """Puts the state aside; it is whole, or that of before."""
    arrays = {name: np.asarray(leaf) for name, leaf in state.items()}
    known = {"done": str(n), "identity": what.identity}
    with durable.appearing(folder.path / _STATE) as unfinished:
        safetensors.numpy.save_file(arrays, unfinished, known)
    if not folder.resumable:
        folder.journal({"measured": what.identity})


def _kept(folder: OutputFolder, what: Accumulation[Any]) -> tuple[State, int] | None:
    """What an interrupted run has put aside."""
    path = folder.path / _STATE
    if not folder.journalled or not path.exists():
        return None
    with safetensors.safe_open(path, "numpy") as file:
        known = file.metadata() or {}
    if known.get("identity") != what.identity:
        raise CheckpointError(
            f"{folder.final}: what was kept is of another measurement (model, tasks or "
            "options differ); leave out --resume to begin anew"
        )
    arrays = safetensors.numpy.load_file(path)
    return {name: jax.numpy.asarray(leaf) for name, leaf in arrays.items()}, int(
        known["done"]
    )
