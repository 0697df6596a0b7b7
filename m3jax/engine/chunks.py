"""What is done with one chunk: read into buffers, measured, merged, checked."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from m3jax.engine import checks, leaves, resident
from m3jax.engine import tiles as on_tiles
from m3jax.engine.buffers import Buffers, view
from m3jax.engine.inputs import TensorInputs
from m3jax.engine.kernel import At, Numbers, Program, Reducing, take
from m3jax.engine.passes import Pass, by_group
from m3jax.engine.pipeline import Clock
from m3jax.engine.placement import Placement
from m3jax.engine.plan import TILE, Chunk
from m3jax.methods.step import Operands

Parts = Mapping[str, np.ndarray]  # of the output, by name


class Work:
    """Does it, for any thread."""

    def __init__(
        self,
        tensors: Sequence[TensorInputs],
        *,
        tiles: int,
        devices: Sequence[jax.Device],
        clock: Clock,
        advance: Callable[[int], None],
    ):
        """
        Args:
          tensors: of the output.
          tiles: of a chunk, a multiple of the number of devices.
          devices: over which a chunk's tiles are shared out.
          clock: counts the seconds of each stage.
          advance: is called with the number of bytes read.
        """
        self.clock = clock
        self._tensors = tensors
        self._tiles = tiles
        self._advance = advance
        self._mesh = Mesh(np.array(devices), (on_tiles.AXIS,))
        # One CPU device shares the host's memory: NumPy takes over what it does better.
        self._on_host = resident.possible(devices)

    def reduce_chunk(
        self, asked: Pass, chunk: Chunk, x: Operands, draw: Any = None
    ) -> list[dict[int, Any]]:
        """What a pass finds in a chunk, for each of its numbers and by group.

        Args:
          asked: the pass.
          chunk, x: what is read.
          draw: from `draw`, if it is there already.
        """
        at, combine = asked.at, asked.first.combine
        how = Reducing.of(at, asked.first, count=not self._on_host)
        with _x64(chunk):
            if chunk.block is None:
                item, _, counts = on_tiles.tiles_of(chunk, self._tiles)
                mesh = self._mesh if self._mesh.size > 1 else None
                result = on_tiles.reduce_tiles(how, mesh)(
                    self._placed(x),
                    take(at.numbers.first(at.depth), item, 1, _compute(chunk)),
                    self.draw(at, chunk) if draw is None else draw,
                    take(asked.arguments, asked.slots[item], 1, np.float32),
                    counts,
                )
            else:
                result = self._reduce_block(asked, how, chunk, x)
            return [
                by_group(
                    kind,
                    np.asarray(part),
                    chunk,
                    asked.slots,
                    counted=not self._on_host,
                    stride=asked.stride,
                )
                for kind, part in zip(combine, result, strict=True)
            ]

    def _reduce_block(
        self, asked: Pass, how: Reducing, chunk: Chunk, x: Operands
    ) -> tuple[Any, ...]:
        (run,) = chunk.runs
        axes = len(chunk.block or ())
        at, slot = asked.at, int(asked.slots[run.item])
        return leaves.reduce_leaf(
            tuple(x.models),
            x.base,
            {name: tuple(own) for name, own in x.beside.items()},
            take(at.numbers.first(at.depth), run.item, axes),
            self._block_draw(at, chunk),
            take(asked.arguments, slot, axes),
            how=how,
            placement=Placement(chunk.block or ()),
        )

    def compute(
        self,
        program: Program,
        chunk: Chunk,
        x: Operands,
        tables: Numbers,
        draw: Any = None,
    ) -> dict[str, np.ndarray]:
        """The parts of the output that a chunk makes, flat; `draw`: if it is there."""
        dtypes, end = chunk.signature[-1], At.method(program, tables)
        own = tables._replace(keys=None)
        with _x64(chunk):
            if chunk.block is None:
                item, *_ = on_tiles.tiles_of(chunk, self._tiles)
                made = on_tiles.merge_tiles(program, dtypes)(
                    self._placed(x),
                    take(own, item, 1, _compute(chunk)),
                    self.draw(end, chunk) if draw is None else draw,
                )
            else:
                (run,) = chunk.runs
                made = leaves.merge_leaf(
                    x.models[0],
                    tuple(x.models[1:]),
                    x.base,
                    {name: tuple(own) for name, own in x.beside.items()},
                    take(own, run.item, len(chunk.block), _compute(chunk)),
                    self._block_draw(end, chunk),
                    program=program,
                    dtypes=dtypes,
                    placement=Placement(chunk.block),
                )
            return {part: np.asarray(array).reshape(-1) for part, array in made.items()}

    def fill(self, chunk: Chunk, buffers: Buffers) -> Operands:
        """Reads a chunk: base or None, models and what is beside them."""
        x = self.views(chunk, buffers)
        with self.clock.stage("reading"):
            for run in chunk.runs:
                origins = self._tensors[run.item].origins
                for own, origin in zip(flat(x), origins, strict=True):
                    origin.source.read_into(own[of(run, chunk)], run.start)
        sources = self._tensors[chunk.runs[0].item].sources
        self._advance(chunk.elements * sum(s.dtype.itemsize for s in sources))
        return x

    def views(self, chunk: Chunk, buffers: Buffers) -> Operands:
        """The buffers as the arrays that a chunk of this signature fills."""
        first = self._tensors[chunk.runs[0].item]
        shape = (self._tiles, TILE) if chunk.block is None else chunk.block
        dtype = first.models[0].source.dtype.numpy
        stack = view(buffers.stack, dtype, (len(first.models), *shape))
        beside: dict[str, Any] = {}
        for name, origins in first.beside.items():
            source = origins[0].source
            own = (len(origins), *shape)
            if chunk.block is not None and source.shape != chunk.block:
                own = (len(origins), *source.shape)  # a matrix of another shape
            if math.prod(own) * source.dtype.itemsize <= len(buffers.beside):
                beside[name] = view(buffers.beside, source.dtype.numpy, own)
            else:
                beside[name] = np.empty(own, source.dtype.numpy)
        base = None
        if first.base is not None:
            base = view(buffers.base, first.base.source.dtype.numpy, shape)
        return Operands(base, stack, beside)

    def _placed(self, x: Operands) -> Operands:
        """The arrays on the devices; NumPy as it is where there is one."""
        if self._mesh.size == 1:
            return x
        over_tiles = NamedSharding(self._mesh, on_tiles.TILES)
        over_stack = NamedSharding(self._mesh, on_tiles.STACK_TILES)
        return Operands(
            None if x.base is None else jax.device_put(x.base, over_tiles),
            jax.device_put(x.models, over_stack),
            jax.device_put(dict(x.beside), over_stack),
        )

    def draw(self, at: At, chunk: Chunk) -> Any:
        """Masks or lanes of tiles, or on several devices what they are made of."""
        if not at.draws:
            return None
        item, tile, _ = on_tiles.tiles_of(chunk, self._tiles)
        made_of = on_tiles.keys_and_blocks(at.numbers.keys, at.threshold, item, tile)
        if self._on_host:
            return on_tiles.drawn_beforehand(at.draws, made_of)
        keys, blocks_, thresholds = made_of
        if self._mesh.size > 1:  # along the tiles, as everything else
            over = NamedSharding(self._mesh, PartitionSpec(None, on_tiles.AXIS))
            first = NamedSharding(self._mesh, on_tiles.TILES)
            keys, thresholds = jax.device_put((keys, thresholds), over)
            blocks_ = jax.device_put(blocks_, first)
        return keys, blocks_, thresholds

    def _block_draw(self, at: At, chunk: Chunk) -> Any:
        """Masks or lanes of a block, (K, *block), on the host."""
        if not at.draws:
            return None
        assert chunk.block is not None
        (run,) = chunk.runs
        first, last = run.start // TILE, -(-(run.start + run.count) // TILE)
        threshold = at.threshold
        parts = []
        for start in range(first, last, self._tiles):
            tile = np.arange(start, start + self._tiles, dtype=np.uint64)
            item = np.full(self._tiles, run.item)
            made_of = on_tiles.keys_and_blocks(at.numbers.keys, threshold, item, tile)
            drawn = on_tiles.drawn_beforehand(at.draws, made_of)
            parts.append(drawn.reshape(len(drawn), -1))
        offset = run.start - first * TILE
        whole = np.concatenate(parts, axis=1)[:, offset : offset + run.count]
        return whole.reshape(len(whole), *chunk.block)

    def of_run(self, run: Any, part: str, values: np.ndarray) -> np.ndarray:
        """What is written of a part: of the output's dtype, packed where it is."""
        spec = self._tensors[run.item].parts[part]
        own = values[run.elements] if len(values) != math.prod(spec.shape) else values
        if spec.packed:
            return np.packbits(own)
        return own.astype(spec.dtype.numpy, copy=False)

    def check_inputs(self, chunk: Chunk, x: Operands) -> None:
        used = _used(chunk)
        if not any(checks.has_nonfinite(own[used]) for own in flat(x)):
            return
        for run in chunk.runs:
            tensor = self._tensors[run.item]
            for origin, own in zip(tensor.origins, flat(x), strict=True):
                values = own[of(run, chunk)]
                checks.check_finite(values, run.start, tensor, origin.owner.name)

    def check_result(self, chunk: Chunk, x: Operands, parts: Parts) -> None:
        numbers = [own for own in parts.values() if own.dtype != np.bool_]
        used = _used(chunk)
        if not any(checks.has_nonfinite(merged[used]) for merged in numbers):
            return
        for run in chunk.runs:
            for merged in numbers:
                values = merged[run.elements]
                if checks.has_nonfinite(values):
                    self.check_inputs(chunk, x)  # which may be the reason
                    checks.check_overflow(values, run.start, self._tensors[run.item])


def flat(x: Operands) -> list[np.ndarray]:
    """The arrays in the order of `TensorInputs.origins`, flat."""
    stacks = (x.models, *x.beside.values())
    flat = [own for stack in stacks for own in stack.reshape(len(stack), -1)]
    return flat if x.base is None else [x.base.reshape(-1), *flat]


def of(run: Any, chunk: Chunk) -> slice:
    """A run's elements in each flat operand; a block is all of it."""
    return run.elements if chunk.block is None else slice(None)


def _used(chunk: Chunk) -> slice:
    """The elements of flat operands up to the last real one."""
    return (
        slice(None) if chunk.block is not None else slice(chunk.runs[-1].elements.stop)
    )


def _compute(chunk: Chunk) -> Any:
    """The dtype of a chunk's arithmetic."""
    return np.float64 if chunk.signature[0] == "F64" else np.float32


def _x64(chunk: Chunk) -> Any:
    """64 bits, for chunks that are merged in float64."""
    if chunk.signature[0] == "F64":
        return jax.enable_x64(True)
    return contextlib.nullcontext()
