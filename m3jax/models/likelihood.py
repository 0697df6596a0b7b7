"""Log-likelihoods of given tokens, without ever holding the logits of a whole batch."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from m3jax.models.config import Config
from m3jax.models.decoder import head, hidden_states
from m3jax.models.layers import Parameters, positions_of

_ROWS = 256  # tokens whose logits are held at a time


class TokenScores(NamedTuple):
    """How well the model foresees each token; (B, T − 1), that of token t + 1 at t.

    Attributes:
      log_likelihood: float32, natural logarithm.
      greedy: bool, no token was likelier.
    """

    log_likelihood: jax.Array
    greedy: jax.Array


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def token_scores(
    parameters: Parameters,
    tokens: jax.Array,
    valid: jax.Array,
    *,
    config: Config,
    dtype: Any = None,
) -> TokenScores:
    """log p(tokens[:, t + 1] | tokens[:, : t + 1]); differentiable in the parameters.

    Args:
      parameters: the pytree of the checkpoint.
      tokens: (B, T) int32.
      valid: (B, T) bool, False for padding, whose scores mean nothing.
      config, dtype: as for `decoder.forward`.
    """
    batch, length = tokens.shape
    x, _ = hidden_states(
        parameters, tokens, positions_of(valid), config=config, dtype=dtype
    )
    x = x[:, :-1].reshape(batch * (length - 1), -1)
    targets = tokens[:, 1:].reshape(-1)
    rows = min(_ROWS, len(targets))
    missing = -len(targets) % rows
    x = jnp.pad(x, ((0, missing), (0, 0))).reshape(-1, rows, x.shape[-1])
    targets = jnp.pad(targets, (0, missing)).reshape(-1, rows)

    @jax.checkpoint  # a gradient would keep all logits otherwise
    def scores(block: tuple[jax.Array, jax.Array]) -> TokenScores:
        x, target = block
        logits = head(parameters, x, config=config)  # (rows, V)
        own = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        total = jax.nn.logsumexp(logits, axis=-1)
        return TokenScores(own - total, own >= jnp.max(logits, axis=-1))

    scored = jax.lax.map(scores, (x, targets))
    return jax.tree.map(
        lambda a: a.reshape(-1)[: batch * (length - 1)].reshape(batch, length - 1),
        scored,
    )
