"""Merges checkpoints from files to files: the whole of it, from top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.folder import Checkpoint
from m3jax.checkpoints.output.destination import (
    check_free,
    local,
    open_output,
    open_writer,
)
from m3jax.checkpoints.output.folder import OutputError, OutputFolder
from m3jax.checkpoints.output.part import OutputPart, described
from m3jax.checkpoints.output.shards import ShardWriter, write_index
from m3jax.checkpoints.places import caching, store
from m3jax.checkpoints.places.files import Location
from m3jax.checkpoints.record import provenance
from m3jax.engine import agreement, finished
from m3jax.engine.arguments import path, paths, recipe_of
from m3jax.engine.draws import early
from m3jax.engine.execution import Execution
from m3jax.engine.jobs import Job
from m3jax.engine.journal import Journal
from m3jax.engine.kernel import Numbers
from m3jax.engine.measure import completed, measured_by
from m3jax.engine.prepare import check_apart, prepare
from m3jax.engine.prepared import Prepared
from m3jax.engine.processes import ProcessError, Processes, joined
from m3jax.engine.progress import Progress
from m3jax.engine.recorder import Recorder
from m3jax.engine.sharded import Sharded
from m3jax.engine.share import Share
from m3jax.engine.streamed import Stream
from m3jax.recipe import Recipe
from m3jax.recipe.documents import Document

Measured = tuple[tuple[Job, Numbers], ...]  # the numbers of each job


@dataclasses.dataclass(frozen=True)
class MergeResult:
    """What a merge did.

    Attributes:
      output: the folder.
      ratios: the ratios of each group of tensors, None where M3 is off.
      checksums: xxh3_128 of each tensor written, as in m3jax.json.
      seconds: per stage, summed over the threads of this process.
      wall: seconds of wall time: ``setup``, ``passes`` (reading, computing and
        writing, compilation included) and ``commit``, other processes' included.
      resumed: number of tensors that an interrupted merge had written already.
    """

    output: Location
    ratios: dict[str, tuple[float, ...]] | None
    checksums: dict[str, str] = dataclasses.field(repr=False)
    seconds: dict[str, float]
    wall: dict[str, float]
    resumed: int


def merge(
    base: str | PathLike[str] | None,
    models: Sequence[str | PathLike[str]] | str | PathLike[str] | Checkpoint,
    output: str | PathLike[str],
    recipe: Recipe | Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    execution: Execution | None = None,
    progress: Progress | None = None,
    statistics: Sequence[str | PathLike[str]] = (),
    documents: Mapping[str, Document] | None = None,
) -> MergeResult:
    """Merges checkpoints into a new checkpoint folder that transformers loads.

    Streams: memory does not grow with the model. The same inputs, recipe and seed
    give the same bytes, whatever `execution` says and however many processes there
    are: after `jax.distributed.initialize`, all of them call this with the same
    arguments, share the work, and get the same result.

    Args:
      base: the base model, a path or Hugging Face id; None if the recipe needs none.
      models: the fine-tuned models; their order is that of the ratios. An opened
        checkpoint stands for a single one.
      output: the folder to make, or its URL; `store_output` says what differs there.
      recipe: what to do, or its fields as a dict; the default is M3's average.
      seed: of ratios and masks, 0 <= seed < 2**32.
      execution: how to run it.
      progress: is told what happens.
      statistics: one checkpoint per model, for a method that reads what was measured
        (Fisher information, Gram matrices): its tensors have the names of the weights.
      documents: by path, how inputs were made that go with this merge, for the record;
        `m3jax.engine.documents` makes them.

    Raises:
      RecipeError: the recipe does not fit the models.
      CheckpointError: the inputs do not fit each other, or the output's place is
        taken; one line that names the file and the tensor.
      OSError: the disk.
      ProcessError: another process failed or died; it is an OSError.
      UnequalProcessesError: the processes were given different merges.
    """
    recipe, execution = recipe_of(recipe), execution or Execution()
    progress = progress or Progress()
    final = store.parse(path(output, "output"))
    given = models if isinstance(models, Checkpoint) else paths(models, "models")
    started = time.perf_counter()
    with joined() as processes:
        asks = execution.resume and not execution.overwrite
        complete = processes.from_first(asks and finished.is_complete(final))
        if not complete:
            check_free(final, overwrite=execution.overwrite, resume=execution.resume)
        with prepare(
            None if base is None else path(base, "base"),
            given,
            recipe,
            seed,
            execution,
            paths(statistics, "statistics"),
        ) as prepared:
            if processes.count > 1:
                processes.same(agreement.facts(prepared))
            check_apart(final, prepared.checkpoints)
            if complete:
                assert isinstance(final, Path)
                return _finished(final, prepared, progress)
            for note in prepared.inputs.notes:
                progress.note(note)
            if (reading := caching.choose(prepared.files)) is not None:
                progress.note(reading)
            with _output(final, execution, processes, progress) as folder:
                try:
                    result = _execute(
                        prepared, processes, folder, progress, started, documents or {}
                    )
                    return dataclasses.replace(result, output=final)
                except (CheckpointError, ProcessError):
                    _check_unchanged(prepared, folder)  # which would be the reason
                    raise


def _finished(final: Path, prepared: Prepared, progress: Progress) -> MergeResult:
    """The result where an earlier merge has left nothing to do."""
    record = finished.record_of(final, prepared)
    progress.note(f"{final}: is complete already; nothing to do")
    return MergeResult(
        output=final,
        ratios=prepared.ratios,
        checksums={name: own.checksum for name, own in record.tensors.items()},
        seconds={},
        wall={},
        resumed=len(record.tensors),
    )


@contextlib.contextmanager
def _output(
    final: Location, execution: Execution, processes: Processes, progress: Progress
) -> Iterator[OutputFolder | OutputPart]:
    """The folder to write to: the first process makes it, the others find it."""
    if processes.count > 1 and not isinstance(final, Path):
        raise OutputError(
            f"{final}: several processes write to a file system that all of them "
            "share, not to a store; merge there and copy the output, or pass "
            "--distributed=off to one process"
        )
    if not processes.first:
        part = OutputPart(processes.from_first(None), local(final), processes.index)
        processes.barrier()
        yield part
        return
    with open_output(
        final,
        overwrite=execution.overwrite,
        resume=execution.resume,
        note=progress.note,
    ) as folder:
        if processes.count > 1:
            with described(folder) as description:
                processes.from_first(description)
                processes.barrier()  # all have found it
        yield folder


def _execute(
    prepared: Prepared,
    processes: Processes,
    folder: OutputFolder | OutputPart,
    progress: Progress,
    started: float,
    documents: Mapping[str, Document],
) -> MergeResult:
    journal = Journal(prepared, folder, progress)
    if isinstance(folder, OutputFolder):
        folder.check_space(
            prepared.written_bytes,
            largest=max(shard.largest for shard in prepared.shards),
        )

    def advance(count: int) -> None:
        processes.check()
        progress.advance(count)

    share = Share.of(prepared, processes)
    stream = Stream(
        prepared.inputs.tensors,
        prepared.items,
        share,
        tiles=prepared.tiles,
        threads=prepared.execution.num_threads,
        units=prepared.units,
        devices=prepared.devices,
        check_finite=not prepared.execution.allow_nonfinite,
        advance=advance,
        stage=lambda label, own: progress.stage(label, prepared.read_bytes(own)),
    )
    passes = time.perf_counter()
    in_memory: Sharded | None = None
    numbers: Measured = ()
    if prepared.execution.executor == "sharded":
        in_memory = Sharded(prepared, processes, progress, stream.clock)
    else:
        numbers = _measured(prepared, share, stream, journal)
    writer = processes.first_then_others(
        lambda: open_writer(folder, prepared.shards, create=processes.first)
    )
    try:
        recorder = Recorder(prepared, writer, journal)
        resumed = recorder.recover(share.items, progress)
        if in_memory is not None:  # what is left then are tensors that are copied
            numbers = in_memory.merge(share, recorder, writer)
        _merge_share(prepared, share, stream, numbers, recorder, progress)
        if isinstance(folder, OutputPart) and prepared.execution.fsync:
            _sync(writer, folder)
    finally:
        writer.close()
    ended = time.perf_counter()
    _check_unchanged(prepared, folder)
    gathered = processes.gather([recorder.records(), resumed])
    for records, _ in gathered:
        recorder.add(records)
    if isinstance(folder, OutputFolder):
        with stream.clock.stage("committing"):
            _complete(prepared, recorder, folder, _recorded(numbers), documents)
    processes.from_first("the output has its name")
    return MergeResult(
        output=folder.final,
        ratios=prepared.ratios,
        checksums=recorder.named_checksums(),
        seconds=dict(stream.clock.seconds),
        wall={
            "setup": passes - started,
            "passes": ended - passes,
            "commit": time.perf_counter() - ended,
        },
        resumed=sum(count for _, count in gathered),
    )


def _measured(
    prepared: Prepared, share: Share, stream: Stream, journal: Journal
) -> Measured:
    """The numbers of each job, with what its steps have to know of the models."""

    def kept(name: str, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        saved = journal.statistics(name)
        return journal.keep_statistics(name, find()) if saved is None else saved

    def gathered(found: dict[str, Any]) -> dict[str, Any]:
        """Each tensor is measured by one process, and is 0 in what others found."""
        names = [own for own in share.processes.gather(sorted(found)) if own]
        if share.processes.count == 1 or not names:
            return found
        own = tuple(found[name] for name in names[0]) if found else None
        total = share.processes.sum(own)
        return dict(zip(names[0], total or (), strict=True))

    def measured(job: Job, first: Job) -> Numbers:
        """`first`: the job for the tensors that are measured before any merge; those
        that are measured while they are merged need their parameters all the same."""
        keep = kept if first.places else lambda name, find: find()
        return measured_by(stream, first, prepared.numbers(job), keep, gathered)

    pairs = zip(prepared.jobs, prepared.measured, strict=True)
    return tuple((job, measured(job, first)) for job, first in pairs)


def _merge_share(
    prepared: Prepared,
    share: Share,
    stream: Stream,
    measured: Measured,
    recorder: Recorder,
    progress: Progress,
) -> None:
    """The last pass: merges and writes this process's tensors."""
    left = [i for i in share.items if i not in recorder.checksums]
    if not left:
        return
    written = sum(prepared.inputs.tensors[i].written_bytes for i in left)
    progress.stage("merging", prepared.read_bytes(left) + written)

    def merge(job: Job, order: list[int], own: Numbers) -> None:
        def numbers(drawn: bool) -> Numbers:
            counts = prepared.num_models, len(prepared.items)
            return completed(job.program, own if drawn else early(own, *counts))

        whole = prepared.whole(job)
        stream.merge(job, order, whole, numbers, own, recorder)

    jobs = measured or tuple((job, Numbers((), ())) for job in prepared.jobs)
    others: set[int] = set().union(*(job.places for job, _ in jobs[1:]))
    for job, own in jobs:
        mine = set(job.places)
        first = job is jobs[0][0]  # with it, what is copied: in order of the files
        order = [i for i in left if i in mine or (first and i not in others)]
        if order:
            merge(job, order, own)


def _sync(writer: ShardWriter, folder: OutputPart) -> None:
    """Waits until the disk has this process's part; the first one syncs its own."""
    try:
        writer.sync()
    except OSError:
        folder.clear()  # reading back would not show what the disk has lost
        raise


def _recorded(measured: Measured) -> dict[str, list[float]]:
    """What the methods say of all their tensors, for the record."""
    return {
        f"{job.label}{name}": np.atleast_1d(np.asarray(info[name])[..., job.places[0]])
        .astype(np.float64)
        .tolist()
        for job, numbers in measured
        for info in numbers.info[-1:]
        for name in job.recipe.method.records
        if name in info and job.places
    }


def _complete(
    prepared: Prepared,
    recorder: Recorder,
    folder: OutputFolder,
    measured: dict[str, list[float]],
    documents: Mapping[str, Document],
) -> None:
    """Writes what goes with the tensors, and gives the folder its name."""
    write_index(folder, prepared.shards)
    provenance.write(
        folder,
        provenance.Facts(
            recipe=prepared.recipe.to_dict(),
            seed=prepared.seed,
            ratios=prepared.ratios,
            base=prepared.base,
            models=prepared.models,
            statistics=prepared.statistics,
            measured=measured,
            documents=[{**d.to_dict(), "path": path} for path, d in documents.items()],
            input_checksums=recorder.input_checksums(),
            shards=prepared.shards,
            checksums=recorder.named_checksums(),
            config_changes=prepared.inputs.config,
            tokenizer_from=prepared.execution.tokenizer_from,
            notes=prepared.inputs.notes,
            side_files=prepared.side_files,
            other_files=prepared.other_files,
        ),
    )
    folder.commit(fsync=prepared.execution.fsync)


def _check_unchanged(prepared: Prepared, folder: OutputFolder | OutputPart) -> None:
    """Raises CheckpointError if an input was written to since it was opened."""
    try:
        for checkpoint in prepared.checkpoints:
            for file in checkpoint.files:
                file.check_unchanged()
    except CheckpointError:
        folder.clear()  # some of it is made of the old bytes, some of the new
        raise
