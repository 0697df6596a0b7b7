"""The decoder of the Llama family, as pure functions of a checkpoint's own pytree.

The parameters are what `m3jax.load` and `m3jax.merge_params` give: nested dicts whose
keys are the checkpoint's names split at ".", ``parameters["model"]["layers"]["0"]...``.
Nothing is renamed, stacked or copied, so that a merge is a model as it stands.

Letters of shapes: B sequences, T tokens, S slots that are attended to, H width, D
channels of a head, K heads of keys and values, G queries to each of them, V vocabulary.

    >>> run = jax.jit(forward, static_argnames="config")
    >>> logits = run(parameters, tokens, config=config)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.models.config import Config
from m3jax.models.rope import rotate

Parameters = Mapping[str, Any]

PADDING = -1  # the position of a token that is not there
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


def forward(
    parameters: Parameters,
    tokens: jax.Array,
    *,
    config: Config,
    valid: jax.Array | None = None,
    dtype: Any = None,
) -> jax.Array:
    """The logits of every next token. Differentiable in the parameters.

    Args:
      parameters: the pytree of the checkpoint.
      tokens: (B, T) int32.
      config: of the model.
      valid: (B, T) bool, False for padding, which changes nothing; None: all valid.
      dtype: float32 or bfloat16, of the matrix products; None: `compute_dtype`.

    Returns:
      (B, T, V) float32.
    """
    if valid is None:
        valid = jnp.ones(tokens.shape, bool)
    x, _ = hidden_states(
        parameters, tokens, positions_of(valid), config=config, dtype=dtype
    )
    return head(parameters, x, config=config)


def hidden_states(
    parameters: Parameters,
    tokens: jax.Array,
    positions: jax.Array,
    *,
    config: Config,
    cache: Cache | None = None,
    dtype: Any = None,
) -> tuple[jax.Array, Cache]:
    """All of the decoder but its head.

    Args:
      tokens: (B, T) int32.
      positions: (B, T) int32, from `positions_of`, or counting on from the cache's.
      cache: of the tokens before these; None: there are none.

    Returns:
      (B, T, H) of `dtype`, normalised, and the cache with these tokens; without one
      before, a cache that has no slots left.
    """
    dtype = compute_dtype(parameters) if dtype is None else dtype
    model = parameters["model"]
    frequencies = config.rope.frequencies(config.head_dim)
    seen = positions  # (B, S): positions of what is attended to
    if cache is not None:
        seen = _write(cache.positions, positions, cache.filled)
    keys, values = [], []
    x = model["embed_tokens"]["weight"][tokens].astype(dtype)  # (B, T, H)
    for i, window in enumerate(config.windows):
        layer = model["layers"][str(i)]
        normed = _norm(layer["input_layernorm"], x, config)
        q, k, v = _queries_keys_values(layer["self_attn"], normed, config)
        q, k = rotate(q, positions, frequencies), rotate(k, positions, frequencies)
        if cache is not None:
            k = _write(cache.keys[i], k, cache.filled)  # (B, S, K, D)
            v = _write(cache.values[i], v, cache.filled)
        keys.append(k)
        values.append(v)
        mixed = _attend(q, k, v, positions, seen, window)  # (B, T, K G D)
        x = x + _linear(layer["self_attn"]["o_proj"], mixed)
        normed = _norm(layer["post_attention_layernorm"], x, config)
        x = x + _feed_forward(layer["mlp"], normed)
    x = _norm(model["norm"], x, config)
    filled = jnp.int32(tokens.shape[1]) + (0 if cache is None else cache.filled)
    return x, Cache(tuple(keys), tuple(values), seen, filled)


def head(parameters: Parameters, x: jax.Array, *, config: Config) -> jax.Array:
    """Logits, float32, of hidden states (..., H).

    Like transformers, it uses `lm_head` where the checkpoint has one, even if
    config.json calls it tied: a merge may have told the two apart.
    """
    if "lm_head" in parameters:
        weight = parameters["lm_head"]["weight"]
    else:
        assert config.tie_word_embeddings
        weight = parameters["model"]["embed_tokens"]["weight"]
    return _product(x, weight, jnp.float32)  # (..., V)


def compute_dtype(parameters: Parameters) -> Any:
    """bfloat16 if the embedding is, otherwise float32."""
    dtype = parameters["model"]["embed_tokens"]["weight"].dtype
    return jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32


def _queries_keys_values(
    weights: Parameters, x: jax.Array, config: Config
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(B, T, H) to (B, T, K G, D), (B, T, K, D) and (B, T, K, D)."""
    split = (*x.shape[:2], -1, config.head_dim)
    q, k, v = (_linear(weights[f"{n}_proj"], x).reshape(split) for n in "qkv")
    if config.qk_norm:
        q = _norm(weights["q_norm"], q, config)
        k = _norm(weights["k_norm"], k, config)
    return q, k, v


def _visible(positions: jax.Array, seen: jax.Array, window: int | None) -> jax.Array:
    """Which slots a token attends to: those before it, and itself: (B, T, S)."""
    distance = positions[:, :, None] - seen[:, None, :]
    visible = (distance >= 0) & (seen != PADDING)[:, None, :]
    return visible if window is None else visible & (distance < window)


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


def _feed_forward(weights: Parameters, x: jax.Array) -> jax.Array:
    gate = jax.nn.silu(_linear(weights["gate_proj"], x))
    return _linear(weights["down_proj"], gate * _linear(weights["up_proj"], x))


def _norm(weights: Parameters, x: jax.Array, config: Config) -> jax.Array:
    """Root-mean-square normalisation over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(mean_square + config.rms_norm_eps)
    scale = weights["weight"].astype(jnp.float32)
    return (wide * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def _linear(weights: Parameters, x: jax.Array) -> jax.Array:
    y = _product(x, weights["weight"], x.dtype)
    if "bias" in weights:
        y = y + weights["bias"].astype(x.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
    return y


def _product(x: jax.Array, weight: jax.Array, dtype: Any) -> jax.Array:
    """x · weightᵀ with a weight as checkpoints hold it, (out, in)."""
    return jnp.einsum(
        "...i,oi->...o",
        x,
        weight.astype(x.dtype),
        precision=_precision(x.dtype),
        preferred_element_type=dtype,
    )


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
