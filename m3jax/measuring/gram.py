"""Second moments of what goes into each linear layer, on the examples of tasks."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from m3jax.measuring.moments import second_moment
from m3jax.measuring.texts import Batch
from m3jax.models.config import Config
from m3jax.models.inputs import layer_inputs

Moments = dict[str, jax.Array]


@functools.partial(jax.jit, static_argnames="config", donate_argnums=0)
def add(
    total: Moments, parameters: Mapping[str, Any], batch: Batch, *, config: Config
) -> Moments:
    """total + Σ x xᵀ over a batch's tokens, for each linear weight with inputs x.

    Of each question it is the prompt with the right completion, which is tokenised and
    padded; padding does not count.

    Args:
      total: (in, in) by the weight's name; its memory is taken over.
      parameters: of the model, float32.
      batch: of questions.
      config: of the model.
    """
    tokens, valid = right(batch)
    found = layer_inputs(parameters, tokens, valid, config=config)
    return {
        name: own + second_moment(jnp.where(valid[..., None], found[name], 0.0))
        for name, own in total.items()
    }


def right(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Tokens (R, T) with the right completion, and which of them there are."""
    rows = jnp.arange(len(batch.correct))
    return batch.tokens[rows, batch.correct], batch.valid[rows, batch.correct]


def start(parameters: Mapping[str, Any], config: Config) -> Moments:
    """The moments of no tokens: zeros for each linear weight."""
    one = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    valid = jax.ShapeDtypeStruct((1, 2), bool)
    inputs = jax.eval_shape(
        functools.partial(layer_inputs, config=config), parameters, one, valid
    )
    return {
        name: jnp.zeros((x.shape[-1], x.shape[-1]), jnp.float32)
        for name, x in inputs.items()
    }
