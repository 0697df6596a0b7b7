"""What a decoder is: a config, the names and shapes of its tensors, a forward pass."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax

from m3jax.models.config import Config, Fields


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A decoder, as pure functions of a checkpoint's own pytree.

    Attributes:
      read_config: (fields of config.json, model_type) -> its `Config`; refuses what it
        does not know.
      parameter_shapes: config -> shape of every tensor but ``lm_head.weight``, by name.
      embedding: parameters -> (V, H).
      hidden_states: (parameters, tokens, positions, cache, config, dtype) -> normalised
        hidden states and the cache with these tokens; see `decoder.hidden_states`.
      buffers: names of tensors that some checkpoints carry and that follow from the
        config.
      prefix: that some checkpoints leave out of all names.
    """

    read_config: Callable[[Fields, str], Config]
    parameter_shapes: Callable[[Any], dict[str, tuple[int, ...]]]
    embedding: Callable[[Any], jax.Array]
    hidden_states: Callable[..., Any]
    buffers: re.Pattern[str]
    prefix: str = ""
