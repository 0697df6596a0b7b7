"""DAM: column-wise coefficients that make one model speak like each expert."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from m3jax.checkpoints.errors import shown
from m3jax.checkpoints.formats import tree
from m3jax.learn.pytrees import model_names, stack
from m3jax.search.pytrees import wide_dtype

TERMS = (
    "kl",
    "mse",
    "entropy",
    "similarity",
    "l1",
    "l2",
    "overlap",
    "weighted_overlap",
)
DEFAULTS: Mapping[str, float] = {"kl": 1.0, "similarity": 0.01}
NONLINEARITIES: Mapping[str | None, Callable[[jax.Array], jax.Array]] = {
    None: lambda x: x,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "relu": jax.nn.relu,
}


def dam_merge(
    coefficients: Any, models: Sequence[Any], *, nonlinearity: str | None = None
) -> Any:
    """Σ_k f(m_k) ⊙ θ_k, with coefficients m that broadcast against the stacked models.

    As arcee-ai/DAM (arXiv 2410.08371): m of a Linear is (K, 1, in), of an embedding
    (K, 1, dim), of a norm (K, dim), of a bias (K, 1). Start all at 1/K: the release
    starts biases at 1, which sums them.

    Args:
      coefficients: a pytree like the models'.
      models: K pytrees with the same leaves; the result has the dtypes of the first.
      nonlinearity: f: None, ``tanh``, ``sigmoid`` or ``relu``.

    Raises:
      ValueError: another f, or coefficients that lack a leaf or do not fit it.
      CheckpointError: the pytrees do not fit each other.
    """
    if nonlinearity not in NONLINEARITIES:
        known = ", ".join(map(repr, NONLINEARITIES))
        raise ValueError(f"nonlinearity={nonlinearity!r} needs one of {known}")
    own = stack(models, model_names(models))
    named = tree.flatten(coefficients)[0]
    merged = {}
    for name, arrays in own.arrays.items():
        m = named.get(name)
        if m is None or not _broadcasts(m.shape, arrays.shape):
            found = "missing" if m is None else m.shape
            raise ValueError(
                f"coefficients of {shown(name)} are {found}; they need a shape that "
                f"broadcasts against {arrays.shape}, {len(models)} models first"
            )
        factor = NONLINEARITIES[nonlinearity](m).astype(arrays.dtype)
        merged[name] = jnp.sum(factor * arrays, axis=0)
    return own.params(merged)


def dam_loss(
    coefficients: Any,
    models: Sequence[Any],
    apply_fn: Callable[[Any, Any], jax.Array],
    inputs: Sequence[Mapping[str, Any]],
    *,
    base: Any = None,
    temperature: float = 2.0,
    terms: Mapping[str, float] = DEFAULTS,
    nonlinearity: str | None = None,
    regularized: Sequence[str] | None = None,
    normalize: str = "tokens",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """How far the merged model is from each expert on the expert's own inputs.

    With z the merged model's logits, t expert k's (no gradient goes there), both 0
    where the mask is 0, N_k = Σ mask, q = softmax(z/T), p = softmax(t/T); summed over
    experts:

    - ``kl``: T²/N_k Σ p (log p − log q).
    - ``mse``: Σ_tokens mean_vocab (z − t)² / N_k.
    - ``entropy``: T² Σ −q log(q + 1e-9) mask / N_k.

    Of the raw m, summed over the leaves of `regularized`; pairs i < j:

    - ``similarity``: mean over pairs of cos(m_i, m_j), which pushes coefficients apart.
    - ``l1``, ``l2``: Σ_k ‖m_k‖_1, Σ_k ‖m_k‖_2; given together as ``l1_l2``.
    - ``overlap``: mean over pairs of Σ min(|m_i|, |m_j|).
    - ``weighted_overlap``: the same times sin²(2θ), θ the angle between the columns of
      τ_i and τ_j, over all linear weights: matrices with coefficients (K, 1, in) whose
      name does not say "embed" or "wte".

    As DAMTrainer.compute_loss of arcee-ai/DAM with ``normalize="reference"``, which
    divides ``kl`` by the batch size once more.

    Args:
      coefficients, models, nonlinearity: as for `dam_merge`.
      apply_fn: (params, inputs) -> logits (B, T, V).
      inputs: one dict per expert: what `apply_fn` reads, and ``"mask"`` (B, T).
      base: θ0, for ``weighted_overlap``.
      temperature: T.
      terms: the weight of each term that is wanted; the default is the release's.
      regularized: names of leaves; by default all but biases (the release: those that
        are trained, never biases).
      normalize: ``tokens`` or ``reference``.

    Returns:
      The loss and its parts, weighted, by name, with their sum as ``total``.

    Raises:
      ValueError: an unknown term or rule, or one that lacks its base.
    """
    if unknown := set(terms) - set(TERMS):
        raise ValueError(f"terms {sorted(unknown)} need to be of {', '.join(TERMS)}")
    if normalize not in ("tokens", "reference"):
        raise ValueError(f"normalize={normalize!r} needs 'tokens' or 'reference'")
    if base is None and "weighted_overlap" in terms:
        raise ValueError("the term weighted_overlap needs the base")
    if len(inputs) != len(models):
        raise ValueError(f"{len(inputs)} inputs need to be one for each {len(models)}")
    merged = dam_merge(coefficients, models, nonlinearity=nonlinearity)
    parts: dict[str, jax.Array] = {}

    def add(name: str, value: jax.Array) -> None:
        parts[name] = parts[name] + value if name in parts else value

    for model, own in zip(models, inputs, strict=True):
        model = jax.tree.map(jnp.asarray, model)  # `ids` do not index NumPy under jit
        found = of_expert(apply_fn(merged, own), apply_fn(model, own), own, temperature)
        if normalize == "reference":
            found["kl"] = found["kl"] / own["mask"].shape[0]
        for name, value in found.items():
            if name in terms:
                add(name, terms[name] * value)
    named = tree.flatten(coefficients)[0]
    if regularized is None:
        regularized = [name for name in named if name.rpartition(".")[2] != "bias"]
    if lacking := set(regularized) - set(named):
        raise ValueError(f"regularized {sorted(lacking)} are no leaves of coefficients")
    for name in regularized:
        for term, value in of_coefficients(named[name]).items():
            if term in terms:
                add("l1_l2" if term in ("l1", "l2") else term, terms[term] * value)
    if "weighted_overlap" in terms:
        weighted = _weighted_overlap(named, base, models)
        add("weighted_overlap", terms["weighted_overlap"] * weighted)
    total = sum(parts.values(), jnp.zeros((), jnp.float32))
    return total, {"total": total, **parts}


def _broadcasts(shape: tuple[int, ...], against: tuple[int, ...]) -> bool:
    """Whether it has as many axes, each 1 or as long, the first as long."""
    pairs = zip(shape[1:], against[1:], strict=False)
    same = len(shape) == len(against) and shape[0] == against[0]
    return same and all(own in (1, other) for own, other in pairs)


def of_expert(
    z: jax.Array, t: jax.Array, inputs: Mapping[str, Any], temperature: float
) -> dict[str, jax.Array]:
    """The terms of `dam_loss` that compare with one expert: kl, mse and entropy."""
    mask = inputs["mask"].astype(bool).astype(wide_dtype(z))
    tokens = jnp.maximum(jnp.sum(mask), 1)
    z = z.astype(mask.dtype) * mask[..., None]
    t = jax.lax.stop_gradient(t.astype(mask.dtype) * mask[..., None])
    own = jax.nn.log_softmax(z / temperature)
    others = jax.nn.log_softmax(t / temperature)
    probabilities = jnp.exp(own)
    entropies = -jnp.sum(probabilities * jnp.log(probabilities + 1e-9), axis=-1)
    return {
        "kl": temperature**2 * jnp.sum(jnp.exp(others) * (others - own)) / tokens,
        "mse": jnp.sum(jnp.mean(jnp.square(z - t), axis=-1)) / tokens,
        "entropy": temperature**2 * jnp.sum(entropies * mask) / tokens,
    }


def of_coefficients(m: jax.Array) -> dict[str, jax.Array]:
    """The terms of `dam_loss` that see the coefficients of one leaf, (K, ...)."""
    rows = list(m.reshape(len(m), -1))
    norms = [_norm(row) for row in rows]
    pairs = list(itertools.combinations(range(len(rows)), 2))
    return {
        "l1": jnp.sum(jnp.abs(m)),
        "l2": jnp.sum(jnp.stack(norms)),
        "similarity": _mean(
            jnp.sum(rows[i] * rows[j]) / jnp.maximum(norms[i] * norms[j], 1e-8)
            for i, j in pairs
        ),
        "overlap": _mean(_overlap(rows[i], rows[j]) for i, j in pairs),
    }


def is_linear(name: str, shape: Sequence[int]) -> bool:
    """Whether ``weighted_overlap`` counts the tensor: matrices, but no embeddings."""
    return len(shape) == 2 and "embed" not in name and "wte" not in name


def column_weights(tau: jax.Array) -> jax.Array:
    """sin²(2θ) of the columns of each pair of task vectors: (K, m, n) -> (pairs, n)."""
    norms = jnp.sqrt(jnp.sum(tau * tau, axis=1)) + 1e-8

    def of_pair(i: int, j: int) -> jax.Array:
        cosine = jnp.sum(tau[i] * tau[j], axis=0) / (norms[i] * norms[j])
        # sin(2θ) = 2 sin θ cos θ, without the angle, whose slope is infinite at 0.
        return 4 * cosine**2 * jnp.maximum(1 - cosine**2, 0)

    pairs = list(itertools.combinations(range(len(tau)), 2))
    return jnp.stack([of_pair(i, j) for i, j in pairs]) if pairs else norms[:0]


def weighted_overlap(m: jax.Array, weights: jax.Array) -> jax.Array:
    """The mean over pairs of Σ w min(|m_i|, |m_j|), m (K, n), w of `column_weights`."""
    pairs = itertools.combinations(range(len(m)), 2)
    return _mean(
        _overlap(m[i], m[j], own.astype(m.dtype))
        for (i, j), own in zip(pairs, weights, strict=True)
    )


def _weighted_overlap(
    named: Mapping[str, jax.Array], base: Any, models: Sequence[Any]
) -> jax.Array:
    own = stack([base, *models], ["base", *model_names(models)])
    total = jnp.zeros((), jnp.float32)
    for name, arrays in own.arrays.items():
        m = named[name]
        if is_linear(name, arrays.shape[1:]) and m.shape[1] == 1:
            weights = column_weights(arrays[1:] - arrays[:1])
            total = total + weighted_overlap(m[:, 0], weights)
    return total


def _norm(row: jax.Array) -> jax.Array:
    """‖row‖_2, with a gradient of 0 where the row is 0."""
    square = jnp.sum(row * row)
    some = square > 0
    root = jnp.sqrt(jnp.where(some, square, jnp.ones_like(square)))
    return jnp.where(some, root, jnp.zeros_like(root))


def _overlap(a: jax.Array, b: jax.Array, weights: Any = 1.0) -> jax.Array:
    return jnp.sum(weights * jnp.minimum(jnp.abs(a), jnp.abs(b)))


def _mean(values: Any) -> jax.Array:
    """Of a pair's values; 0 where one model has no pair."""
    found = list(values)
    return sum(found, jnp.zeros((), jnp.float32)) / max(len(found), 1)
