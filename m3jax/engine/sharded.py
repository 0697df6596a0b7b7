"""The sharded executor: all models in the memory of all devices, merged where they are.

Every process reads the shards of its own devices, the kernels of `merge_params` merge
them, and every process writes its shards to their places in the output's files. The
bytes are those of the streamed executor, and so are the checksums.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import xxhash

from m3jax.checkpoints import source as sources
from m3jax.checkpoints.formats import boxes
from m3jax.checkpoints.formats.boxes import Box
from m3jax.checkpoints.formats.dtypes import Dtype, of_numpy
from m3jax.checkpoints.output.shards import ShardWriter
from m3jax.checkpoints.source import Source
from m3jax.engine import checks, in_memory
from m3jax.engine.in_memory import multihost
from m3jax.engine.inputs import Part, TensorInputs
from m3jax.engine.jobs import Job
from m3jax.engine.kernel import Numbers
from m3jax.engine.load import num_threads, read_tensor
from m3jax.engine.pipeline import Clock
from m3jax.engine.prepared import Prepared
from m3jax.engine.processes import Processes
from m3jax.engine.progress import Progress
from m3jax.engine.recorder import Recorder
from m3jax.engine.save import pieces
from m3jax.engine.sharding_rules import by_axes, make_mesh
from m3jax.engine.share import Share
from m3jax.engine.trees import Leaf


class Sharded:
    """The tensors that are merged, in device memory."""

    def __init__(
        self,
        prepared: Prepared,
        processes: Processes,
        progress: Progress,
        clock: Clock,
    ):
        """Loads them.

        Args:
          prepared: the merge.
          processes: all that do it.
          progress: is told what happens.
          clock: counts the seconds of each stage.

        Raises:
          CheckpointError: naming the tensor and the model that hold NaN or infinity.
          ValueError: the mesh does not fit the devices.
        """
        self._prepared = prepared
        self._processes = processes
        self._progress = progress
        self._clock = clock
        self._items = loaded_items(prepared)
        mesh = mesh_of(prepared)
        self._watched = [_watched(prepared, i) for i in self._items]
        self._leaves: list[Leaf] = []
        progress.stage("loading", prepared.read_bytes(self._items))

        self._wide = any(prepared.inputs.tensors[i].wide for i in self._items)

        def load(n: int) -> Leaf:
            tensor = prepared.inputs.tensors[self._items[n]]
            with jax.enable_x64(self._wide):  # of this thread
                arrays = [
                    read_tensor(source, by_axes(mesh, source.shape))
                    for source in self._watched[n]
                ]
            base = None if tensor.base is None else arrays.pop(0)
            parts, dtype = _kernel_parts(tensor)
            models = tuple(arrays.pop(0) for _ in tensor.models)
            beside = {
                name: tuple(arrays.pop(0) for _ in own)
                for name, own in tensor.beside.items()
            }
            return Leaf(tensor.name, base, models, True, dtype, parts, beside)

        pool = concurrent.futures.ThreadPoolExecutor(num_threads())
        with _explained(), clock.stage("loading"), pool:
            for n, leaf in enumerate(pool.map(load, range(len(self._items)))):
                processes.check()
                progress.advance(prepared.read_bytes([self._items[n]]))
                self._leaves.append(leaf)

    def merge(
        self, share: Share, recorder: Recorder, writer: ShardWriter
    ) -> tuple[tuple[Job, Numbers], ...]:
        """Merges the tensors that are not written yet, and writes them.

        Args:
          share: the tensors whose checksums this process finds out.
          recorder: receives the results.
          writer: of the output's files.

        Returns:
          What the steps have measured.

        Raises:
          CheckpointError: a merged value overflows.
        """
        recipe, seed = self._prepared.recipe, self._prepared.seed
        done = set().union(*self._processes.gather(list(recorder.checksums)))
        left = [n for n, i in enumerate(self._items) if i not in done]
        if not left:
            return ()
        bench = in_memory.Leaves(self._leaves, self._prepared.num_models)
        x64 = jax.enable_x64(self._wide)
        with _explained(), self._clock.stage("computing"), x64:
            numbers = in_memory.measured(bench, recipe, seed)
        written = [self._prepared.inputs.tensors[self._items[n]] for n in left]
        self._progress.stage("merging", sum(own.written_bytes for own in written))
        x64 = jax.enable_x64(self._wide)
        with _explained(), self._clock.stage("computing"), x64:
            merged = in_memory.combine(bench, numbers, donate=True)
            jax.block_until_ready(merged)
        pool = concurrent.futures.ThreadPoolExecutor(num_threads())
        with self._clock.stage("writing"), pool:
            for _ in pool.map(lambda n: self._write(n, merged[n], recorder), left):
                self._processes.check()
        if self._processes.count > 1:
            writer.sync()
            self._processes.barrier()
            with self._clock.stage("hashing"):
                self._hash(set(share.items) & {self._items[n] for n in left}, recorder)
        return numbers

    def _hash(self, items: set[int], recorder: Recorder) -> None:
        """Finds out checksums of tensors whose parts several processes have written."""
        for item, watched in zip(self._items, self._watched, strict=True):
            if item in items:
                self._processes.check()
                inputs = [source.checksum() for source in watched]
                recorder.keep([(item, recorder.checksums_on_disk(item), inputs)])

    def _write(self, n: int, parts: dict[str, Any], recorder: Recorder) -> None:
        """Writes this process's share of a tensor; all of it, if there is only one."""
        item = self._items[n]
        checksums = {
            part: self._write_part(item, part, array, recorder)
            for part, array in parts.items()
        }
        if self._processes.count == 1:  # then the pieces are all there is, in order
            inputs = [watched.checksum() for watched in self._watched[n]]
            recorder.keep([(item, checksums, inputs)])

    def _write_part(
        self, item: int, part_name: str, array: jax.Array, recorder: Recorder
    ) -> str:
        tensor = self._prepared.inputs.tensors[item]
        spec = tensor.parts[part_name]
        checksum = xxhash.xxh3_128()
        if spec.packed:  # a byte may hold elements of several shards
            whole = np.packbits(multihost(array))
            if self._processes.first:
                recorder.write(item, part_name, 0, whole)
            return xxhash.xxh3_128(whole).hexdigest()
        for box, values in pieces(array):
            values = values.astype(spec.dtype.numpy, copy=False)
            done = 0
            for start, count in boxes.runs(box, spec.shape):
                part = values[done : done + count]
                if not self._prepared.execution.allow_nonfinite:
                    checks.check_overflow(part, start, tensor)
                recorder.write(item, part_name, start, part)
                done += count
            checksum.update(values.view(np.uint8))
            self._progress.advance(values.nbytes)
        return checksum.hexdigest()


class Watched:
    """A source whose elements are looked at as they are read: finite? which checksum?

    Attributes:
      dtype, shape, output_dtype: of the source.
    """

    def __init__(self, source: Source, tensor: TensorInputs, name: str, finite: bool):
        """
        Args:
          source: what is read.
          tensor: to which it belongs, and `name`, the checkpoint: for errors.
          finite: refuse NaN and infinity.
        """
        self._source = source
        self._tensor = tensor
        self._name = name
        self._finite = finite
        self._running = xxhash.xxh3_128()
        self._next = 0  # the element that is next for the checksum

    @property
    def dtype(self) -> Dtype:
        return self._source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self._source.shape

    @property
    def output_dtype(self) -> Dtype:
        return self._source.output_dtype

    def read_into(self, out: np.ndarray, start: int) -> None:
        self._source.read_into(out, start)
        self._look_at(out, start)

    def read_box(self, out: np.ndarray, box: Box) -> None:
        """Fills `out` with that part, in one go if the source can do that."""
        read_box = getattr(self._source, "read_box", None)
        values = out.reshape(-1)
        if read_box is not None:
            read_box(out, box)
        done = 0
        for start, count in boxes.runs(box, self.shape) if out.size else ():
            part = values[done : done + count]
            if read_box is None:
                self._source.read_into(part, start)
            self._look_at(part, start)
            done += count

    def checksum(self) -> str:
        """Over all elements; they are read once more unless they all came in order."""
        if self._next == math.prod(self.shape):
            return self._running.hexdigest()
        return sources.checksum(self._source)

    def _look_at(self, values: np.ndarray, start: int) -> None:
        if self._finite:
            checks.check_finite(values, start, self._tensor, self._name)
        if start == self._next:
            self._running.update(values.view(np.uint8))
            self._next += len(values)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Says what helps where the devices' memory does not suffice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            error.add_note("--executor=streamed needs no more than a few buffers")
        raise


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """Bytes that each device needs.

    Attributes:
      inputs: of the shards of all models, the first of which becomes the result.
      working: beside them, of the largest tensor's masks, counts and result.
    """

    inputs: int
    working: int


def device_memory(prepared: Prepared) -> DeviceMemory:
    """What the sharded executor needs on each device."""
    mesh = mesh_of(prepared)
    random = any(job.program.draws() for job in prepared.jobs)
    passes = len(prepared.passes) > 1
    inputs = working = 0
    for i in loaded_items(prepared):
        tensor = prepared.inputs.tensors[i]
        shard = math.prod(by_axes(mesh, tensor.shape).shard_shape(tensor.shape))
        models = len(tensor.models)
        inputs += shard * sum(source.dtype.itemsize for source in tensor.sources)
        _, result = _kernel_parts(tensor)
        if result != tensor.models[0].source.dtype.numpy:  # no model's place fits it
            inputs += shard * result.itemsize
        # Masks as words and as bools; codes to count, and a result, of 32 bits.
        masks, codes = 2 * models * random, 4 * models * passes
        working = max(working, shard * (masks + codes + 4))
    return DeviceMemory(inputs, working)


def mesh_of(prepared: Prepared) -> Any:
    execution = prepared.execution
    return make_mesh(execution.mesh, execution.devices or jax.devices())


def loaded_items(prepared: Prepared) -> list[int]:
    """Positions of the tensors that go to the devices; the others are copied."""
    return [i for i in prepared.merged if prepared.items[i].size]


def _watched(prepared: Prepared, item: int) -> list[Watched]:
    """The sources of a tensor, watched."""
    tensor = prepared.inputs.tensors[item]
    finite = not prepared.execution.allow_nonfinite
    return [
        Watched(origin.source, tensor, origin.owner.name, finite)
        for origin in tensor.origins
    ]


def _kernel_parts(tensor: TensorInputs) -> tuple[dict[str, Part], np.dtype]:
    """The parts as the kernel makes them, and the model's dtype among them: float64
    that is made of float32 becomes so on the host."""
    dtypes = {part: np.dtype(name) for part, name in tensor.kernel_dtypes}
    parts = {
        part: own
        if own.packed
        else dataclasses.replace(own, dtype=of_numpy(dtypes[part]))
        for part, own in tensor.parts.items()
    }
    return parts, dtypes[""]
