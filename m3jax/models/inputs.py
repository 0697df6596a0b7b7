"""What goes into each linear layer of a forward pass."""

from __future__ import annotations

from typing import Any

import jax

from m3jax.models.config import Config
from m3jax.models.decoder import hidden_states
from m3jax.models.layers import OBSERVE, Parameters, positions_of


def layer_inputs(
    parameters: Parameters, tokens: jax.Array, valid: jax.Array, *, config: Config
) -> dict[str, jax.Array]:
    """The inputs of each linear weight (out, in), by the weight's name, (B, T, in).

    Those of the head are the last hidden states, where it is a tensor of its own. What
    is not multiplied as x · weightᵀ has none: embeddings, and all of GPT-2, whose
    weights are (in, out).

    Args:
      parameters: the pytree of the checkpoint.
      tokens: (B, T) int32.
      valid: (B, T) bool; the inputs at padding mean nothing.
      config: of the model.
    """
    found: dict[str, jax.Array] = {}

    def watched(part: Any, name: str) -> Any:
        if not isinstance(part, dict):
            return part
        own = {key: watched(value, f"{name}{key}.") for key, value in part.items()}
        if getattr(part.get("weight"), "ndim", 0) == 2:
            own[OBSERVE] = lambda x: found.setdefault(f"{name}weight", x)
        return own

    x, _ = hidden_states(
        watched(parameters, ""), tokens, positions_of(valid), config=config
    )
    if "lm_head" in parameters:
        found["lm_head.weight"] = x
    return found
