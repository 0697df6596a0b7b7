"""Everything about a merge that is known before the first element is read."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax

from m3jax import mixup, prng
from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.folder import Checkpoint, open_checkpoint
from m3jax.checkpoints.output.orbax_output import OrbaxShard
from m3jax.checkpoints.output.shards import Shard, make_shards, stem_of
from m3jax.checkpoints.places import caching, direct
from m3jax.checkpoints.places.files import InputFile, Location
from m3jax.checkpoints.record import companions
from m3jax.checkpoints.side_files import check_side_files
from m3jax.engine import differences, draws, plan, resident
from m3jax.engine.buffers import buffer_bytes
from m3jax.engine.by_token import by_token
from m3jax.engine.by_token import compared as compare_by_row
from m3jax.engine.inputs import MergeInputs, MismatchError, TensorInputs
from m3jax.engine.jobs import Job, jobs
from m3jax.engine.kernel import Numbers
from m3jax.engine.lineup import align
from m3jax.engine.pipeline import available_cores
from m3jax.engine.tokenizer_files import not_taken, tokenizer_files, tokenizer_owner
from m3jax.engine.vocabulary import is_named
from m3jax.recipe import Recipe, RecipeError, parse_size
from m3jax.recipe.tokenizer import check_vocabulary

T = TypeVar("T")

# Bytes of one thread's input buffers: large enough that the cost of a kernel call is
# lost in them. On a CPU also small enough to stay in its caches. See benchmarks/.
_BUDGET = 32 << 20
_BUDGET_CPU = 8 << 20
FORMATS = ("safetensors", "orbax")  # of outputs
EXECUTORS = ("streamed", "sharded")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """How a merge is run; nothing here changes a byte of the result.

    Attributes:
      threads: that read, compute and write; None: one more than cores, 2 to 4.
      chunk_size: elements of a tensor that are worked on at a time; None: chosen.
      devices: to compute on; None: all local devices of the default backend.
      overwrite: replace a previous m3jax output.
      resume: continue an interrupted merge.
      allow_nonfinite: merge NaN and infinity instead of refusing them.
      fsync: wait until the disk has the output before it gets its name.
      tokenizer_from: the model whose tokenizer goes along; None: the base's.
      output_format: ``safetensors`` or ``orbax``; None: ``orbax`` if the base (the
        first model without one) is an Orbax checkpoint.
      strict: refuse models that differ from the first in more than their weights, such
        as in their rope, their end token or where they come from.
      executor: ``streamed``, or ``sharded``: in the memory of all devices.
      mesh: sizes of ``rows`` and ``columns`` of the devices of the sharded executor,
        by which it splits tensors; None: all are rows.
    """

    threads: int | None = None
    chunk_size: int | None = None
    devices: Sequence[jax.Device] | None = None
    overwrite: bool = False
    resume: bool = False
    allow_nonfinite: bool = False
    fsync: bool = True
    tokenizer_from: str | None = None
    output_format: str | None = None
    strict: bool = False
    executor: str = "streamed"
    mesh: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        if self.executor not in EXECUTORS:
            raise ValueError(
                f"executor={self.executor!r} needs {' or '.join(EXECUTORS)}"
            )
        if self.executor == "sharded" and self.chunk_size is not None:
            raise ValueError("chunk_size is of the streamed executor alone")
        if self.executor == "streamed" and self.mesh is not None:
            raise ValueError("mesh is of the sharded executor alone")
        if self.output_format not in (None, *FORMATS):
            raise ValueError(
                f"output_format={self.output_format!r} needs {' or '.join(FORMATS)}"
            )
        if self.threads is not None and not 1 <= self.threads <= 256:
            raise ValueError(f"threads={self.threads} needs 1 to 256")

    @property
    def num_threads(self) -> int:
        # One more than cores: one of them is always waiting for the disk.
        return self.threads or min(4, available_cores() + 1)


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
            return sum(own) + 4 * largest * (self.num_models + 2) + caches
        threads = self.execution.num_threads
        result = self.tiles * plan.TILE * 4
        written = any(shard.largest >= direct.LEAST_FILE for shard in self.shards)
        past_cache = direct.BUFFER * (written + (not caching.fit(self.files)))
        held = threads
        if resident.possible(self.devices):
            held = resident.held(self.jobs, self.items, self.tiles, sum(own), threads)
        return held * sum(own) + threads * (result + past_cache) + caches

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


def written_name(name: str, part: str) -> str:
    """The name, in the output, of what is made of a tensor for a part of it."""
    return f"{name}.{part}" if part else name


@contextlib.contextmanager
def prepare(
    base: str | None,
    models: Sequence[str] | Checkpoint,
    recipe: Recipe,
    seed: int,
    execution: Execution,
    statistics: Sequence[str] = (),
) -> Iterator[Prepared]:
    """Opens the checkpoints and plans the merge; a context manager.

    Args:
      base, models, recipe, seed, execution, statistics: as for `m3jax.merge`.

    Yields:
      `Prepared`.

    Raises:
      RecipeError, SeedError, CheckpointError: one line each.
    """
    given = [models] if isinstance(models, Checkpoint) else models
    recipe.check(num_models=len(given), has_base=base is not None)
    recipe.check_statistics(len(statistics), len(given))
    prng.check_seed(seed)
    known = [own.name if isinstance(own, Checkpoint) else own for own in given]
    check_vocabulary(recipe.vocabulary, [*([] if base is None else [base]), *known])
    with contextlib.ExitStack() as stack:
        opened_base = (
            None if base is None else stack.enter_context(open_checkpoint(base))
        )
        opened = [
            own
            if isinstance(own, Checkpoint)
            else stack.enter_context(open_checkpoint(own, base=base))
            for own in given
        ]
        beside = [stack.enter_context(open_checkpoint(own)) for own in statistics]
        yield _plan(opened_base, opened, beside, recipe, seed, execution)


def _plan(
    base: Checkpoint | None,
    models: list[Checkpoint],
    statistics: list[Checkpoint],
    recipe: Recipe,
    seed: int,
    execution: Execution,
) -> Prepared:
    tokens = by_token(recipe, base, models)
    compared = compare_by_row(recipe, base, models) if tokens is None else tokens
    inputs = align(base, models, recipe, statistics, compared)
    first = models[0] if base is None else base
    owner = tokenizer_owner(recipe, base, models, execution.tokenizer_from, tokens)
    chosen = companions.choose(first, owner, models, not_taken(recipe))
    check_side_files(chosen.owners)  # now, before a long merge begins
    lines = differences.found(
        models if base is None else [base, *models],
        inputs.tensors,
        owner,
        chosen.owners,
        asked=tokens is not None or execution.tokenizer_from is not None,
        speaks=recipe.tokenizer.copy and recipe.tokenizer.chat_template is None,
    )
    if lines and execution.strict:
        raise MismatchError(lines, "refused, since --strict is set")
    tensors = sorted(inputs.tensors, key=lambda t: plan.natural_order(t.name))
    own = [tensor for tensor in tensors if not tensor.file]
    sizes = [math.prod(t.shape) * t.dtype.itemsize for t in own]
    beside = tokenizer_files(
        recipe,
        [first, *models],
        owner,
        chosen.owners,
        execution.tokenizer_from is None,
        tokens,
        _new_rows(inputs, first),
    )
    shards = _shards(tensors, sizes, recipe, execution.output_format, first)
    by_name = {tensor.name: tensor for tensor in tensors}
    order = [name for s in shards for name in s.entries if name in by_name]
    inputs = dataclasses.replace(
        inputs,
        tensors=tuple(by_name[n] for n in order),
        config={**beside.config, **inputs.config},
        notes=tuple(
            dict.fromkeys((*inputs.notes, *lines, *chosen.notes, *beside.notes))
        ),
    )
    holder = {name: i for i, shard in enumerate(shards) for name in shard.entries}
    places = {
        (i, part): holder[written_name(tensor.name, part)]
        for i, tensor in enumerate(inputs.tensors)
        for part in tensor.parts
    }
    items = tuple(
        plan.Item(math.prod(t.shape), t.signature, t.merged, t.shape)
        for t in inputs.tensors
    )
    merged_names = [t.name for t in inputs.tensors if t.merged]
    devices = tuple(execution.devices or jax.local_devices())
    tiles = plan.chunk_tiles(
        execution.chunk_size,
        sum(buffer_bytes(inputs.tensors, items, 1)) // plan.TILE,
        len(devices),
        _BUDGET_CPU if devices[0].platform == "cpu" else _BUDGET,
    )
    # A small model needs no chunk larger than itself.
    whole = sum(-(-item.size // plan.TILE) for item in items)
    tiles = min(tiles, max(len(devices), -(-whole // len(devices)) * len(devices)))
    return Prepared(
        base=base,
        models=tuple(models),
        statistics=tuple(statistics),
        recipe=recipe,
        seed=seed,
        inputs=inputs,
        drawn=_in_background(
            mixup.draw_ratios,
            recipe.mixup,
            recipe.num_inputs(len(models)),
            merged_names,
            seed,
        ),
        items=items,
        shards=tuple(shards),
        places=places,
        tiles=tiles,
        devices=devices,
        execution=execution,
        side_files=chosen.owners,
        other_files={
            **{n: own for n, own in first.made.items() if n not in chosen.owners},
            **beside.files,
        },
        rows="" if tokens is None else tokens.alignment.digest,
    )


def _new_rows(inputs: MergeInputs, first: Checkpoint) -> int | None:
    """Rows of the output's vocabulary, where they are not the first checkpoint's."""
    for tensor in inputs.tensors:
        if is_named(tensor.name) and tensor.name in first.tensors:
            rows = tensor.shape[0]
            return None if rows == first.tensors[tensor.name].shape[0] else rows
    return None


def _shards(
    tensors: Sequence[TensorInputs],
    sizes: Sequence[int],
    recipe: Recipe,
    output_format: str | None,
    first: Checkpoint,
) -> list[Shard]:
    """The files of the output: the model's, then one for each other part of it."""
    files: dict[str, list[Any]] = {"": []}
    for tensor in tensors:
        for part, own in tensor.parts.items():
            entry = written_name(tensor.name, part), own.dtype, own.stored_shape
            files.setdefault(part or tensor.file, []).append(entry)
    described = files.pop("")
    if (output_format or first.format) == "orbax":
        if files:
            raise RecipeError(
                f"method={recipe.method.name!r} writes files beside the model: give "
                "--output_format=safetensors"
            )
        return [OrbaxShard(described, first.paths)]
    groups = plan.split_shards(sizes, parse_size(recipe.max_shard_size))
    stem = stem_of([file.path.name for file in first.files])
    return [
        *make_shards([[described[i] for i in g] for g in groups], stem),
        *(Shard(f"{file}.safetensors", own) for file, own in files.items()),
    ]


def _in_background(function: Callable[..., T], *arguments: Any) -> Future[T]:
    executor = ThreadPoolExecutor(1)
    future = executor.submit(function, *arguments)
    executor.shutdown(wait=False)
    return future


def check_apart(output: Location, checkpoints: Sequence[Checkpoint]) -> None:
    """Raises CheckpointError if the output is, holds or lies in an input."""
    final: Any = output.resolve()
    for checkpoint in checkpoints:
        location: Any = checkpoint.location.resolve()
        if type(location) is not type(final):
            continue  # one is here, one in a store
        if final.is_relative_to(location) or location.is_relative_to(final):
            raise CheckpointError(
                f"{output}: lies in (or holds) the input {checkpoint.name}; "
                "choose another --output"
            )
