"""The jitted kernels: a chunk of base and models in, a merged chunk or counts out.

A chunk is (T, TILE): each row a tile of one tensor. Everything that differs between
tensors, draws and models is an array argument, so a kernel is compiled once for a
recipe's static choices and one chunk shape, whatever the number of tensors.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from m3jax import prng
from m3jax.engine.plan import TILE
from m3jax.methods import METHODS, dare, selection
from m3jax.recipe import Recipe

AXIS = "tiles"
TILES = P(AXIS)
STACK_TILES = P(None, AXIS)


class Tiles(NamedTuple):
    """What a kernel has to know of each tile; T tiles, K models.

    Attributes:
      counts: (T, 1) int32, valid elements of each tile.
      coefficients: (K, T, 1) float32; None in a reduction.
      keys: (K, T, 2) uint32, DARE mask keys; None without random DARE.
      blocks: (T, 2) uint32, the tile's first mask block, high and low word.
      drop: (K, 1, 1) uint32 lane thresholds for random DARE, or (K, T, 1) float32
        magnitudes for DARE by magnitude.
      scales: (K, 1, 1) float32, DARE's rescale factors.
      dropped: (K, T, TILE) bool, random DARE's mask where it is made beforehand by
        `mask_kernel`; None: it is made from keys, blocks and drop.
    """

    counts: Any
    coefficients: Any
    keys: Any = None
    blocks: Any = None
    drop: Any = None
    scales: Any = None
    dropped: Any = None


@dataclasses.dataclass(frozen=True)
class Transform:
    """The static choices of DARE; `strategy` None means that it is off."""

    strategy: str | None
    target: str

    @classmethod
    def of(cls, recipe: Recipe) -> Transform:
        on = recipe.dare.drop_rate is not None
        return cls(recipe.dare.strategy if on else None, recipe.dare.target)

    def __call__(
        self, base: jax.Array | None, stack: jax.Array, tiles: Tiles
    ) -> jax.Array:
        """The stack after DARE; (K, T, TILE) float32."""
        if self.strategy is None:
            return stack
        if tiles.dropped is not None:
            dropped = tiles.dropped
        elif self.strategy == "random":
            draw = jax.vmap(prng.mask_lanes, (0, None, None))
            lanes = draw(tiles.keys, tiles.blocks, TILE)
            dropped = lanes.astype(jnp.uint32) < tiles.drop
        else:
            dropped = dare.magnitude_mask(base, stack, tiles.drop, target=self.target)
        return dare.drop_and_rescale(
            base, stack, dropped, tiles.scales, target=self.target
        )


@functools.lru_cache(maxsize=64)
def merge_kernel(
    method: str, transform: Transform, dtype: str
) -> Callable[..., jax.Array]:
    """The kernel (base, stack, tiles, info, scaling) -> merged chunk.

    Args:
      method: a name of `METHODS`.
      transform: DARE's static choices.
      dtype: of the result; the only rounding of the merge goes to it.
    """

    def merge(
        base: jax.Array | None, stack: jax.Array, tiles: Tiles, info: Any, scaling: Any
    ) -> jax.Array:
        base, stack = _float32(base), stack.astype(jnp.float32)
        stack = transform(base, stack, tiles)
        merged = METHODS[method].apply(base, stack, tiles.coefficients, info, scaling)
        return merged.astype(dtype)

    return jax.jit(merge)


@functools.lru_cache(maxsize=1)
def mask_kernel() -> Callable[..., jax.Array]:
    """The kernel (keys, blocks, drop) -> (K, T, TILE / 4) packed masks.

    A kernel of its own: inside another one, XLA's CPU backend repeats the cipher for
    every element of a block.
    """

    def masks(keys: jax.Array, blocks: jax.Array, drop: jax.Array) -> jax.Array:
        def one(keys: jax.Array, drop: jax.Array) -> jax.Array:
            return prng.packed_mask(keys, blocks, drop, TILE)

        return jax.vmap(one)(keys, drop)

    return jax.jit(masks)


@functools.lru_cache(maxsize=64)
def reduce_kernel(
    function: Callable[..., Any],
    transform: Transform,
    mesh: Mesh | None = None,
    *,
    count: bool = False,
) -> Callable[..., Any]:
    """The kernel (base, stack, tiles, arguments) -> counts of one chunk.

    The counts get a leading axis: one row per device of the mesh. The host adds them
    up. A sum across devices here would be a collective, and collectives that several
    threads start at once can wait for each other for ever.

    Args:
      function: of a `Reduction`.
      transform: DARE's static choices.
      mesh: of several devices; None for one.
      count: make a histogram of the codes that `function` returns.
    """

    def reduce(
        base: jax.Array | None, stack: jax.Array, tiles: Tiles, arguments: Any
    ) -> Any:
        base, stack = _float32(base), stack.astype(jnp.float32)
        valid = jnp.arange(TILE, dtype=jnp.int32)[None] < tiles.counts
        result = function(base, transform(base, stack, tiles), valid, arguments)
        if count:
            codes, *counts = result
            result = selection.count_codes(codes), *counts
        return jax.tree.map(lambda part: part[None], result)

    if mesh is None:
        return jax.jit(reduce)
    tiles_layout = tiles_specs(transform)._replace(coefficients=None)
    specs = (TILES, STACK_TILES, tiles_layout, P())
    return jax.jit(jax.shard_map(reduce, mesh=mesh, in_specs=specs, out_specs=P(AXIS)))


def tiles_specs(transform: Transform) -> Tiles:
    """How each field of `Tiles` is laid out over a mesh of devices."""
    random = transform.strategy == "random"
    per_model = P() if random else STACK_TILES
    return Tiles(
        counts=TILES,
        coefficients=STACK_TILES,
        keys=STACK_TILES if random else None,
        blocks=TILES if random else None,
        drop=per_model if transform.strategy else None,
        scales=P() if transform.strategy else None,
    )


def _float32(array: jax.Array | None) -> jax.Array | None:
    return None if array is None else array.astype(jnp.float32)
