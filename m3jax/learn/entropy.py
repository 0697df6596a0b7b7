"""AdaMerging: coefficients of task vectors that make predictions certain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from m3jax.checkpoints.formats import tree
from m3jax.learn.descent import Learned, descend
from m3jax.learn.pytrees import model_names, stack, weighted_sum, wide


def adamerging(
    base: Any,
    models: Sequence[Any],
    apply_fn: Callable[..., jax.Array],
    batches: Iterable[Any],
    *,
    granularity: str = "task",
    init: float = 0.3,
    bounds: tuple[float, float] = (0.0, 1.0),
    density: float | None = None,
    tx: Any = None,
) -> Learned:
    """Learns λ of θ0 + Σ_k clip(λ_k, bounds) τ_k on inputs without labels.

    The loss of a step is Σ_k of the mean entropy of softmax(apply_fn(params, inputs_k,
    k)). λ itself is the state: outside the bounds its gradient is 0 (at a bound it is
    1) and the optimiser's momentum still moves it.

    AdaMerging and, with `density`, AdaMerging++ of arXiv 2310.02575, as in
    EnnengYang/AdaMerging; the release takes two batches of 16 inputs of each task as
    one step's. Generation has no heads: logits (..., V) give the mean over tokens, of
    those where ``inputs["mask"]`` is not 0 if the inputs are a dict with it (ours).

    Args:
      base: pytree of θ0, without heads; the result has its dtypes.
      models: K pytrees with the same leaves.
      apply_fn: (params, inputs, task) -> logits (..., V), task an int.
      batches: one element a step; its element k is the inputs of task k.
      granularity: ``task`` (one λ per task) or ``tensor`` (one per tensor and task).
      init: λ at the start.
      bounds: lowest and highest factor of a task vector.
      density: of ++ (its authors: 0.2): what is kept of each τ_k, by magnitude over the
        whole model; of that, what has the sign elected as in TIES. None keeps all.
      tx: an optax transformation; Adam at 1e-3 by default, as in the release.

    Returns:
      The result; `coefficients` is (K,), or a pytree like `base` of (K,).

    Raises:
      ValueError: another granularity, or a density outside [0, 1].
      CheckpointError: the pytrees do not fit each other.
    """
    import optax

    if granularity not in ("task", "tensor"):
        raise ValueError(f"granularity={granularity!r} needs 'task' or 'tensor'")
    if density is not None and not 0 <= density <= 1:
        raise ValueError(f"density={density} needs a number from 0 to 1, or None")
    own = stack([base, *models], ["base", *model_names(models)])
    bases = {name: array[0] for name, array in own.arrays.items()}
    taus = {name: array[1:] - array[:1] for name, array in own.arrays.items()}
    if density is not None:
        taus = _trimmed(taus, density)

    def params(coefficients: Any, arrays: Any) -> Any:
        bases, taus = arrays
        merged = {}
        named = tree.flatten(coefficients)[0]
        for name, tau in taus.items():
            factor = bounded(named.get(name, coefficients), *bounds)
            merged[name] = bases[name] + weighted_sum(factor, tau)
        return own.params(merged)

    def loss(merged: Any, batch: Any, coefficients: Any) -> jax.Array:
        entropies = [
            mean_entropy(apply_fn(merged, batch[k], k), batch[k])
            for k in range(len(models))
        ]
        return sum(entropies[1:], entropies[0])

    def equal(_: Any = None) -> jax.Array:
        return jnp.full(len(models), init, jnp.float32)

    start = equal() if granularity == "task" else own.filled(equal)
    tx = optax.adam(1e-3) if tx is None else tx
    return descend(params, loss, start, batches, tx, (bases, taus))


def mean_entropy(logits: jax.Array, inputs: Any = None) -> jax.Array:
    """The mean of −Σ p log p of logits (..., V), where the inputs' mask is, or all."""
    logs = jax.nn.log_softmax(logits.astype(wide(logits)))
    entropies = -jnp.sum(jnp.exp(logs) * logs, axis=-1)
    if not (isinstance(inputs, Mapping) and "mask" in inputs):
        return jnp.mean(entropies)
    mask = inputs["mask"].astype(bool).astype(entropies.dtype)
    return jnp.sum(entropies * mask) / jnp.maximum(jnp.sum(mask), 1)


def bounded(value: jax.Array, low: float, high: float) -> jax.Array:
    """Clipped. `jnp.clip` has a gradient of one half at a bound, the release's 1."""
    lower, upper = jnp.full_like(value, low), jnp.full_like(value, high)
    return jnp.where(value < lower, lower, jnp.where(value > upper, upper, value))


def _trimmed(taus: Mapping[str, jax.Array], density: float) -> dict[str, jax.Array]:
    """Each τ_k's largest int(n·density) + 1 entries, of them those of elected sign."""
    dtype = jnp.result_type(*taus.values())
    flat = [jnp.abs(t.astype(dtype)).reshape(len(t), -1) for t in taus.values()]
    every = jnp.concatenate(flat, axis=1)
    # The k-th smallest, k = n − int(n·density); k = 0 keeps all.
    place = max(every.shape[1] - int(every.shape[1] * density) - 1, 0)
    least = jnp.sort(every, axis=1)[:, place]
    kept = {}
    for name, tau in taus.items():
        own = least.astype(tau.dtype).reshape(-1, *(1,) * (tau.ndim - 1))
        kept[name] = jnp.where(jnp.abs(tau) >= own, tau, jnp.zeros_like(tau))
    signs = {name: jnp.sign(jnp.sum(tau, axis=0)) for name, tau in kept.items()}
    # A sum of 0 takes the majority of the model's signs; without one it counts as −.
    majority = sum(int(jnp.sum(sign.astype(jnp.int32))) for sign in signs.values())
    result = {}
    for name, tau in kept.items():
        up = signs[name] > 0
        if majority > 0:
            up |= signs[name] == 0
        agrees = jnp.where(up[None], tau > 0, tau < 0)
        result[name] = jnp.where(agrees, tau, jnp.zeros_like(tau))
    return result
