"""Tensors that are measured and merged while they lie in the buffers: one reading.

A step that looks at one tensor alone (mergekit's thresholds and norms, dot products of
a tensor) needs no pass over the model before the merge: where the tensor fits the
buffers, it is read once, measured, and merged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from m3jax.engine.jobs import Job
from m3jax.engine.kernel import At, Numbers
from m3jax.engine.measure import Groups, completed, measured_by
from m3jax.engine.passes import Pass
from m3jax.engine.plan import TILE, Chunk, Item, whole
from m3jax.methods.selection import FEW
from m3jax.methods.step import Operands, Reduction

if TYPE_CHECKING:
    from m3jax.engine.streamed import Stream

# Bytes of all buffers where tensors are measured and merged at one reading. Two of the
# largest matrices of a model of 1 G parameters fit.
_MOST = 140 << 20
# Of a tensor of at least so many elements a sample takes so many or a few more, from
# its first chunk and one in the middle: it finds a threshold to half a percent.
_SAMPLED, _SAMPLE = 1 << 20, 1 << 17


def possible(devices: Sequence[jax.Device]) -> bool:
    """Whether there is one device, which computes in the host's memory."""
    return len(devices) == 1 and devices[0].platform == "cpu"


def held(
    jobs: Sequence[Job],
    items: Sequence[Item],
    tiles: int,
    bytes_each: int,
    threads: int,
) -> int:
    """How many buffers a merge takes at most."""
    count = buffer_count(bytes_each, threads)
    largest = 1
    for job in jobs:
        own = places(job, items, tiles, count)
        groups = whole(items, own, tiles)
        largest = max([largest, *map(len, groups)])
    return max(threads, min(count, threads * largest))


def buffer_count(bytes_each: int, threads: int) -> int:
    """How many buffers there are for all threads together."""
    return max(threads, _MOST // max(bytes_each, 1))


def places(job: Job, items: Sequence[Item], tiles: int, buffers: int) -> list[int]:
    """The tensors that are read once, measured and merged.

    Args:
      job: what is done to which tensors.
      items: all tensors.
      tiles: of a buffer.
      buffers: that there are; a tensor may take half of them, so that another one can
        be read meanwhile.
    """
    program = job.program
    scopes = {step.scope for step in program.steps}
    by_element = program.unit(len(program.steps)) == "element"
    if not by_element or "tensor" not in scopes or scopes - {"", "tensor"}:
        return []
    most = max(1, buffers // 2) * tiles * TILE
    return [i for i in job.places if 0 < items[i].size <= most]


class Resident:
    """Some chunks of whole tensors, in buffers; a `measure.Bench`.

    Attributes:
      chunks: with places that count these tensors alone.
      filled: the operands of each.
      draws: masks or lanes of each, None before they are drawn.
    """

    traced = False
    at_hand = True
    few = FEW

    def __init__(
        self, stream: Stream, chunks: Sequence[Chunk], filled: Sequence[Operands]
    ):
        self._work = stream.work
        order = dict.fromkeys(run.item for chunk in chunks for run in chunk.runs)
        self._places = list(order)
        local = {item: i for i, item in enumerate(order)}
        self.names = [stream.names[i] for i in order]
        self.sizes = [stream.sizes[i] for i in order]
        self.num_models = stream.num_models
        self.filled = filled
        self.chunks = [
            dataclasses.replace(
                chunk,
                runs=tuple(
                    dataclasses.replace(run, item=local[run.item]) for run in chunk.runs
                ),
            )
            for chunk in chunks
        ]
        self.draws: list[Any] = [None] * len(chunks)

    def own(self, places: Sequence[int]) -> list[int]:
        return list(places)

    def numbers(self, job: Job, tables: Numbers) -> Numbers:
        """The numbers of these tensors, with what the steps measure of them.

        Args:
          job: what is done to them.
          tables: the parameters and keys of all tensors; no functions among them.
        """
        own: Any = np.array(self._places)
        p = jax.tree.map(lambda table: table[..., own], tables.p)
        keys = None if tables.keys is None else tables.keys[:, own]
        mine = dataclasses.replace(job, places=tuple(range(len(own))))
        local = Numbers(p, (), keys)
        found = measured_by(self, mine, local, lambda name, find: find())
        return completed(job.program, found)

    def reduce(
        self,
        at: At,
        groups: Groups,
        reductions: Sequence[Reduction],
        *,
        everywhere: bool,
    ) -> list[tuple[Any, ...] | None]:
        """See `measure.Bench`."""
        stride, step = 1, 1
        if reductions[0].sample:
            sizes = [sum(self.sizes[i] for i in places) for places in groups]
            pairs = zip(groups, sizes, strict=True)
            groups = [own if size >= _SAMPLED else [] for own, size in pairs]
            step = max(1, len(self.chunks) // 2)
            stride = max(1, max(sizes) // (step * _SAMPLE))
        asked = Pass(at, groups, reductions, len(self.names), stride)
        for i in range(0, len(self.chunks), step):
            chunk, x = self.chunks[i], self.filled[i]
            if asked.asks(chunk):
                asked.add(self._work.reduce_chunk(asked, chunk, x, self.draw(at, i)))
        return asked.answers()

    def draw(self, at: At, i: int) -> Any:
        """Masks or lanes of a chunk, drawn once."""
        if not at.draws:
            return None
        if self.draws[i] is None:
            self.draws[i] = self._work.draw(at, self.chunks[i])
        return self.draws[i]
