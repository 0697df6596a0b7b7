"""GPT-2, as pure functions of a checkpoint's own pytree.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019;
computes what transformers does. Checkpoints name their tensors ``transformer.h.0...``,
the original ones ``h.0...``; both are read as they are. For letters of shapes, see
`layers`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp

from m3jax.models.config import Architecture, Config, Fields
from m3jax.models.layers import Attention, Cache, Parameters, along_last, product

_ACTIVATIONS = {
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}
# Any other value is another model.
_FIXED = {
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "tie_encoder_decoder": False,
}
# About training, other tasks, or how a product is rounded.
_WITHOUT_EFFECT = """
    attn_pdrop embd_pdrop n_ctx reorder_and_upcast_attn resid_pdrop
    summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpt2Config(Config):
    """The shape of a GPT-2 and its constants.

    Attributes:
      inner_size: width of the feed-forward layers.
      activation: between their two products; one of ``gelu_new``,
        ``gelu_pytorch_tanh``, which is the same, and ``gelu``.
      layer_norm_epsilon: added to the variance.
    """

    inner_size: int
    activation: str
    layer_norm_epsilon: float


def read_config(fields: Fields, family: str) -> Gpt2Config:
    """Reads the content of a config.json.

    Raises:
      CheckpointError: an attribute is missing, wrong or unknown; it is named.
    """
    fields.fixed(_FIXED)
    hidden, heads = fields.count("n_embd"), fields.count("n_head")
    config = Gpt2Config(
        family=family,
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden,
        inner_size=fields.count("n_inner", 4 * hidden, null=4 * hidden),
        num_layers=fields.layers("n_layer"),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=fields.count("n_positions"),
        activation=fields.choice("activation_function", _ACTIVATIONS, "gelu_new"),
        layer_norm_epsilon=fields.positive("layer_norm_epsilon", 1e-5),
        tie_word_embeddings=fields.flag("tie_word_embeddings", True),
    )
    fields.end(_WITHOUT_EFFECT)
    if hidden % heads:
        fields.refuse("n_head", heads, f"needs to divide n_embd, {hidden}")
    return config


def parameter_shapes(config: Gpt2Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor but the head."""
    hidden, inner = config.hidden_size, config.inner_size
    linear = {  # input, output: the other way round than in most models
        "attn.c_attn": (hidden, 3 * hidden),
        "attn.c_proj": (hidden, hidden),
        "mlp.c_fc": (hidden, inner),
        "mlp.c_proj": (inner, hidden),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (config.vocab_size, hidden),
        "transformer.wpe.weight": (config.max_position_embeddings, hidden),
    }
    for i in range(config.num_layers):
        prefix = f"transformer.h.{i}"
        for name, shape in linear.items():
            shapes[f"{prefix}.{name}.weight"] = shape
            shapes[f"{prefix}.{name}.bias"] = shape[1:]
        for name in ("ln_1", "ln_2"):
            shapes |= _norm_shapes(f"{prefix}.{name}", hidden)
    return shapes | _norm_shapes("transformer.ln_f", hidden)


def embedding(parameters: Parameters) -> jax.Array:
    """(V, H)."""
    return _body(parameters)["wte"]["weight"]


def hidden_states(
    parameters: Parameters,
    tokens: jax.Array,
    positions: jax.Array,
    cache: Cache | None,
    config: Gpt2Config,
    dtype: Any,
) -> tuple[jax.Array, Cache]:
    """As `decoder.hidden_states`; NaN for a text of more tokens than there are rows."""
    model = _body(parameters)
    attend = Attention(positions, cache)
    places = model["wpe"]["weight"].at[positions].get(mode="fill", fill_value=jnp.nan)
    x = embedding(parameters)[tokens].astype(dtype) + places.astype(dtype)  # (B, T, H)
    for i in range(config.num_layers):
        layer = model["h"][str(i)]
        attention, mlp = layer["attn"], layer["mlp"]
        mixed = _linear(attention["c_attn"], _norm(layer["ln_1"], x, config))
        q, k, v = (
            part.reshape(*x.shape[:2], -1, config.head_dim)  # (B, T, K, D)
            for part in jnp.split(mixed, 3, axis=-1)
        )
        x = x + _linear(attention["c_proj"], attend(q, k, v))
        inner = _linear(mlp["c_fc"], _norm(layer["ln_2"], x, config))
        x = x + _linear(mlp["c_proj"], _ACTIVATIONS[config.activation](inner))
    return _norm(model["ln_f"], x, config), attend.cache


def _body(parameters: Parameters) -> Parameters:
    """All but the head, wherever the checkpoint has it."""
    return parameters.get("transformer", parameters)


def _norm_shapes(name: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _linear(weights: Parameters, x: jax.Array) -> jax.Array:
    """x · weight + bias, with a weight (in, out)."""
    y = product(x, weights["weight"].T, x.dtype)
    return y + along_last(weights["bias"], y)


def _norm(weights: Parameters, x: jax.Array, config: Gpt2Config) -> jax.Array:
    """Layer normalisation over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(wide * wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(variance + config.layer_norm_epsilon)
    return (
        wide * along_last(weights["weight"], wide) + along_last(weights["bias"], wide)
    ).astype(x.dtype)


GPT2 = Architecture(
    read_config=read_config,
    parameter_shapes=parameter_shapes,
    embedding=embedding,
    hidden_states=hidden_states,
    # The causal mask, and what stands for −∞ in it.
    buffers=re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)"),
    prefix="transformer.",
)
