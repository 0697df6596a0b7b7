"""Learned soups: softmax weights of models for each tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from m3jax.checkpoints.formats import tree
from m3jax.learn.descent import Learned, descend
from m3jax.learn.pytrees import model_names, stack, weighted_sum, wide

IGNORED = -100  # a label that is not one, PyTorch's


def learned_soup(
    models: Sequence[Any],
    apply_fn: Callable[[Any, Any], jax.Array],
    batches: Iterable[tuple[Any, Any]],
    *,
    tx: Any = None,
) -> Learned:
    """Learns α of Σ_k softmax(α)_k θ_k, one α (K,) per tensor, on labelled inputs.

    α starts at 1/K, so the soup starts as the mean. The loss of a step is the mean
    cross-entropy of β · apply_fn(params, inputs), where the temperature β starts at 1,
    is learned too and is no part of the merged model.

    Learned soup of arXiv 2203.05482, as AlphaWrapper of mlfoundations/model-soups by
    layer; labels of −100 are left out (ours).

    Args:
      models: K pytrees with the same leaves; the result has the dtypes of the first.
      apply_fn: (params, inputs) -> logits (..., C).
      batches: one pair a step, of inputs and labels (...) of integers.
      tx: an optax transformation; AdamW at 0.05 without decay by default, as in the
        release.

    Returns:
      The result; `coefficients` is {"alpha": a pytree of (K,), "beta": ()}.

    Raises:
      CheckpointError: the pytrees do not fit each other.
    """
    import optax

    own = stack(models, model_names(models))

    def params(coefficients: Any, arrays: Any) -> Any:
        named = tree.flatten(coefficients["alpha"])[0]
        return own.params(
            {
                name: weighted_sum(jax.nn.softmax(named[name]), array)
                for name, array in arrays.items()
            }
        )

    def loss(merged: Any, batch: Any, coefficients: Any) -> jax.Array:
        inputs, labels = batch
        logits = apply_fn(merged, inputs)
        return cross_entropy(logits * coefficients["beta"].astype(logits.dtype), labels)

    start = {
        "alpha": own.filled(
            lambda _: jnp.full(len(models), 1 / len(models), "float32")
        ),
        "beta": jnp.ones((), jnp.float32),
    }
    tx = optax.adamw(0.05, weight_decay=0.0) if tx is None else tx
    return descend(params, loss, start, batches, tx, own.arrays)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean of −log softmax(logits)[label] where the label is not −100."""
    counted = jnp.sum((labels != IGNORED).astype(wide(logits)))
    return -jnp.sum(log_likelihoods(logits, labels)) / jnp.maximum(counted, 1)


def log_likelihoods(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """log softmax(logits)[label]; 0 where the label is −100."""
    logs = jax.nn.log_softmax(logits.astype(wide(logits)))
    known = labels != IGNORED
    places = jnp.where(known, labels, jnp.zeros_like(labels))
    own = jnp.take_along_axis(logs, places[..., None], axis=-1)[..., 0]
    return jnp.where(known, own, jnp.zeros_like(own))
