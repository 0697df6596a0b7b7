"""The streamed executor: chunks flow from files through a kernel to files.

Each of a few threads owns one lane of buffers, allocated once and aligned so that
JAX on CPU uses them without a copy. It reads a chunk's runs into them, runs the
kernel, and hands the result on; while one thread computes, others read and write.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from m3jax.checkpoints.dtypes import DTYPES
from m3jax.engine import checks, kernels
from m3jax.engine.inputs import TensorInputs
from m3jax.engine.pipeline import Clock, for_each
from m3jax.engine.plan import TILE, Chunk
from m3jax.engine.tables import TileTables
from m3jax.methods import METHODS
from m3jax.methods.method import Reduction
from m3jax.methods.selection import count_codes_on_host

_ALIGNMENT = 64  # bytes; what XLA's CPU backend asks of memory it uses in place


class Lane:
    """The buffers of one thread, reused for every chunk.

    Attributes:
      base: bytes of the base's part of a chunk.
      stack: bytes of all models' parts.
    """

    def __init__(self, base_bytes: int, stack_bytes: int):
        self.base = _aligned(base_bytes)
        self.stack = _aligned(stack_bytes)


class Emit:
    """Receives what a merging pass makes. The methods are called from many threads."""

    def write(self, item: int, start: int, values: np.ndarray) -> None:
        """Elements [start, start + len(values)) of tensor `item`, any order."""

    def record(
        self, item: int, start: int, values: np.ndarray, inputs: list[np.ndarray]
    ) -> None:
        """The same with the inputs it was made of; in order within a tensor."""


class Stream:
    """Executes passes over the tensors of a merge."""

    def __init__(
        self,
        tensors: Sequence[TensorInputs],
        tables: TileTables,
        *,
        tiles: int,
        threads: int,
        devices: Sequence[jax.Device],
        names: Sequence[str],
        progress: Callable[[int], None] = lambda count: None,
    ):
        """
        Args:
          tensors: the tensors of the output.
          tables: per-tensor numbers that become `kernels.Tiles`.
          tiles: of a chunk, a multiple of the number of devices.
          threads: number of lanes.
          devices: over which a chunk's tiles are shared out.
          names: of the checkpoints in the order of `TensorInputs.sources`, for errors.
          progress: is called with the number of bytes read or written.
        """
        self.clock = Clock()
        self._tensors = tensors
        self.tables = tables
        self._tiles = tiles
        self._names = names
        self._progress = progress
        self._mesh = Mesh(np.array(devices), (kernels.AXIS,))
        # One CPU device shares the host's memory: NumPy takes over what it does better.
        self._on_host = len(devices) == 1 and devices[0].platform == "cpu"
        base_bytes, stack_bytes = lane_bytes(tensors, tiles)
        self._lanes = [Lane(base_bytes, stack_bytes) for _ in range(threads)]

    def reduce(
        self,
        chunks: Sequence[Chunk],
        reduction: Reduction,
        transform: kernels.Transform,
    ) -> Any:
        """Adds up a reduction over all chunks; int64 arrays, or None without chunks."""
        total: list[Any] = [None]
        lock = threading.Lock()
        mesh = self._mesh if self._mesh.size > 1 else None
        on_host = self._on_host
        kernel = kernels.reduce_kernel(
            reduction.function,
            transform,
            mesh,
            count=reduction.histogram and not on_host,
        )

        def work(chunk: Chunk, lane: Lane, turn: Any) -> None:
            base, stack = self._fill(chunk, lane)
            with self.clock.stage("computing"):
                tiles = self.tables.tiles(chunk, self._tiles, transform)
                counts = kernel(*self._placed(base, stack, tiles), reduction.arguments)
                if reduction.histogram and on_host:
                    codes, *others = counts
                    histogram = count_codes_on_host(np.asarray(codes)[0])
                    counts = histogram, *map(_int64_sum, others)
                else:
                    counts = jax.tree.map(_int64_sum, counts)
            with lock:
                total[0] = (
                    counts
                    if total[0] is None
                    else jax.tree.map(np.add, total[0], counts)
                )

        for_each(chunks, self._lanes, work, self.clock)
        return total[0]

    def merge(
        self,
        chunks: Sequence[Chunk],
        method: str,
        transform: kernels.Transform,
        info: Any,
        scaling: float,
        coefficients: Callable[[], np.ndarray],
        emit: Emit,
        *,
        check_finite: bool,
    ) -> None:
        """Merges (or copies) all chunks and hands the results to `emit`.

        Args:
          chunks: the work.
          method, transform: static choices of the kernel.
          info: what the method's statistics found.
          scaling: s.
          coefficients: gives the (K, N) coefficients; asked after compiling, so that
            drawing them can go on meanwhile.
          emit: receives the results.
          check_finite: refuse values that are not finite.

        Raises:
          CheckpointError: naming the tensor and the model that hold a non-finite
            value (`check_finite`), or differ in a tensor that is copied.
        """

        def compute(
            chunk: Chunk, base: Any, stack: Any, values: np.ndarray
        ) -> np.ndarray:
            kernel = kernels.merge_kernel(method, transform, chunk.signature[2])
            tiles = self.tables.tiles(chunk, self._tiles, transform, values)
            placed = self._placed(base, stack, tiles)
            return np.asarray(kernel(*placed, info, np.float32(scaling))).reshape(-1)

        with self.clock.stage("compiling"):
            for chunk in {c.signature: c for c in chunks if c.merged}.values():
                views = self._views(chunk, self._lanes[0])
                models = len(views[1])
                compute(
                    chunk, *views, np.zeros((models, len(self._tensors)), np.float32)
                )
            table = coefficients()

        result_shows = METHODS[method].shows_nonfinite and transform.strategy is None
        check_inputs = check_finite and not result_shows

        def work(chunk: Chunk, lane: Lane, turn: Any) -> None:
            if not chunk.merged:
                self._copy(chunk, lane, turn, emit)
                return
            base, stack = self._fill(chunk, lane)
            if check_inputs:
                with self.clock.stage("checking"):
                    self._check_inputs(chunk, base, stack)
            with self.clock.stage("computing"):
                merged = compute(chunk, base, stack, table)
            if check_finite:
                with self.clock.stage("checking"):
                    self._check_result(chunk, base, stack, merged)
            for run in chunk.runs:
                values = self._as_output(run.item, merged[run.elements])
                with self.clock.stage("writing"):
                    emit.write(run.item, run.start, values)
                self._progress(values.nbytes)
            with turn(), self.clock.stage("hashing"):
                for run in chunk.runs:
                    inputs = [part.reshape(-1)[run.elements] for part in stack]
                    if base is not None:
                        inputs.insert(0, base.reshape(-1)[run.elements])
                    values = self._as_output(run.item, merged[run.elements])
                    emit.record(run.item, run.start, values, inputs)

        for_each(chunks, self._lanes, work, self.clock)

    def _fill(self, chunk: Chunk, lane: Lane) -> tuple[np.ndarray | None, np.ndarray]:
        """Reads a chunk: base (T, TILE) or None, and stack (K, T, TILE)."""
        base, stack = self._views(chunk, lane)
        with self.clock.stage("reading"):
            for run in chunk.runs:
                tensor = self._tensors[run.item]
                if tensor.base is not None and base is not None:
                    tensor.base.read_into(base.reshape(-1)[run.elements], run.start)
                for part, model in zip(stack, tensor.models, strict=True):
                    model.read_into(part.reshape(-1)[run.elements], run.start)
        sources = self._tensors[chunk.runs[0].item].sources
        itemsizes = sum(source.dtype.itemsize for source in sources)
        self._progress(chunk.elements * itemsizes)
        return base, stack

    def _views(self, chunk: Chunk, lane: Lane) -> tuple[np.ndarray | None, np.ndarray]:
        """The lane's buffers as the arrays that a chunk of this signature fills."""
        first = self._tensors[chunk.runs[0].item]
        shape = (self._tiles, TILE)
        stack_shape = (len(first.models), *shape)
        stack = _view(lane.stack, first.models[0].dtype.numpy, stack_shape)
        if first.base is None:
            return None, stack
        return _view(lane.base, first.base.dtype.numpy, shape), stack

    def _placed(
        self, base: np.ndarray | None, stack: np.ndarray, tiles: kernels.Tiles
    ) -> tuple[Any, Any, Any]:
        """The kernel's arguments on the devices; NumPy as it is where there is one."""
        if self._mesh.size == 1:
            if tiles.keys is not None and self._on_host:
                masks = kernels.mask_kernel()(tiles.keys, tiles.blocks, tiles.drop)
                dropped = np.asarray(masks).view(np.bool_)
                tiles = tiles._replace(
                    keys=None, blocks=None, drop=None, dropped=dropped
                )
            return base, stack, tiles
        over_tiles = NamedSharding(self._mesh, kernels.TILES)
        over_stack = NamedSharding(self._mesh, kernels.STACK_TILES)
        return (
            None if base is None else jax.device_put(base, over_tiles),
            jax.device_put(stack, over_stack),
            tiles,
        )

    def _copy(self, chunk: Chunk, lane: Lane, turn: Any, emit: Emit) -> None:
        for run in chunk.runs:  # a copied chunk may hold many small tensors
            tensor = self._tensors[run.item]
            first, *others = tensor.sources
            names = self._read_names(tensor)
            values = _view(lane.base, first.dtype.numpy, (self._tiles * TILE,))
            values = values[run.elements]
            with self.clock.stage("reading"):
                first.read_into(values, run.start)
                for place, other in enumerate(others, start=1):
                    theirs = _view(lane.stack, first.dtype.numpy, (run.count,))
                    other.read_into(theirs, run.start)
                    pair = names[0], names[place]
                    checks.check_equal(values, theirs, run.start, tensor, pair)
            self._progress(values.nbytes * (1 + len(others)))
            values = self._as_output(run.item, values)
            with self.clock.stage("writing"):
                emit.write(run.item, run.start, values)
            self._progress(values.nbytes)
        with turn(), self.clock.stage("hashing"):
            for run in chunk.runs:
                first = self._tensors[run.item].sources[0]
                values = _view(lane.base, first.dtype.numpy, (self._tiles * TILE,))
                values = values[run.elements]
                emit.record(
                    run.item, run.start, self._as_output(run.item, values), [values]
                )

    def _as_output(self, item: int, values: np.ndarray) -> np.ndarray:
        return values.astype(self._tensors[item].dtype.numpy, copy=False)

    def _check_inputs(
        self, chunk: Chunk, base: np.ndarray | None, stack: np.ndarray
    ) -> None:
        parts = [*([] if base is None else [base]), *stack]
        for run in chunk.runs:
            tensor = self._tensors[run.item]
            for name, part in zip(self._read_names(tensor), parts, strict=True):
                values = part.reshape(-1)[run.elements]
                checks.check_finite(values, run.start, tensor, name)

    def _check_result(
        self,
        chunk: Chunk,
        base: np.ndarray | None,
        stack: np.ndarray,
        merged: np.ndarray,
    ) -> None:
        for run in chunk.runs:
            values = merged[run.elements]
            if checks.has_nonfinite(values):
                self._check_inputs(chunk, base, stack)  # which may be the reason
                checks.check_overflow(values, run.start, self._tensors[run.item])

    def _read_names(self, tensor: TensorInputs) -> list[str]:
        """Names of the checkpoints that the tensor's sources belong to."""
        return list(self._names[-len(tensor.sources) :])


def lane_bytes(tensors: Sequence[TensorInputs], tiles: int) -> tuple[int, int]:
    """Bytes of a lane's base and stack buffers for chunks of `tiles` tiles."""
    base = stack = 1
    for tensor in tensors:
        first = tensor.sources[0].dtype.itemsize
        if tensor.merged:
            models = sum(model.dtype.itemsize for model in tensor.models)
            base = max(base, first if tensor.base is not None else 0)
        else:
            models = first
            base = max(base, first)
        stack = max(stack, models)
    return base * tiles * TILE, stack * tiles * TILE


def signature(tensor: TensorInputs) -> tuple[str, ...]:
    """What tensors must share to stand in one chunk: the dtypes a kernel sees."""
    if not tensor.merged:
        return "copy", tensor.sources[0].dtype.code
    wide = DTYPES["F32"].numpy.name if tensor.dtype.code == "F64" else None
    base = tensor.base.dtype.code if tensor.base is not None else "-"
    return base, tensor.models[0].dtype.code, wide or tensor.dtype.numpy.name


def _view(buffer: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    return buffer[: int(np.prod(shape)) * dtype.itemsize].view(dtype).reshape(shape)


def _int64_sum(counts: jax.Array) -> np.ndarray:
    """Adds up the devices' counts (leading axis)."""
    return np.asarray(counts).astype(np.int64).sum(axis=0)


def _aligned(size: int) -> np.ndarray:
    buffer = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size]
