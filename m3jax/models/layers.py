"""What decoders have in common: positions, a cache, attention, products.

Letters of shapes: B sequences, T tokens, S slots that are attended to, H width, D
channels of a head, K heads of keys and values, G queries to each of them, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.models.config import Config

Parameters = Mapping[str, Any]

PADDING = -1  # the position of a token that is not there
OBSERVE = "observe"  # beside a weight: a function that is told what it multiplies
_QUERIES = 512  # of a sequence, whose scores against all slots are held at a time


class Cache(NamedTuple):
    """Keys and values of the tokens so far, in a fixed number of slots.

    Attributes:
      keys, values: for each layer, (B, S, K, D).
      positions: (B, S) int32, PADDING where a slot is empty.
      filled: int32, slots in use; the next tokens go behind them.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    positions: jax.Array
    filled: jax.Array


def empty_cache(config: Config, batch: int, slots: int, dtype: Any) -> Cache:
    """A cache for `slots` tokens of each of `batch` sequences."""
    shape = (batch, slots, config.num_key_value_heads, config.head_dim)
    layers = range(config.num_layers)
    return Cache(
        keys=tuple(jnp.zeros(shape, dtype) for _ in layers),
        values=tuple(jnp.zeros(shape, dtype) for _ in layers),
        positions=jnp.full((batch, slots), PADDING, jnp.int32),
        filled=jnp.zeros((), jnp.int32),
    )


def positions_of(valid: jax.Array) -> jax.Array:
    """Positions of tokens among padding: 0, 1, … where `valid`, PADDING elsewhere.

    Args:
      valid: (B, T) bool; the padding may be on the left, on the right or between.
    """
    return jnp.where(valid, jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, PADDING)


class Attention:
    """Attention to the tokens of a cache and to new ones, a call for each layer.

    Lives while a forward pass is traced, and gathers the cache that the pass leaves.
    """

    def __init__(self, positions: jax.Array, cache: Cache | None):
        """Begins a pass.

        Args:
          positions: (B, T) int32 of the new tokens.
          cache: of the tokens before them; None: there are none.
        """
        self._positions, self._before = positions, cache
        self._seen = positions  # (B, S): positions of what is attended to
        if cache is not None:
            self._seen = _write(cache.positions, positions, cache.filled)
        self._keys: list[jax.Array] = []
        self._values: list[jax.Array] = []

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, window: int | None = None
    ) -> jax.Array:
        """The next layer's: (B, T, K G, D), (B, T, K, D) twice, to (B, T, K G D).

        Args:
          q, k, v: of the new tokens.
          window: how many tokens each sees, its own included; None: all.
        """
        if self._before is not None:
            layer = len(self._keys)
            k = _write(self._before.keys[layer], k, self._before.filled)  # (B, S, K, D)
            v = _write(self._before.values[layer], v, self._before.filled)
        self._keys.append(k)
        self._values.append(v)
        return _attend(q, k, v, self._positions, self._seen, window)

    @property
    def cache(self) -> Cache:
        """With the new tokens; if there was none before, it has no slots left."""
        before = 0 if self._before is None else self._before.filled
        filled = jnp.int32(self._positions.shape[1]) + before
        return Cache(tuple(self._keys), tuple(self._values), self._seen, filled)


def linear(weights: Parameters, x: jax.Array) -> jax.Array:
    """x · weightᵀ, plus the bias if there is one."""
    if OBSERVE in weights:
        weights[OBSERVE](x)
    y = product(x, weights["weight"], x.dtype)
    return y if "bias" not in weights else y + along_last(weights["bias"], y)


def product(x: jax.Array, weight: jax.Array, dtype: Any) -> jax.Array:
    """x · weightᵀ with a weight as most checkpoints hold it, (out, in)."""
    return jnp.einsum(
        "...i,oi->...o",
        x,
        weight.astype(x.dtype),
        precision=_precision(x.dtype),
        preferred_element_type=dtype,
    )


def along_last(vector: jax.Array, like: jax.Array) -> jax.Array:
    """A vector of the last axis of `like`, of its dtype and rank."""
    return vector.astype(like.dtype).reshape((1,) * (like.ndim - 1) + (-1,))


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    seen: jax.Array,
    window: int | None,
) -> jax.Array:
    """Attention, of so many queries at a time: (B, T, K G, D) to (B, T, K G D)."""
    batch, length = positions.shape
    if length <= _QUERIES:
        return _attend_to(q, k, v, _visible(positions, seen, window))
    missing = -length % _QUERIES

    def blocks(x: jax.Array, fill: int) -> jax.Array:
        """(B, T, ...) to (T / _QUERIES, B, _QUERIES, ...)."""
        ends = ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2))
        x = jnp.pad(x, ends, constant_values=fill)
        return jnp.moveaxis(x.reshape(batch, -1, _QUERIES, *x.shape[2:]), 1, 0)

    @jax.checkpoint  # a gradient would keep all scores otherwise
    def attend(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        own, places = block
        return _attend_to(own, k, v, _visible(places, seen, window))

    mixed = jax.lax.map(attend, (blocks(q, 0), blocks(positions, PADDING)))
    return jnp.moveaxis(mixed, 0, 1).reshape(batch, length + missing, -1)[:, :length]


def _visible(positions: jax.Array, seen: jax.Array, window: int | None) -> jax.Array:
    """Which slots a token attends to: those before it, and itself: (B, T, S)."""
    distance = positions[:, :, None] - seen[:, None, :]
    visible = (distance >= 0) & (seen != PADDING)[:, None, :]
    return visible if window is None else visible & (distance < window)


def _attend_to(
    q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array
) -> jax.Array:
    """Softmax attention with grouped queries: (B, T, K G, D) to (B, T, K G D)."""
    batch, length, _, head_dim = q.shape
    q = q.reshape(batch, length, k.shape[2], -1, head_dim)  # (B, T, K, G, D)
    scores = jnp.einsum(
        "btkgd,bskd->bkgts",
        q,
        k,
        precision=_precision(q.dtype),
        preferred_element_type=jnp.float32,
    ) / math.sqrt(head_dim)
    # Not -inf: padding attends to nothing, and its softmax must not become NaN.
    scores = jnp.where(visible[:, None, None], scores, np.finfo(np.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    mixed = jnp.einsum("bkgts,bskd->btkgd", weights, v, precision=_precision(v.dtype))
    return mixed.reshape(batch, length, -1)


def _precision(dtype: Any) -> jax.lax.Precision:
    """float32 means float32: by default accelerators round its products' factors."""
    if dtype == jnp.float32:
        return jax.lax.Precision.HIGHEST
    return jax.lax.Precision.DEFAULT


def _write(slots: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """`slots` (B, S, ...) with `new` (B, T, ...) from slot `start` on."""
    zeros = (jnp.zeros_like(start),) * (slots.ndim - 2)
    return jax.lax.dynamic_update_slice(
        slots, new, (jnp.zeros_like(start), start, *zeros)
    )
