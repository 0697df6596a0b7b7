"""The jitted kernels for whole tensors in device memory, sharded or not.

They compute, element for element, what the kernels of the streamed merge compute, on
each device for its own shard: nothing is gathered, and nothing is exchanged but
counts. Everything that differs between draws is an array argument, so a sweep over
ratios, rates, seeds or scaling compiles once for each shape of tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from m3jax import prng
from m3jax.engine.kernels import Transform
from m3jax.engine.placement import Placement, run_starts
from m3jax.methods import METHODS, dare, selection

# Elements that one reduction counts: below the range of its int32 counters.
_MAX_COUNTED = 1 << 30


class Numbers(NamedTuple):
    """What a kernel has to know of one tensor, K models.

    Attributes:
      coefficients: (K,) float32.
      drop: (K,) float32, largest magnitudes that DARE by magnitude drops; or None.
      scales: (K,) float32, DARE's rescale factors; or None.
      masks: from `draw_masks`, for random DARE; or None.
    """

    coefficients: Any
    drop: Any = None
    scales: Any = None
    masks: Any = None


def draw_masks(keys: Any, thresholds: Any, *, placement: Placement) -> jax.Array:
    """Random DARE's masks of one tensor, True where an element is dropped.

    Args:
      keys: (K, 2) uint32, the mask key of each model.
      thresholds: (K,) uint32 lane thresholds.
      placement: of the tensor; the masks lie as it does.

    Returns:
      (K, *shape) bool.
    """
    # Kernels of their own: fused into one, XLA's CPU backend repeats
    # the cipher for every element of a block, and unpacks words one by one.
    words = _draw_words(keys, thresholds, placement=placement)
    return _unpack(words, placement=placement)


@functools.partial(jax.jit, static_argnames="placement")
def _draw_words(
    keys: jax.Array, thresholds: jax.Array, *, placement: Placement
) -> jax.Array:
    """(K, *runs, words) uint32: the words of `packed_mask` that hold each run."""
    slack = 0 if placement.aligned else prng.LANES - 1
    width = -(-(placement.run_size + slack) // prng.LANES) * prng.LANES
    wraps = placement.size >= prng.LANES << 32

    def draw(keys: jax.Array, thresholds: jax.Array) -> jax.Array:
        high, low = run_starts(placement)
        # An element's 64-bit block is its number divided by the four lanes of a block.
        blocks = jnp.concatenate([high >> 2, (high << 30) | (low >> 2)], axis=-1)

        def one(key: jax.Array, threshold: jax.Array) -> jax.Array:
            return prng.packed_mask(key[None], blocks, threshold, width, wraps=wraps)

        words = jax.vmap(one)(keys, thresholds)
        return words.reshape(len(keys), *placement.runs_shape, -1)

    draw = _on_shards(draw, placement, (P(), P()), placement.runs_spec)
    return draw(keys, thresholds)


@functools.partial(jax.jit, static_argnames="placement")
def _unpack(words: jax.Array, *, placement: Placement) -> jax.Array:
    """(K, *shape) bool from what `_draw_words` gives."""
    size = placement.run_size

    def unpack(words: jax.Array) -> jax.Array:
        lanes = jax.lax.bitcast_convert_type(words, jnp.uint8) != 0
        lanes = lanes.reshape(len(words), -1, words.shape[-1] * prng.LANES)
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
    numbers: Numbers,
    info: Any,
    scaling: Any,
    *,
    method: str,
    transform: Transform,
    dtype: str,
    placement: Placement,
) -> jax.Array:
    """One tensor of the models, merged; sharded as they are.

    Args:
      first: of the first model. Its buffer may be donated.
      others: of the others.
      base: of the base, None where nothing reads it.
      numbers: of this tensor.
      info: what the method's statistics found.
      scaling: s, a float32 scalar.
      method: a name of `METHODS`.
      transform: DARE's static choices.
      dtype: of the result; the only rounding of the merge goes to it.
      placement: of all the arrays.
    """

    def merge(
        models: Any, base: Any, numbers: Numbers, info: Any, scaling: Any
    ) -> jax.Array:
        base, stack = _float32(base, models)
        stack = _transformed(base, stack, numbers, transform)
        coefficients = _behind(numbers.coefficients, stack)
        merged = METHODS[method].apply(base, stack, coefficients, info, scaling)
        return merged.astype(dtype)

    spec = placement.spec
    numbers_specs = _numbers_specs(placement)
    specs = (spec, spec, numbers_specs, P(), P())
    merge = _on_shards(merge, placement, specs, spec)
    models = (first, *others)
    return merge(models, base, numbers, info, scaling)


_STATIC = ("method", "transform", "dtype", "placement")
merge_leaf = jax.jit(_merge, static_argnames=_STATIC)
merge_leaf_in_place = jax.jit(_merge, static_argnames=_STATIC, donate_argnames="first")


@functools.partial(
    jax.jit, static_argnames=("function", "transform", "placement", "count", "stride")
)
def reduce_leaf(
    models: Sequence[jax.Array],
    base: jax.Array | None,
    numbers: Numbers,
    arguments: Any,
    *,
    function: Callable[..., Any],
    transform: Transform,
    placement: Placement,
    count: bool,
    stride: int = 1,
) -> Any:
    """The counts of a `Reduction` over one tensor.

    Args:
      models, base, numbers, transform, placement: as for `merge_leaf`.
      function, arguments: of the reduction.
      count: make a histogram of the codes that `function` returns.
      stride: of so many elements look at one, for a sample.

    Returns:
      A pytree of int32 counts (or of codes) with a leading axis, over which the host
      adds up: a sum of several devices' counts might leave the range of int32.
    """

    def reduce(models: Any, base: Any, numbers: Numbers, arguments: Any) -> Any:
        base, stack = _float32(base, models)
        stack = _transformed(base, stack, numbers, transform)
        base = None if base is None else base.reshape(-1)
        stack = stack.reshape(len(models), -1)
        parts = []
        for start in range(0, stack.shape[1], _MAX_COUNTED):
            part = slice(start, start + _MAX_COUNTED, stride)
            own = None if base is None else base[part]
            valid = jnp.ones(stack[0, part].shape, bool)
            result = function(own, stack[:, part], valid, arguments)
            if count:
                codes, *counts = result
                result = selection.count_codes(codes), *counts
            parts.append(result)
        return jax.tree.map(lambda *parts: jnp.stack(parts), *parts)

    spec = placement.spec
    numbers_specs = _numbers_specs(placement)
    specs = (spec, spec, numbers_specs, P())
    reduce = _on_shards(reduce, placement, specs, P(placement.splitting_axes))
    return reduce(models, base, numbers, arguments)


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


def _numbers_specs(placement: Placement) -> Numbers:
    return Numbers(P(), P(), P(), placement.stack_spec)


def _float32(
    base: jax.Array | None, models: Sequence[jax.Array]
) -> tuple[jax.Array | None, jax.Array]:
    """The base, and the models on a leading axis, in float32.

    The stack is made of selects: XLA fuses them with what follows, so that the stack
    is never in memory, and the selects vanish. It writes out a concatenation.
    """
    shape = (len(models), *models[0].shape)
    model = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    stack = jnp.broadcast_to(models[0].astype(jnp.float32), shape)
    for i, values in enumerate(models[1:], start=1):
        stack = jnp.where(model == i, values.astype(jnp.float32)[None], stack)
    return None if base is None else base.astype(jnp.float32), stack


def _transformed(
    base: jax.Array | None,
    stack: jax.Array,
    numbers: Numbers,
    transform: Transform,
) -> jax.Array:
    """The stack after DARE."""
    if transform.strategy is None:
        return stack
    if transform.strategy == "random":
        dropped = numbers.masks
    else:
        thresholds = _behind(numbers.drop, stack)
        dropped = dare.magnitude_mask(base, stack, thresholds, target=transform.target)
    scales = _behind(numbers.scales, stack)
    return dare.drop_and_rescale(base, stack, dropped, scales, target=transform.target)


def _behind(per_model: Any, stack: jax.Array) -> jax.Array:
    """(K,) as (K, 1, ..., 1), to broadcast against the stack."""
    return jnp.reshape(per_model, (-1,) + (1,) * (stack.ndim - 1))
