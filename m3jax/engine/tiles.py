"""The kernel on tiles of files: rows of `TILE` elements, each of one tensor.

Whatever the number of tensors, one compiled program of one shape serves them all:
what differs between them is a number per tile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from m3jax import prng
from m3jax.engine import kernel
from m3jax.engine.kernel import Program, Reducing
from m3jax.engine.plan import TILE, Chunk
from m3jax.methods.step import Operands

AXIS = "tiles"
TILES = P(AXIS)
STACK_TILES = P(None, AXIS)


@functools.lru_cache(maxsize=64)
def merge_tiles(
    program: Program, dtypes: tuple[tuple[str, str], ...]
) -> Callable[..., dict[str, jax.Array]]:
    """The kernel (operands of T tiles, numbers, draw) -> parts."""

    def merge(x: Operands, numbers: Any, draw: Any) -> dict[str, jax.Array]:
        return kernel.merge(
            x, numbers, _drawn(draw, program), program=program, dtypes=dtypes
        )

    return jax.jit(merge)


@functools.lru_cache(maxsize=256)
def reduce_tiles(
    how: Reducing, mesh: Mesh | None
) -> Callable[..., tuple[jax.Array, ...]]:
    """The kernel (operands, numbers, draw, arguments, counts) -> what is found.

    `counts`, (T, 1) int32, are the elements of each tile that are real. A mesh of
    several devices makes a row, or a histogram, for each tile or device of its own. The
    host adds them up: a sum across devices here would be a collective, and collectives
    that several threads start at once can wait for each other for ever.
    """

    def reduce(
        x: Operands, numbers: Any, draw: Any, arguments: Any, counts: Any
    ) -> Any:
        valid = jnp.arange(TILE, dtype=jnp.int32)[None] < counts
        own = _drawn(draw, how.program)
        return kernel.reduce(x, numbers, own, arguments, valid, how)

    if mesh is None:
        return jax.jit(reduce)

    def specs(tree: Any) -> Any:
        """Tiles are the axis before the last; what is per model has one before it."""
        return jax.tree.map(lambda a: P(*(None,) * (a.ndim - 2), AXIS), tree)

    def on_devices(*operands: Any) -> Any:
        return jax.shard_map(
            reduce, mesh=mesh, in_specs=specs(operands), out_specs=P(AXIS)
        )(*operands)

    return jax.jit(on_devices)


def keys_and_blocks(
    keys: np.ndarray, threshold: np.ndarray, item: np.ndarray, tile: np.ndarray
) -> tuple[np.ndarray, ...]:
    """What the draws of T tiles are made of, on the device or beforehand.

    Args:
      keys: (K, N, 2) uint32, the mask keys.
      threshold: (K, N) uint32.
      item: (T,), the tensor of each tile.
      tile: (T,) uint64, the tile's number within its tensor.

    Returns:
      Keys (K, T, 2), the tiles' first blocks (T, 2) and thresholds (K, T, 1).
    """
    block = tile * np.uint64(TILE // prng.LANES)
    words = np.stack([block >> np.uint64(32), block & np.uint64(0xFFFFFFFF)], -1)
    return keys[:, item], words.astype(np.uint32), threshold[:, item, None]


@functools.lru_cache(maxsize=2)
def draw_kernel(kind: str) -> Callable[..., jax.Array]:
    """The kernel (keys, blocks, thresholds) -> masks or lanes of tiles.

    A kernel of its own: inside another one, XLA's CPU backend repeats the cipher for
    every element of a block. Masks are packed, four bytes to a word; see `as_mask`.
    """

    def draw(keys: jax.Array, blocks: jax.Array, thresholds: jax.Array) -> jax.Array:
        def masks(keys: jax.Array, threshold: jax.Array) -> jax.Array:
            return prng.packed_mask(keys, blocks, threshold, TILE)

        if kind == "mask":
            return jax.vmap(masks)(keys, thresholds)
        return jax.vmap(prng.mask_lanes, (0, None, None))(keys, blocks, TILE)

    return jax.jit(draw)


def drawn_beforehand(kind: str, made_of: tuple[np.ndarray, ...]) -> np.ndarray:
    """Masks (K, T, TILE) bool or lanes uint16, on the host."""
    drawn = np.asarray(draw_kernel(kind)(*made_of))
    return drawn.view(np.bool_) if kind == "mask" else drawn


def _drawn(draw: Any, program: Program) -> Any:
    """The draw itself, or what it is made of made into it."""
    if not isinstance(draw, tuple):
        return draw
    keys, blocks, thresholds = draw
    lanes = jax.vmap(prng.mask_lanes, (0, None, None))(keys, blocks, TILE)
    if program.draws() == "lanes":
        return lanes
    return lanes.astype(jnp.uint32) < thresholds


def tiles_of(chunk: Chunk, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The tensor of each tile, its number in it and its elements, (rows,) each."""
    item = np.zeros(rows, np.int64)
    tile = np.zeros(rows, np.uint64)
    counts = np.zeros((rows, 1), np.int32)
    runs = np.array([(run.item, run.start, run.count) for run in chunk.runs], np.int64)
    own, starts, sizes = runs.T
    each = -(-sizes // TILE)
    ends = np.cumsum(each)  # runs follow each other
    filled = int(ends[-1])
    item[:filled] = np.repeat(own, each)
    tile[:filled] = np.arange(filled) + np.repeat(starts // TILE + each - ends, each)
    counts[:filled] = TILE
    counts[ends - 1, 0] = sizes - (each - 1) * TILE
    return item, tile, counts
