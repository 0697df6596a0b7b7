"""The streamed executor: chunks flow from files through the kernel to files.

Each of a few threads owns buffers, allocated once and aligned so that JAX on CPU uses
them without a copy. It reads a chunk's runs into them, runs the kernel, and hands the
result on; while one thread computes, others read and write.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from m3jax.engine import checks, resident
from m3jax.engine.buffers import Buffers, Pool, buffer_bytes, view
from m3jax.engine.chunks import Parts, Work, flat, of
from m3jax.engine.inputs import TensorInputs
from m3jax.engine.jobs import Job
from m3jax.engine.kernel import At, Numbers
from m3jax.engine.measure import Groups, resolved
from m3jax.engine.passes import Pass
from m3jax.engine.pipeline import Clock, for_each
from m3jax.engine.plan import TILE, Chunk, Item, blocks, cut, sample, whole
from m3jax.engine.share import Share
from m3jax.methods.selection import FEW
from m3jax.methods.step import Operands, Reduction

# A sample of 4 Mi elements finds a threshold to within a tenth of a histogram's
# window; it is worth its reads only if reading everything takes far longer.
_SAMPLE_TILES = 4096
_SAMPLE_PAYS = 16  # times the sample


class Made(NamedTuple):
    """Elements from `start` on of a tensor, by part, and of what they were made."""

    item: int
    start: int
    parts: Parts
    inputs: list[np.ndarray]


class Emit:
    """Receives what a merging pass makes. The methods are called from many threads."""

    def write(self, item: int, part: str, start: int, values: np.ndarray) -> None:
        """Elements [start, start + len(values)) of a tensor's part, any order."""

    def record(self, made: Sequence[Made]) -> None:
        """The same with the inputs it was made of; in order within a tensor."""


class Stream:
    """Executes passes over the tensors of a merge; a `measure.Bench`."""

    traced = False
    at_hand = False

    def __init__(
        self,
        tensors: Sequence[TensorInputs],
        items: Sequence[Item],
        share: Share,
        *,
        tiles: int,
        threads: int,
        units: Sequence[str] = ("element",),
        devices: Sequence[jax.Device],
        check_finite: bool = True,
        advance: Callable[[int], None] = lambda count: None,
        stage: Callable[[str, Sequence[int]], None] = lambda label, places: None,
    ):
        """
        Args:
          tensors, items: of the output.
          share: which of the tensors this process measures.
          tiles: of a chunk, a multiple of the number of devices.
          threads: that work at once, each with buffers of its own.
          units: that are worked on: elements, rows, matrices.
          devices: over which a chunk's tiles are shared out.
          check_finite: refuse values that are not finite, where they are read first.
          advance: is called with the number of bytes read or written.
          stage: is called with the name of a pass and the tensors that it reads.
        """
        self.clock = Clock()
        self.names = [tensor.name for tensor in tensors]
        self.sizes = [item.size for item in items]
        self.num_models = max((len(own.models) for own in tensors), default=0)
        self._tensors = tensors
        self._items = items
        self._share = share
        self._tiles = tiles
        self._advance = advance
        self._stage = stage
        self._check_finite = check_finite
        self._seen: set[int] = set()  # tensors whose inputs were found to be finite
        self._passes = 0
        self._measured: tuple[Any, ...] = ()
        self._threads = threads
        self._on_host = resident.possible(devices)
        self.work = Work(
            tensors, tiles=tiles, devices=devices, clock=self.clock, advance=advance
        )
        sizes = buffer_bytes(tensors, items, tiles, units)
        count = 1 if "matrix" in units else threads
        self._buffers = [Buffers(*sizes) for _ in range(count)]
        # For tensors that are measured and merged at one reading.
        most = resident.buffer_count(sum(sizes), threads)
        self._pool = Pool(lambda: Buffers(*sizes), most, self._buffers)

    @property
    def few(self) -> int:
        """See `measure.Bench`."""
        return FEW if self._on_host and self._share.processes.count == 1 else 0

    def own(self, places: Sequence[int]) -> list[int]:
        items = self._share.items  # a range: looking into it takes no time
        return [i for i in places if i in items and self.sizes[i]]

    def reduce(
        self,
        at: At,
        groups: Groups,
        reductions: Sequence[Reduction],
        *,
        everywhere: bool,
    ) -> list[tuple[Any, ...] | None]:
        """See `measure.Bench`."""
        first = reductions[0]
        read = [self.own(places) for places in groups]
        order = [i for places in read for i in places]
        chunks = self._chunks(at, groups, order, sampled=first.sample)
        if chunks is None:
            return [None] * len(groups)
        if everywhere and not first.sample:
            self._passes += 1
            self._stage(f"measuring, pass {self._passes}", order)
        elif not everywhere and at[:2] != self._measured:
            # One line for the passes over all tensors: they may be thousands.
            self._measured = at[:2]
            own = [i for i in self._share.items if self._items[i].merged]
            self._stage(f"measuring {at.step.name} by tensor", 2 * own)
        asked = Pass(at, read, reductions, len(self._tensors))
        looks = self._check_finite and not first.sample and not self._have_seen(order)

        def work(chunk: Chunk, buffers: Buffers, turn: Any) -> None:
            x = self.work.fill(chunk, buffers)
            if looks:
                with self.clock.stage("checking"):
                    self.work.check_inputs(chunk, x)
            with self.clock.stage("computing"):
                asked.add(self.work.reduce_chunk(asked, chunk, x))

        for_each(chunks, self._buffers, work, self.clock)
        if looks:
            self._seen.update(order)
        answers = asked.answers()
        if not everywhere or self._share.processes.count == 1:
            return answers
        return [self._over_processes(first.combine, own) for own in answers]

    def _have_seen(self, items: Iterable[int]) -> bool:
        return self._seen.issuperset(items)

    def _chunks(
        self, at: At, groups: Groups, order: Sequence[int], *, sampled: bool
    ) -> list[Chunk] | None:
        """The chunks of a reading pass; None: a sample would not pay."""
        unit = at.unit
        if sampled:
            size = sum(self.sizes[i] for i in groups[0])
            small = size < _SAMPLE_PAYS * _SAMPLE_TILES * TILE
            if small or len(groups) > 1 or unit != "element":
                return None
            wanted = -(-_SAMPLE_TILES // self._share.processes.count)
            return sample(self._items, order, self._tiles, wanted)
        if unit != "element":
            return blocks(self._items, order, self._tiles * TILE, unit)
        if self._on_host:
            return cut(self._items, order, self._tiles)
        # A device makes one histogram of a chunk: its tiles are of one group.
        own = [self.own(places) for places in groups]
        return [c for places in own for c in cut(self._items, places, self._tiles)]

    def _over_processes(
        self, combine: tuple[str, ...], own: tuple[Any, ...] | None
    ) -> tuple[Any, ...] | None:
        processes = self._share.processes
        if "max" not in combine:
            return processes.sum(own)  # type: ignore[return-value]
        gathered = [
            [np.asarray(part, np.float64).tolist() for part in own] if own else None
        ]
        parts = [p[0] for p in processes.gather(gathered) if p[0]]
        return tuple(
            np.max([np.array(p[j], np.float32) for p in parts], axis=0)
            for j in range(len(combine))
        )

    def merge(
        self,
        job: Job,
        order: Sequence[int],
        alone: Collection[int],
        numbers: Callable[[bool], Numbers],
        given: Numbers,
        emit: Emit,
    ) -> None:
        """Merges (or copies) tensors and hands the results to `emit`.

        Args:
          job: what is done to those that are merged.
          order: the tensors' places.
          alone: those that are measured here, each at one reading.
          numbers: gives the program's tables; with False, as they are before the
            ratios are drawn. Compiling goes on meanwhile.
          given: the same without what is measured here.
          emit: receives the results.

        Raises:
          CheckpointError: naming the tensor and the model that hold a non-finite
            value, or differ in a tensor that is copied.
        """
        program = job.program
        unit = program.unit(len(program.steps))
        alone = set(alone)
        groups = whole(self._items, [i for i in order if i in alone], self._tiles)
        order = [i for i in order if i not in alone]
        merged = [i for i in order if self._items[i].merged]
        if unit == "element":
            chunks = cut(self._items, order, self._tiles)
        else:
            copied = [i for i in order if not self._items[i].merged]
            chunks = blocks(self._items, merged, self._tiles * TILE, unit)
            chunks += cut(self._items, copied, self._tiles)
        with self.clock.stage("compiling"):
            first = {(c.signature, c.block): c for c in chunks if c.merged}
            if first:
                early = numbers(False)
                # A block's program is compiled with its first block: they may be many.
                for chunk in first.values():
                    if chunk.block is None:
                        views = self.work.views(chunk, self._buffers[0])
                        self.work.compute(program, chunk, views, early)
            tables = numbers(True) if first else Numbers((), ())
            if groups:
                given = given._replace(p=resolved(given.p))
        result_shows = program.method.shows_nonfinite and not program.transforms
        check_inputs = self._check_finite and not result_shows

        def read(chunk: Chunk, buffers: Buffers) -> Operands:
            x = self.work.fill(chunk, buffers)
            if check_inputs and not self._have_seen(run.item for run in chunk.runs):
                with self.clock.stage("checking"):
                    self.work.check_inputs(chunk, x)
            return x

        def put(chunk: Chunk, x: Operands, parts: Parts) -> list[dict[str, Any]]:
            """Checks and writes what was made of a chunk; what was written, by run."""
            if self._check_finite:
                with self.clock.stage("checking"):
                    self.work.check_result(chunk, x, parts)
            outputs = [
                {part: self.work.of_run(run, part, v) for part, v in parts.items()}
                for run in chunk.runs
            ]
            with self.clock.stage("writing"):
                for run, output in zip(chunk.runs, outputs, strict=True):
                    for part, values in output.items():
                        emit.write(run.item, part, run.start, values)
            self._advance(sum(v.nbytes for output in outputs for v in output.values()))
            return outputs

        def note(chunk: Chunk, x: Operands, outputs: list[dict[str, Any]]) -> None:
            inputs = flat(x)
            with self.clock.stage("hashing"):
                emit.record(
                    [
                        Made(
                            run.item,
                            run.start,
                            output,
                            [own[of(run, chunk)] for own in inputs],
                        )
                        for run, output in zip(chunk.runs, outputs, strict=True)
                    ]
                )

        def work(chunk: Chunk, buffers: Buffers, turn: Any) -> None:
            if not chunk.merged:
                self._copy(chunk, buffers, turn, emit)
                return
            x = read(chunk, buffers)
            with self.clock.stage("computing"):
                parts = self.work.compute(program, chunk, x, tables)
            outputs = put(chunk, x, parts)
            with turn():
                note(chunk, x, outputs)

        def work_whole(group: Sequence[Chunk], thread: int, turn: Any) -> None:
            with self._pool.take(len(group)) as buffers:
                filled = [read(*one) for one in zip(group, buffers, strict=True)]
                own = resident.Resident(self, group, filled)
                with self.clock.stage("computing"):
                    tables = own.numbers(job, given)
                for i, (chunk, x) in enumerate(zip(group, filled, strict=True)):
                    with self.clock.stage("computing"):
                        draw = own.draw(At.method(program, tables), i)
                        parts = self.work.compute(
                            program, own.chunks[i], x, tables, draw
                        )
                    note(chunk, x, put(chunk, x, parts))

        for_each(groups, range(self._threads), work_whole, self.clock)
        for_each(chunks, self._buffers, work, self.clock)

    def _copy(self, chunk: Chunk, buffers: Buffers, turn: Any, emit: Emit) -> None:
        for run in chunk.runs:  # a copied chunk may hold many small tensors
            tensor = self._tensors[run.item]
            first, *others = tensor.origins
            dtype = first.source.dtype.numpy
            values = view(buffers.base, dtype, (self._tiles * TILE,))[run.elements]
            with self.clock.stage("reading"):
                first.source.read_into(values, run.start)
                for other in others:
                    theirs = view(buffers.stack, dtype, (run.count,))
                    other.source.read_into(theirs, run.start)
                    pair = first.owner.name, other.owner.name
                    checks.check_equal(values, theirs, run.start, tensor, pair)
            self._advance(values.nbytes * (1 + len(others)))
            values = values.astype(tensor.dtype.numpy, copy=False)
            with self.clock.stage("writing"):
                emit.write(run.item, "", run.start, values)
            self._advance(values.nbytes)
        made = []
        for run in chunk.runs:
            tensor = self._tensors[run.item]
            dtype = tensor.sources[0].dtype.numpy
            values = view(buffers.base, dtype, (self._tiles * TILE,))
            values = values[run.elements]
            output = {"": values.astype(tensor.dtype.numpy, copy=False)}
            made.append(Made(run.item, run.start, output, [values]))
        with turn(), self.clock.stage("hashing"):
            emit.record(made)
