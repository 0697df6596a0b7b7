"""The kernel on whole tensors in device memory, sharded or not.

Each device computes its own shard: nothing is gathered, and nothing is exchanged but
counts. Everything that differs between draws is an array argument, so a sweep over
ratios, rates, seeds or scaling compiles once for each shape of tensor.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from m3jax import prng
from m3jax.engine import kernel
from m3jax.engine.kernel import WIDTH, Numbers, Program, Reducing
from m3jax.engine.placement import Placement, run_starts
from m3jax.methods.step import Operands, any_traced

# Elements that one reduction counts: the int32 counters of a histogram hold them.
MAX_COUNTED = 1 << 30


def draw(keys: Any, thresholds: Any, kind: str, *, placement: Placement) -> jax.Array:
    """The masks or lanes of one tensor.

    Args:
      keys: (K, 2) uint32, the mask key of each model.
      thresholds: (K,) uint32 lane thresholds; not read for lanes.
      kind: ``mask``: True where an element is dropped; ``lanes``.
      placement: of the tensor; the masks lie as it does.

    Returns:
      (K, *shape) bool or uint16.
    """
    # Kernels of their own: fused into one, XLA's CPU backend repeats
    # the cipher for every element of a block, and unpacks words one by one.
    words = _draw_words(keys, thresholds, kind=kind, placement=placement)
    return _unpack(words, kind=kind, placement=placement)


@functools.partial(jax.jit, static_argnames=("kind", "placement"))
def _draw_words(
    keys: jax.Array, thresholds: jax.Array, *, kind: str, placement: Placement
) -> jax.Array:
    """(K, *runs, words): the words of `packed_mask`, or lanes, that hold each run."""
    slack = 0 if placement.aligned else prng.LANES - 1
    width = -(-(placement.run_size + slack) // prng.LANES) * prng.LANES
    wraps = placement.size >= prng.LANES << 32

    def draw(keys: jax.Array, thresholds: jax.Array) -> jax.Array:
        high, low = run_starts(placement)
        # An element's 64-bit block is its number divided by the four lanes of a block.
        blocks = jnp.concatenate([high >> 2, (high << 30) | (low >> 2)], axis=-1)

        def one(key: jax.Array, threshold: jax.Array) -> jax.Array:
            if kind == "lanes":
                own = jnp.broadcast_to(key, (len(blocks), 2))
                return prng.mask_lanes(own, blocks, width, wraps=wraps)
            return prng.packed_mask(key[None], blocks, threshold, width, wraps=wraps)

        words = jax.vmap(one)(keys, thresholds)
        return words.reshape(len(keys), *placement.runs_shape, -1)

    draw = _on_shards(draw, placement, (P(), P()), placement.runs_spec)
    return draw(keys, thresholds)


@functools.partial(jax.jit, static_argnames=("kind", "placement"))
def _unpack(words: jax.Array, *, kind: str, placement: Placement) -> jax.Array:
    """(K, *shape) bool or uint16 from what `_draw_words` gives."""
    size = placement.run_size

    def unpack(words: jax.Array) -> jax.Array:
        lanes = words
        if kind == "mask":
            lanes = jax.lax.bitcast_convert_type(words, jnp.uint8) != 0
        runs = math.prod(placement.runs_shape)
        lanes = lanes.reshape(len(words), runs, -1)
        dropped = lanes[..., :size]
        if not placement.aligned:
            _, low = run_starts(placement)
            lane = low[None] % prng.LANES  # of a run's first element in its first word
            for i in range(1, prng.LANES):
                dropped = jnp.where(lane == i, lanes[..., i : i + size], dropped)
        return dropped.reshape(len(words), *placement.shard_shape)

    unpack = _on_shards(unpack, placement, placement.runs_spec, placement.stack_spec)
    return unpack(words)


def _merge(
    first: jax.Array,
    others: Sequence[jax.Array],
    base: jax.Array | None,
    beside: Mapping[str, Sequence[jax.Array]],
    numbers: Numbers,
    draw: jax.Array | None,
    *,
    program: Program,
    dtypes: tuple[tuple[str, str], ...],
    placement: Placement,
) -> dict[str, jax.Array]:
    """One tensor of the models, merged; sharded as they are.

    Args:
      first: of the first model. Its buffer may be donated.
      others: of the others.
      base: of the base, None where nothing reads it.
      beside: what comes beside each model, by name.
      numbers: of this tensor, from `kernel.take`.
      draw: from `draw`, or None.
      program, dtypes: as for `kernel.merge`.
      placement: of all the arrays.

    Returns:
      The parts of the output by name.
    """

    def merge(models: Any, base: Any, beside: Any, numbers: Any, draw: Any) -> Any:
        x = operands(base, models, beside)
        return kernel.merge(x, numbers, draw, program=program, dtypes=dtypes)

    spec = placement.spec
    shape = jax.eval_shape(merge, (first, *others), base, beside, numbers, draw)
    by_model = len(placement.shape) + 1
    parts = {
        part: placement.stack_spec if array.ndim == by_model else spec
        for part, array in shape.items()
    }
    specs = (spec, spec, spec, P(), placement.stack_spec)
    on_shards = _on_shards(merge, placement, specs, parts)
    return on_shards((first, *others), base, beside, numbers, draw)


_STATIC = ("program", "dtypes", "placement")
_merge_leaf = jax.jit(_merge, static_argnames=_STATIC)
_merge_in_place = jax.jit(_merge, static_argnames=_STATIC, donate_argnames="first")


def merge_leaf(
    first: Any, *others: Any, program: Program, in_place: bool = False, **how: Any
) -> dict[str, jax.Array]:
    """One tensor of the models, merged; see `_merge`. `in_place`: donates the first.

    Whole matrices on CPUs have float64 at hand, whose LAPACK is as fast there, unless a
    transformation of the caller's goes through: what it makes of the program afterwards
    would not have it.
    """
    merge = _merge_in_place if in_place else _merge_leaf
    inside = any_traced((first, *others), (jnp.zeros(()),))
    whole = program.unit(len(program.steps)) == "matrix"
    wide = jax.enable_x64(True) if whole and not inside and _on_cpu(first) else None
    with wide or contextlib.nullcontext():
        return merge(first, *others, program=program, **how)


def _on_cpu(array: Any) -> bool:
    if not isinstance(array, jax.Array):
        return jax.default_backend() == "cpu"
    return all(device.platform == "cpu" for device in array.devices())


@functools.partial(
    jax.jit,
    static_argnames=("how", "placement", "stride"),
)
def reduce_leaf(
    models: Sequence[jax.Array],
    base: jax.Array | None,
    beside: Mapping[str, Sequence[jax.Array]],
    numbers: Numbers,
    draw: jax.Array | None,
    arguments: Any,
    *,
    how: Reducing,
    placement: Placement,
    stride: int = 1,
) -> tuple[Any, ...]:
    """What a `Reduction` finds in one tensor.

    Args:
      models, base, beside, draw, placement: as for `merge_leaf`.
      numbers, arguments: from `kernel.take`, for a flat part where the transforms
        before it are elementwise.
      how: as for `kernel.reduce`.
      stride: of so many elements look at one, for a sample of an elementwise step.

    Returns:
      For each array of the function what `kernel.reduce` gives, with the rows of all
      shards on the leading axis.
    """
    whole = how.program.unit(len(how.program.transforms)) != "element"
    axes = len(placement.shape)

    def reduce(
        models: Any, base: Any, beside: Any, numbers: Any, draw: Any, arguments: Any
    ) -> Any:
        x: Any = (operands(base, models, beside), draw)
        if not whole:
            x = jax.tree.map(lambda a: a.reshape(*a.shape[: a.ndim - axes], -1), x)
        size = x[0].models.shape[-1]
        found = []
        for start in (0,) if whole else range(0, size, MAX_COUNTED):
            part, own = x
            if not whole:
                cut = slice(start, start + MAX_COUNTED, stride)
                part, own = jax.tree.map(lambda a: a[..., cut], x)  # noqa: B023
            real = math.prod(part.models.shape[1:])
            valid = jnp.arange(-(-real // WIDTH) * WIDTH, dtype=jnp.int32) < real
            valid = valid.reshape(-1, WIDTH)
            found.append(kernel.reduce(part, numbers, own, arguments, valid, how))
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)

    spec = placement.spec
    specs = (spec, spec, spec, P(), placement.stack_spec, P())
    reduce = _on_shards(reduce, placement, specs, P(placement.splitting_axes))
    return reduce(models, base, beside, numbers, draw, arguments)


@functools.partial(jax.jit, static_argnames="placement")
def all_finite(array: jax.Array, *, placement: Placement) -> jax.Array:
    """Whether each shard holds neither NaN nor infinity, (shards,) bool."""

    def check(array: jax.Array) -> jax.Array:
        return jnp.all(jnp.isfinite(array))[None]

    check = _on_shards(check, placement, (placement.spec,), P(placement.splitting_axes))
    return check(array)


def _on_shards(
    function: Callable[..., Any], placement: Placement, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    if placement.mesh is None:
        return function
    return jax.shard_map(
        function, mesh=placement.mesh, in_specs=in_specs, out_specs=out_specs
    )


def operands(
    base: jax.Array | None,
    models: Sequence[jax.Array],
    beside: Mapping[str, Sequence[jax.Array]],
) -> Operands:
    """Base, models and what is beside them, the latter two on a leading axis.

    The stacks are made of selects: XLA fuses them with what follows, so that a stack is
    never in memory, and the selects vanish. It writes out a concatenation.
    """
    own = () if base is None else (base,)
    wide = any(array.dtype == jnp.float64 for array in (*models, *own))
    dtype = jnp.float64 if wide else jnp.float32

    def stack(arrays: Sequence[jax.Array]) -> jax.Array:
        shape = (len(arrays), *arrays[0].shape)
        model = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        stacked = jnp.broadcast_to(arrays[0].astype(dtype), shape)
        for i, values in enumerate(arrays[1:], start=1):
            stacked = jnp.where(model == i, values.astype(dtype)[None], stacked)
        return stacked

    return Operands(
        None if base is None else base.astype(dtype),
        stack(models),
        {name: stack(arrays) for name, arrays in beside.items()},
    )
