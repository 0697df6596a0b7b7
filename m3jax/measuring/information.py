"""The diagonal of the Fisher information, for `fisher` and `df_merge`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from m3jax.search.pytrees import wide_dtype

KINDS = ("exact", "sampled", "empirical")


def fisher(
    log_probs: Callable[[Any, Any], jax.Array],
    params: Any,
    examples: Any,
    *,
    kind: str = "exact",
    labels: Any = None,
    samples: int = 1,
    key: jax.Array | None = None,
) -> Any:
    """The mean over examples of squared gradients of log-probabilities.

    F = mean_i Σ_c q_ic (∂s_ic)², s_i = log_probs(params, example i) of shape (C,):

    - ``exact``: q_i = softmax(s_i), which also normalises scores that are no
      log-probabilities.
    - ``sampled``: the shares of `samples` draws from softmax(s_i).
    - ``empirical``: 1 for the example's label, else 0.

    The square is taken of each example's gradient, as in arXiv 2111.09832 and the
    evaluator of sanwooo/df-merge; the square of a batch's gradient, which some public
    code has, is another quantity. Memory: a few times that of `params`, however many
    examples and classes there are.

    Args:
      log_probs: (params, example) -> (C,), of one example.
      params: a pytree of floats.
      examples: a pytree of arrays (N, ...); an example is what it holds at one index.
      kind: see above.
      labels: (N,) integers, for ``empirical``.
      samples: draws per example, for ``sampled``.
      key: for ``sampled``; example i draws with ``fold_in(key, i)``.

    Returns:
      F, a pytree like `params`, float32 (float64 where a leaf is).

    Raises:
      ValueError: another kind, one that lacks its argument, or no examples.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} needs one of {', '.join(KINDS)}")
    if (labels is None) == (kind == "empirical"):
        raise ValueError(f"labels are for kind='empirical', which needs them: {kind=}")
    if (key is None) == (kind == "sampled") or samples < 1:
        raise ValueError(
            f"kind='sampled' needs a key and samples of 1 or more, other kinds no key: "
            f"{kind=}, {samples=}"
        )
    count = len(jax.tree.leaves(examples)[0])
    if not count or (labels is not None and len(labels) != count):
        own = "none" if labels is None else len(labels)
        raise ValueError(f"{count} examples and {own} labels: fisher needs 1 or more")

    def classes(scores: jax.Array, label: Any, i: jax.Array) -> Any:
        """Which classes' gradients are wanted, and their shares q."""
        if kind == "empirical":
            return label[None], jnp.ones(1, scores.dtype)
        every = jnp.arange(len(scores))
        if kind == "exact":
            return every, jax.nn.softmax(scores)
        assert key is not None  # checked above
        own = jax.random.fold_in(key, i)
        drawn = jax.random.categorical(own, scores, shape=(samples,))
        if samples < len(scores):
            return drawn, jnp.full(samples, 1 / samples, scores.dtype)
        return every, jnp.bincount(drawn, length=len(scores)) / samples

    @jax.jit
    def run(params: Any, examples: Any, labels: Any) -> Any:
        def of_example(total: Any, own: Any) -> Any:
            example, label, i = own
            squares = squared_gradients(
                lambda p: log_probs(p, example),
                params,
                lambda scores: classes(scores, label, i),
                total,
            )
            return squares, None

        every = (examples, labels, jnp.arange(count))
        total, _ = jax.lax.scan(of_example, zeros_like(params), every)
        return jax.tree.map(lambda t: t / count, total)

    return run(params, examples, None if labels is None else jnp.asarray(labels))


def squared_gradients(
    scores: Callable[[Any], jax.Array],
    params: Any,
    classes: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    total: Any,
) -> Any:
    """total + Σ_c q_c (∂s_c)², the gradients of one example's scores.

    Args:
      scores: params -> s, (C,).
      params: a pytree of floats.
      classes: s -> which c the sum is over, integers (J,), and their q, (J,).
      total: what the sum is added to, as `zeros_like` makes it.
    """
    values, pull = jax.vjp(scores, params)

    def of_class(total: Any, pair: Any) -> Any:
        (gradient,) = pull(jax.nn.one_hot(pair[0], len(values), dtype=values.dtype))
        return jax.tree.map(
            lambda t, g: t + pair[1].astype(t.dtype) * g.astype(t.dtype) ** 2,
            total,
            gradient,
        ), None

    found, _ = jax.lax.scan(of_class, total, classes(values))
    return found


def zeros_like(params: Any) -> Any:
    """0 for every parameter, float32 (float64 where it is)."""
    return jax.tree.map(lambda p: jnp.zeros(p.shape, wide_dtype(p)), params)
