"""Continues a batch of prompts, greedily or by sampling, with a static cache."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from m3jax.models.config import Config
from m3jax.models.decoder import compute_dtype, head, hidden_states
from m3jax.models.layers import Cache, Parameters, empty_cache, positions_of


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: sample among the k likeliest only.
      top_p: sample among the likeliest only, as many as reach probability p together.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} needs to be 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} needs to be 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} needs 0 < top_p <= 1")


class Generated(NamedTuple):
    """Continuations.

    Attributes:
      tokens: (B, N) int32; 0 behind a row's end.
      lengths: (B,) int32, tokens of each row, its stop token included.
    """

    tokens: jax.Array
    lengths: jax.Array


class _State(NamedTuple):
    step: jax.Array  # tokens recorded
    token: jax.Array  # (B,), chosen and not recorded yet
    done: jax.Array  # (B,) bool
    out: jax.Array  # (B, N)
    counts: jax.Array  # (B,)
    cache: Cache


@functools.partial(
    jax.jit,
    static_argnames=("config", "max_new_tokens", "sampling", "stop_tokens", "dtype"),
)
def generate(
    parameters: Parameters,
    tokens: jax.Array,
    valid: jax.Array,
    *,
    config: Config,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...] = (),
    sampling: Sampling | None = None,
    key: jax.Array | None = None,
    dtype: Any = None,
) -> Generated:
    """Continues every row until it gives a stop token or has its number of tokens.

    A row's continuation depends on nothing but its prompt and its key: padding on
    either side, and the other rows, change nothing.

    Args:
      parameters: the pytree of the checkpoint.
      tokens: (B, P) int32 prompts.
      valid: (B, P) bool, False for padding. A row that is all padding gives nothing.
      config: of the model.
      max_new_tokens: N, at most that many for each row; behind its prompt they need
        to fit into `config.max_position_embeddings`.
      stop_tokens: end a row.
      sampling: the default is greedy.
      key: for sampling; one, of which row i takes ``fold_in(key, i)``, or one per row.
      dtype: as for `decoder.forward`.
    """
    sampling = sampling or Sampling()
    batch, prompt_slots = tokens.shape
    keys = _row_keys(key, batch, sampling)
    dtype = compute_dtype(parameters, config) if dtype is None else dtype
    positions = positions_of(valid)
    # The last token is not attended to by any other.
    cache = empty_cache(config, batch, prompt_slots + max_new_tokens - 1, dtype)
    x, cache = hidden_states(
        parameters, tokens, positions, config=config, cache=cache, dtype=dtype
    )
    length = jnp.max(positions, axis=1) + 1  # (B,)
    last = jnp.argmax(positions, axis=1)  # (B,), the slot of the last token
    x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]  # (B, H)
    first = _choose(head(parameters, x, config=config), keys, 0, sampling)

    def is_stop(token: jax.Array) -> jax.Array:
        return jnp.isin(token, jnp.array(stop_tokens, jnp.int32))

    def record(state: _State) -> _State:
        column = jnp.where(state.done, 0, state.token)[:, None]
        zero = jnp.zeros_like(state.step)
        return state._replace(
            out=jax.lax.dynamic_update_slice(state.out, column, (zero, state.step)),
            counts=state.counts + (~state.done).astype(jnp.int32),
            done=state.done | is_stop(state.token),
            step=state.step + 1,
        )

    def advance(state: _State) -> _State:
        position = length + state.step - 1
        x, cache = hidden_states(
            parameters,
            state.token[:, None],
            position[:, None],
            config=config,
            cache=state.cache,
            dtype=dtype,
        )
        logits = head(parameters, x[:, 0], config=config)
        token = _choose(logits, keys, state.step, sampling)
        return record(state._replace(token=token, cache=cache))

    def unfinished(state: _State) -> jax.Array:
        return (state.step < max_new_tokens) & ~jnp.all(state.done)

    state = _State(
        step=jnp.zeros((), jnp.int32),
        token=first,
        done=length == 0,
        out=jnp.zeros((batch, max_new_tokens), jnp.int32),
        counts=jnp.zeros(batch, jnp.int32),
        cache=cache,
    )
    state = jax.lax.while_loop(unfinished, advance, record(state))
    return Generated(state.out, state.counts)


def _row_keys(
    key: jax.Array | None, batch: int, sampling: Sampling
) -> jax.Array | None:
    if sampling.temperature == 0:
        return None
    if key is None:
        raise ValueError(f"temperature={sampling.temperature} needs a key")
    if key.ndim == 1:
        return key
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch))


def _choose(
    logits: jax.Array, keys: jax.Array | None, step: Any, sampling: Sampling
) -> jax.Array:
    """The next token of each row: (B, V) to (B,) int32."""
    if keys is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = restrict(logits / sampling.temperature, sampling)
    own = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)
    return jax.vmap(jax.random.categorical)(own, logits).astype(jnp.int32)


def restrict(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """−inf in the place of the logits (B, V) that `top_k` and `top_p` rule out."""
    if sampling.top_k is not None:
        top, _ = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))
        logits = jnp.where(logits < top[:, -1:], -jnp.inf, logits)
    if sampling.top_p is not None:
        ordered = -jnp.sort(-logits, axis=-1)
        shares = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(shares, axis=-1) - shares  # of the likelier ones together
        kept = jnp.where(before < sampling.top_p, ordered, jnp.inf)
        logits = jnp.where(
            logits < jnp.min(kept, axis=-1, keepdims=True), -jnp.inf, logits
        )
    return logits
