"""Decoders, as pure functions of a checkpoint's own pytree.

The parameters are what `m3jax.load` and `m3jax.merge_params` give: nested dicts whose
keys are the checkpoint's names split at ".", ``parameters["model"]["layers"]["0"]...``.
Nothing is renamed, stacked or copied, so that a merge is a model as it stands.
Letters of shapes: see `layers`.

    >>> logits = forward(parameters, tokens, config=config)

To add an architecture, write its file and name it here.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from m3jax.models.config import Architecture, Config, Fields
from m3jax.models.gpt2 import GPT2
from m3jax.models.layers import Cache, Parameters, positions_of, product
from m3jax.models.llama import LLAMA

ARCHITECTURES: dict[str, Architecture] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gpt2": GPT2,
}


def read_config(config: Mapping[str, Any], name: str = "config.json") -> Config:
    """Reads the content of a config.json.

    Args:
      config: the content.
      name: of the file, for errors.

    Raises:
      CheckpointError: an attribute is missing, wrong or unknown; it is named.
    """
    fields = Fields(config, name)
    family = fields.choice("model_type", ARCHITECTURES)
    return ARCHITECTURES[family].read_config(fields, family)


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
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
      parameters, config, dtype: as for `forward`.
      tokens: (B, T) int32.
      positions: (B, T) int32, from `positions_of`, or counting on from the cache's.
      cache: of the tokens before these; None: there are none.

    Returns:
      (B, T, H) of `dtype`, normalised, and the cache with these tokens; without one
      before, a cache that has no slots left.
    """
    dtype = compute_dtype(parameters, config) if dtype is None else dtype
    run = ARCHITECTURES[config.family].hidden_states
    return run(parameters, tokens, positions, cache, config, dtype)


def head(parameters: Parameters, x: jax.Array, *, config: Config) -> jax.Array:
    """Logits, float32, of hidden states (..., H).

    Like transformers, it uses `lm_head` where the checkpoint has one, even if
    config.json calls it tied: a merge may have told the two apart.
    """
    if "lm_head" in parameters:
        weight = parameters["lm_head"]["weight"]
    else:
        assert config.tie_word_embeddings
        weight = embedding(parameters, config)
    return product(x, weight, jnp.float32)  # (..., V)


def embedding(parameters: Parameters, config: Config) -> jax.Array:
    """The embedding of the tokens, (V, H)."""
    return ARCHITECTURES[config.family].embedding(parameters)


def compute_dtype(parameters: Parameters, config: Config) -> Any:
    """bfloat16 if the embedding is, otherwise float32."""
    dtype = embedding(parameters, config).dtype
    return jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor; `lm_head.weight` only where it is not tied."""
    shapes = ARCHITECTURES[config.family].parameter_shapes(config)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes
