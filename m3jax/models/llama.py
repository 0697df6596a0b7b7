"""The decoder of the Llama family, as pure functions of a checkpoint's own pytree.

Llama 2 and 3, SmolLM2, Mistral, Qwen2, 2.5 and 3. Letters of shapes: see `layers`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from m3jax.models.config import Architecture
from m3jax.models.layers import Attention, Cache, Parameters, along_last, linear
from m3jax.models.llama_config import LlamaConfig, read_config
from m3jax.models.rope import rotate


def parameter_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor but the head."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    linear = {  # output, input, bias
        "self_attn.q_proj": (queries, hidden, config.qkv_bias),
        "self_attn.k_proj": (keys, hidden, config.qkv_bias),
        "self_attn.v_proj": (keys, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, queries, config.output_bias),
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if config.qk_norm:
        norms |= {f"self_attn.{n}_norm": config.head_dim for n in "qk"}
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden)
    }
    for i in range(config.num_layers):
        prefix = f"model.layers.{i}"
        for name, (rows, columns, bias) in linear.items():
            shapes[f"{prefix}.{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}.{name}.bias"] = (rows,)
        for name, size in norms.items():
            shapes[f"{prefix}.{name}.weight"] = (size,)
    shapes["model.norm.weight"] = (hidden,)
    return shapes


def embedding(parameters: Parameters) -> jax.Array:
    """(V, H)."""
    return parameters["model"]["embed_tokens"]["weight"]


def hidden_states(
    parameters: Parameters,
    tokens: jax.Array,
    positions: jax.Array,
    cache: Cache | None,
    config: LlamaConfig,
    dtype: Any,
) -> tuple[jax.Array, Cache]:
    """As `decoder.hidden_states`."""
    attend = Attention(positions, cache)
    for x in _stream(parameters, tokens, positions, attend, config, dtype):
        last = x
    return _norm(parameters["model"]["norm"], last, config), attend.cache


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def layer_inputs(
    parameters: Parameters,
    tokens: jax.Array,
    positions: jax.Array,
    *,
    config: LlamaConfig,
    dtype: Any,
) -> jax.Array:
    """The hidden states that enter each layer, (layers, B, T, H); arguments as those
    of `decoder.hidden_states`."""
    attend = Attention(positions, None)
    states = list(_stream(parameters, tokens, positions, attend, config, dtype))
    return jnp.stack(states[:-1])


def _stream(
    parameters: Parameters,
    tokens: jax.Array,
    positions: jax.Array,
    attend: Attention,
    config: LlamaConfig,
    dtype: Any,
) -> Iterator[jax.Array]:
    """The residual stream, (B, T, H): the embedding, then after each layer."""
    model = parameters["model"]
    frequencies = config.rope.frequencies(config.head_dim)
    x = embedding(parameters)[tokens].astype(dtype)  # (B, T, H)
    yield x
    for i, window in enumerate(config.windows):
        layer = model["layers"][str(i)]
        normed = _norm(layer["input_layernorm"], x, config)
        q, k, v = _queries_keys_values(layer["self_attn"], normed, config)
        q, k = rotate(q, positions, frequencies), rotate(k, positions, frequencies)
        x = x + linear(layer["self_attn"]["o_proj"], attend(q, k, v, window))
        normed = _norm(layer["post_attention_layernorm"], x, config)
        x = x + _feed_forward(layer["mlp"], normed)
        yield x


def _queries_keys_values(
    weights: Parameters, x: jax.Array, config: LlamaConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(B, T, H) to (B, T, K G, D), (B, T, K, D) and (B, T, K, D)."""
    split = (*x.shape[:2], -1, config.head_dim)
    q, k, v = (linear(weights[f"{n}_proj"], x).reshape(split) for n in "qkv")
    if config.qk_norm:
        q = _norm(weights["q_norm"], q, config)
        k = _norm(weights["k_norm"], k, config)
    return q, k, v


def _feed_forward(weights: Parameters, x: jax.Array) -> jax.Array:
    gate = jax.nn.silu(linear(weights["gate_proj"], x))
    return linear(weights["down_proj"], gate * linear(weights["up_proj"], x))


def _norm(weights: Parameters, x: jax.Array, config: LlamaConfig) -> jax.Array:
    """Root-mean-square normalisation over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(mean_square + config.rms_norm_eps)
    return (wide * along_last(weights["weight"], wide)).astype(x.dtype)


LLAMA = Architecture(
    read_config=read_config,
    parameter_shapes=parameter_shapes,
    embedding=embedding,
    hidden_states=hidden_states,
    buffers=re.compile(r".*\.rotary_emb\.inv_freq"),
)
