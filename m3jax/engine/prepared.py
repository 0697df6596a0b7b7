"""A merge, planned: what is read, made and written, and how often."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import Future

import jax

from m3jax.checkpoints.folder import Checkpoint
from m3jax.checkpoints.output.shards import Shard
from m3jax.checkpoints.places import behind, caching, direct
from m3jax.checkpoints.places.files import InputFile, Location
from m3jax.engine import draws, plan, resident
from m3jax.engine.buffers import buffer_bytes
from m3jax.engine.execution import Execution
from m3jax.engine.inputs import MergeInputs
from m3jax.engine.jobs import Job, jobs
from m3jax.engine.kernel import Numbers
from m3jax.recipe import Recipe

# Matrices in float32 that a method by matrix holds beside those of the models, at most:
# of a vocabulary's matrix Balanced TSV takes as many for its float64 rows and vectors.
_BESIDE = 5


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A merge, planned.

    Attributes:
      base, models: the opened checkpoints.
      statistics: those beside the models, if the method reads them.
      recipe, seed: what decides the numbers.
      inputs: the aligned tensors, in the order of the output's shards.
      drawn: the ratios, being drawn in another thread: compiling the draw takes half
        a second.
      items: the same tensors as integers.
      shards: the files to write.
      places: the shard of each part of each tensor.
      tiles: of a chunk.
      devices, execution: how it is run.
      side_files: the folder that each of them comes from, by name.
      other_files: contents of those that are not as they stand there; None for one
        that is left out.
      rows: a digest of which row belongs to which token; "" in a merge by row.
    """

    base: Checkpoint | None
    models: tuple[Checkpoint, ...]
    statistics: tuple[Checkpoint, ...]
    recipe: Recipe
    seed: int
    inputs: MergeInputs
    drawn: Future[dict[str, tuple[float, ...]] | None]
    items: tuple[plan.Item, ...]
    shards: tuple[Shard, ...]
    places: Mapping[tuple[int, str], int]
    tiles: int
    devices: tuple[jax.Device, ...]
    execution: Execution
    side_files: Mapping[str, Location] = dataclasses.field(default_factory=dict)
    other_files: Mapping[str, bytes | None] = dataclasses.field(default_factory=dict)
    rows: str = ""

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        base = () if self.base is None else (self.base,)
        return (*base, *self.models, *self.statistics)

    @property
    def files(self) -> list[InputFile]:
        """Those that the passes read."""
        origins = (o for tensor in self.inputs.tensors for o in tensor.origins)
        owners = {id(origin.owner): origin.owner for origin in origins}
        return [file for owner in owners.values() for file in owner.files]

    @property
    def num_models(self) -> int:
        """How many the steps see: K."""
        return self.recipe.num_inputs(len(self.models))

    @property
    def ratios(self) -> dict[str, tuple[float, ...]] | None:
        """Drawn or given, per group of tensors; None where M3 is off."""
        return self.drawn.result()

    @functools.cached_property
    def jobs(self) -> tuple[Job, ...]:
        """Which of the merged tensors which steps merge."""
        tensors = self.inputs.tensors
        return jobs(self.recipe, ((i, tensors[i].name) for i in self.merged))

    @property
    def merged(self) -> list[int]:
        """Positions of the tensors that are merged rather than copied."""
        return [i for i, item in enumerate(self.items) if item.merged]

    def whole(self, job: Job) -> list[int]:
        """The job's tensors that are measured and merged at one reading."""
        if self.execution.executor != "streamed" or not resident.possible(self.devices):
            return []
        own = buffer_bytes(self.inputs.tensors, self.items, self.tiles, self.units)
        count = resident.buffer_count(sum(own), self.execution.num_threads)
        return resident.places(job, self.items, self.tiles, count)

    @functools.cached_property
    def measured(self) -> tuple[Job, ...]:
        """The jobs, with those of their tensors that are measured before any merge."""
        found = []
        for job in self.jobs:
            whole = set(self.whole(job))
            left = tuple(i for i in job.places if i not in whole)
            # Which they are depends on how a merge is run, and it may go on otherwise.
            label = f"{job.label}{len(left)} left: " if whole else job.label
            found.append(dataclasses.replace(job, places=left, label=label))
        return tuple(found)

    @property
    def passes(self) -> list[str]:
        """The reading passes, named; a sample is not counted."""
        each = {"tensor": "per tensor", "layer": "per layer", "model": "whole model"}
        names = [
            f"what {step.name} measures, {each[step.scope]}"
            for job in self.measured
            for step in job.recipe.steps
            if step.scope and job.places
        ]
        return [*names, "merge"]

    def read_bytes(self, positions: Sequence[int]) -> int:
        """Bytes that one pass over these tensors reads."""
        return sum(
            self.items[i].size * sum(s.dtype.itemsize for s in t.sources)
            for i in positions
            for t in [self.inputs.tensors[i]]
        )

    @property
    def written_bytes(self) -> int:
        return sum(shard.size for shard in self.shards)

    @property
    def units(self) -> tuple[str, ...]:
        """What the steps have to see whole."""
        programs = [job.program for job in self.jobs if job.places]
        found = {p.unit(d) for p in programs for d in range(len(p.steps) + 1)}
        return tuple(found or {"element"})

    @property
    def buffer_bytes(self) -> int:
        """Bytes of all buffers: inputs, results, float32 intermediates and caches, and
        what is copied to or from on the way past the page cache."""
        own = buffer_bytes(self.inputs.tensors, self.items, self.tiles, self.units)
        caches = sum(checkpoint.cache_bytes for checkpoint in self.checkpoints)
        if "matrix" in self.units:
            largest = max((self.items[i].size for i in self.merged), default=0)
            return sum(own) + 4 * largest * (self.num_models + _BESIDE) + caches
        threads = self.execution.num_threads
        result = self.tiles * plan.TILE * 4
        written = any(shard.largest >= direct.LEAST_FILE for shard in self.shards)
        past_cache = direct.BUFFER * (
            behind.BUFFERS * written + threads * (not caching.fit(self.files))
        )
        held = threads
        if resident.possible(self.devices):
            held = resident.held(self.jobs, self.items, self.tiles, sum(own), threads)
        return held * sum(own) + threads * result + past_cache + caches

    def numbers(self, job: Job) -> Numbers:
        """The tables of a job's numbers over all tensors."""
        names = [tensor.name for tensor in self.inputs.tensors]
        return draws.tables(
            job,
            names,
            self.num_models,
            self.seed,
            lambda: self.ratios,
        )
