"""The Fisher information of a model on the examples of tasks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from m3jax.measuring.information import squared_gradients, zeros_like
from m3jax.measuring.texts import Batch
from m3jax.models.config import Config
from m3jax.models.decoder import forward
from m3jax.models.likelihood import token_scores

_GRADIENTS = 256 << 20  # bytes of the gradients that are held at a time

State = dict[str, Any]
Parameters = Mapping[str, Any]


def rows_at_once(parameters: Any) -> int:
    """Examples whose gradients are made together, a power of two."""
    size = sum(4 * leaf.size for leaf in jax.tree.leaves(parameters))
    return 1 << max(0, (_GRADIENTS // max(size, 1)).bit_length() - 1)


@functools.partial(
    jax.jit,
    static_argnames=("config", "kind", "samples", "is_choice", "positions", "at_once"),
    donate_argnums=0,
)
def add(
    total: Any,
    parameters: Parameters,
    batch: Batch,
    key: jax.Array,
    *,
    config: Config,
    kind: str,
    samples: int,
    is_choice: bool,
    positions: int,
    at_once: int,
) -> Any:
    """total + Σ over a batch's examples of Σ_c q_c (∂s_c)².

    Of a choice task c is a choice and s_c the log-likelihood of its completion, divided
    by its length as the task says; q is softmax(s) (``exact``), the shares of draws
    from it (``sampled``), or 1 for the right one (``empirical``). Of other tasks it is

    - ``exact``: Σ over the completion's tokens of Σ_v p_v (∂ log p_v)², over the whole
      vocabulary: so many backward passes a token.
    - ``sampled``: the mean over draws of (∂ Σ_t log p(y_t))², each y_t drawn from the
      model's own distribution behind the given tokens. Its expectation is the exact
      one, since the gradients of different tokens are uncorrelated; one backward pass
      a draw.
    - ``empirical``: (∂ log p(completion))², the gradient at the data's own answer.

    Args:
      total: as of `zeros_like`; its memory is taken over.
      parameters: float32 leaves alone are differentiated, all of them here.
      batch: of one kind of task.
      key: for ``sampled``; example i draws with ``fold_in(key, i)``.
      config: of the model.
      kind, samples: see above.
      is_choice: the completions are the classes.
      positions: the most tokens that a completion of the batch has.
      at_once: examples whose gradients are made together; divides the rows.
    """
    options: dict[str, Any] = {"kind": kind, "samples": samples, "config": config}

    def of_example(example: Batch) -> Any:
        own = jax.random.fold_in(key, example.index)
        scores, classes = (
            _choices(example, own, **options)
            if is_choice
            else _tokens(example, own, positions=positions, **options)
        )
        real = example.index >= 0

        def counted(values: jax.Array) -> tuple[jax.Array, jax.Array]:
            places, shares = classes(values)
            return places, jnp.where(real, shares, jnp.zeros((), shares.dtype))

        return squared_gradients(scores, parameters, counted, zeros_like(parameters))

    def of_group(total: Any, group: Batch) -> tuple[Any, None]:
        found = jax.vmap(of_example)(group)
        return jax.tree.map(lambda t, f: t + jnp.sum(f, axis=0), total, found), None

    groups = jax.tree.map(lambda x: x.reshape(-1, at_once, *x.shape[1:]), batch)
    total, _ = jax.lax.scan(of_group, total, groups)
    return total


Scores = Callable[[Parameters], jax.Array]
Classes = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def _choices(
    example: Batch, key: jax.Array, *, kind: str, samples: int, config: Config
) -> tuple[Scores, Classes]:
    """Scores of the choices, (C,), and which of them count how much."""
    count = example.tokens.shape[0]

    def scores(parameters: Parameters) -> jax.Array:
        found = token_scores(
            parameters, example.tokens, example.valid, config=config
        ).log_likelihood
        return _weighted(found, example.weights)

    def classes(values: jax.Array) -> tuple[jax.Array, jax.Array]:
        every = jnp.arange(count)
        if kind == "empirical":
            return example.correct[None], jnp.ones(1, values.dtype)
        if kind == "exact":
            return every, jax.nn.softmax(values)
        drawn = jax.random.categorical(key, values, shape=(samples,))
        counts = jnp.bincount(drawn, length=count).astype(values.dtype)
        return every, counts / jnp.asarray(samples, values.dtype)

    return scores, classes


def _tokens(
    example: Batch,
    key: jax.Array,
    *,
    kind: str,
    samples: int,
    config: Config,
    positions: int,
) -> tuple[Scores, Classes]:
    """Scores of a completion, of draws in its place, or of every token at its places.

    The last are (positions · V,), those of places that are none with a share of 0.
    """
    tokens, valid, weights = example.tokens, example.valid, example.weights[0]

    def log_probabilities(parameters: Parameters) -> jax.Array:
        logits = forward(parameters, tokens, config=config, valid=valid)[0, :-1]
        return jax.nn.log_softmax(logits)  # (T - 1, V)

    def all_alike(values: jax.Array) -> tuple[jax.Array, jax.Array]:
        share = jnp.full(len(values), 1 / len(values), values.dtype)
        return jnp.arange(len(values)), share

    if kind == "empirical":

        def of_answer(parameters: Parameters) -> jax.Array:
            found = token_scores(parameters, tokens, valid, config=config)
            return _weighted(found.log_likelihood, example.weights)

        return of_answer, all_alike
    if kind == "sampled":

        def of_draws(parameters: Parameters) -> jax.Array:
            found = log_probabilities(parameters)
            drawn = jax.random.categorical(
                key, jax.lax.stop_gradient(found), shape=(samples, len(found))
            )
            own = jnp.take_along_axis(found[None], drawn[..., None], axis=-1)[..., 0]
            return _weighted(own, weights[None])

        return of_draws, all_alike
    # Stable: the places of the completion come first, in order.
    places = jnp.argsort(weights <= 0, stable=True)[:positions]

    def of_all(parameters: Parameters) -> jax.Array:
        return log_probabilities(parameters)[places].reshape(-1)

    def likely(values: jax.Array) -> tuple[jax.Array, jax.Array]:
        real = jnp.repeat(weights[places] > 0, len(values) // len(places))
        shares = jnp.where(real, jnp.exp(values), jnp.zeros((), values.dtype))
        return jnp.arange(len(values)), shares

    return of_all, likely


def _weighted(log_likelihoods: jax.Array, weights: jax.Array) -> jax.Array:
    """Σ_t w_t ℓ_t; what weighs 0 may be anything, as that of padding is."""
    zero = jnp.zeros((), log_likelihoods.dtype)
    return jnp.sum(jnp.where(weights > 0, log_likelihoods * weights, zero), axis=-1)
