"""Merges checkpoints from files to files: the whole of it, from top to bottom."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path

from m3jax.checkpoints import provenance
from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.output import OutputFolder, check_free
from m3jax.checkpoints.shards import ShardWriter, write_index
from m3jax.engine import plan, statistics
from m3jax.engine.journal import Journal
from m3jax.engine.prepare import Execution, Prepared, check_apart, prepare
from m3jax.engine.progress import Progress
from m3jax.engine.recorder import Recorder
from m3jax.engine.streamed import Stream
from m3jax.engine.tables import TileTables
from m3jax.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class MergeResult:
    """What a merge did.

    Attributes:
      output: the folder.
      ratios: the ratios of each group of tensors, None where M3 is off.
      checksums: xxh3_128 of each tensor written, as in m3jax.json.
      seconds: per stage, summed over threads.
      wall: seconds of wall time: ``setup``, ``passes`` (reading, computing and
        writing, compilation included) and ``commit``.
      resumed: number of tensors that an interrupted merge had written already.
    """

    output: Path
    ratios: dict[str, tuple[float, ...]] | None
    checksums: dict[str, str]
    seconds: dict[str, float]
    wall: dict[str, float]
    resumed: int


def merge(
    base: str | PathLike[str] | None,
    models: Sequence[str | PathLike[str]],
    output: str | PathLike[str],
    recipe: Recipe | None = None,
    *,
    seed: int = 0,
    execution: Execution | None = None,
    progress: Progress | None = None,
) -> MergeResult:
    """Merges checkpoints into a new checkpoint folder that transformers loads.

    Streams: memory does not grow with the model. The same inputs, recipe and seed
    give the same bytes, whatever `execution` says.

    Args:
      base: the base model, a path or Hugging Face id; None if the recipe needs none.
      models: the fine-tuned models; their order is that of the ratios.
      output: the folder to make.
      recipe: what to do; the default is M3's average.
      seed: of ratios and masks, 0 <= seed < 2**32.
      execution: how to run it.
      progress: is told what happens.

    Raises:
      RecipeError: the recipe does not fit the models.
      CheckpointError: the inputs do not fit each other, or the output's place is
        taken; one line that names the file and the tensor.
      OSError: the disk.
    """
    recipe, execution = recipe or Recipe(), execution or Execution()
    progress = progress or Progress()
    final = Path(fspath(output))
    names = [fspath(model) for model in models]
    started = time.perf_counter()
    check_free(final, overwrite=execution.overwrite)
    with prepare(
        None if base is None else fspath(base), names, recipe, seed, execution
    ) as prepared:
        check_apart(final, prepared.checkpoints)
        for note in prepared.inputs.notes:
            progress.note(note)
        with OutputFolder(
            final,
            overwrite=execution.overwrite,
            resume=execution.resume,
            note=progress.note,
        ) as folder:
            try:
                return _execute(prepared, folder, progress, started)
            except CheckpointError:
                _check_unchanged(prepared, folder)  # which would be the reason
                raise


def _execute(
    prepared: Prepared, folder: OutputFolder, progress: Progress, started: float
) -> MergeResult:
    journal = Journal(prepared, folder, progress)
    folder.check_space(
        prepared.written_bytes, largest=max(shard.size for shard in prepared.shards)
    )
    stream = Stream(
        prepared.inputs.tensors,
        TileTables(),
        tiles=prepared.tiles,
        threads=prepared.execution.num_threads,
        devices=prepared.devices,
        names=[checkpoint.name for checkpoint in prepared.checkpoints],
        progress=progress.advance,
    )
    passes = time.perf_counter()
    stream.tables = statistics.dare_tables(prepared, stream, journal, progress)
    info = statistics.method_info(prepared, stream, journal, progress)
    writer = ShardWriter(folder, prepared.shards)
    try:
        recorder = Recorder(prepared, writer, journal)
        done = recorder.recover(progress)
        left = [i for i in range(len(prepared.items)) if i not in recorder.checksums]
        written = sum(
            prepared.items[i].size * prepared.inputs.tensors[i].dtype.itemsize
            for i in left
        )
        progress.stage("merging", prepared.read_bytes(left) + written)
        stream.merge(
            plan.cut(prepared.items, left, prepared.tiles),
            prepared.recipe.method,
            prepared.transform,
            info,
            prepared.recipe.scaling,
            prepared.coefficients,
            recorder,
            check_finite=not prepared.execution.allow_nonfinite,
        )
    finally:
        writer.close()
    ended = time.perf_counter()
    _check_unchanged(prepared, folder)
    write_index(folder, prepared.shards)
    tensors = prepared.inputs.tensors
    checksums = {tensors[i].name: c for i, c in sorted(recorder.checksums.items())}
    provenance.write(
        folder,
        provenance.Facts(
            recipe=prepared.recipe,
            seed=prepared.seed,
            ratios=prepared.ratios,
            base=prepared.base,
            models=prepared.models,
            input_checksums=recorder.input_checksums(),
            shards=prepared.shards,
            checksums=checksums,
            config_changes=prepared.inputs.config,
            tokenizer_from=prepared.execution.tokenizer_from,
        ),
    )
    with stream.clock.stage("committing"):
        folder.commit(fsync=prepared.execution.fsync)
    return MergeResult(
        output=folder.final,
        ratios=prepared.ratios,
        checksums=checksums,
        seconds=dict(stream.clock.seconds),
        wall={
            "setup": passes - started,
            "passes": ended - passes,
            "commit": time.perf_counter() - ended,
        },
        resumed=done,
    )


def _check_unchanged(prepared: Prepared, folder: OutputFolder) -> None:
    """Raises CheckpointError if an input was written to since it was opened."""
    try:
        for checkpoint in prepared.checkpoints:
            for file in checkpoint.files:
                file.check_unchanged()
    except CheckpointError:
        folder.clear()  # some of it is made of the old bytes, some of the new
        raise
