"""Merges whole models with the pure functions of m3jax.methods, without an engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.methods import METHODS, dare, selection
from m3jax.methods.method import Reduction, run_statistics

Tensors = Mapping[str, np.ndarray]


_drop_and_rescale = jax.jit(dare.drop_and_rescale, static_argnames="target")
_magnitude_mask = jax.jit(dare.magnitude_mask, static_argnames="target")


def merge(
    base: Tensors | None,
    models: Sequence[Tensors],
    *,
    method: str,
    ratios: Sequence[float] | None = None,
    scaling: float = 1.0,
    trim_rate: float = 0.5,
) -> dict[str, np.ndarray]:
    """Merges float32 tensors; the arguments are those of `reference.merge`."""
    rule = METHODS[method]
    size = sum(tensor.size for tensor in models[0].values())
    info: dict[str, Any] = {}
    if rule.statistics is not None:
        info = run_statistics(
            rule.statistics(len(models), size, trim_rate),
            lambda reduction: answer(
                reduction,
                None if base is None else _flat(models[0], base),
                jnp.stack([_flat(models[0], model) for model in models]),
            ),
        )
    apply = jax.jit(rule.apply)
    merged = {}
    for name in models[0]:
        stack = np.stack([model[name] for model in models])
        coefficients = ratios or [rule.default_coefficient(len(models))] * len(models)
        coefficients = np.array(coefficients, np.float32)
        merged[name] = np.asarray(
            apply(
                None if base is None else jnp.asarray(base[name]),
                jnp.asarray(stack),
                jnp.asarray(coefficients.reshape((-1,) + (1,) * (stack.ndim - 1))),
                info,
                np.float32(scaling),
            )
        )
    return merged


def drop(
    base: Tensors | None,
    models: Sequence[Tensors],
    *,
    rates: Sequence[float],
    rescale: bool = True,
    target: str = "delta",
    masks: Sequence[Mapping[str, np.ndarray]] | None = None,
) -> list[dict[str, np.ndarray]]:
    """DARE with the given masks, or by magnitude."""
    scales = dare.rescale_factors(1 - np.array(rates), rescale=rescale)
    dropped_models: list[dict[str, np.ndarray]] = [{} for _ in models]
    for name in models[0]:
        own = None if base is None else jnp.asarray(base[name])
        stack = jnp.asarray(np.stack([model[name] for model in models]))
        behind = (-1,) + (1,) * (stack.ndim - 1)
        if masks is not None:
            dropped = jnp.asarray(np.stack([mask[name] for mask in masks]))
        else:
            thresholds = run_statistics(
                dare.magnitude_thresholds(tuple(rates), stack[0].size, target=target),
                lambda reduction, own=own, stack=stack: answer(reduction, own, stack),
            )
            dropped = _magnitude_mask(
                own, stack, jnp.asarray(thresholds).reshape(behind), target=target
            )
        kept = _drop_and_rescale(
            own, stack, dropped, jnp.asarray(scales).reshape(behind), target=target
        )
        for model, part in zip(dropped_models, kept, strict=True):
            model[name] = np.asarray(part)
    return dropped_models


def answer(reduction: Reduction, base: Any, stack: Any) -> Any:
    """Performs a reading pass over whole arrays at once; a sample is declined."""
    if reduction.sample:
        return None
    return count(reduction, base, stack)


def count(reduction: Reduction, base: Any, stack: Any) -> Any:
    """Performs a reading pass over the given elements."""
    counts = jax.jit(reduction.function)(
        base, stack, jnp.ones(stack.shape[1:], bool), reduction.arguments
    )
    if reduction.histogram:
        codes, *others = counts
        counts = selection.count_codes_on_host(np.asarray(codes)), *others
    return jax.tree.map(lambda part: np.asarray(part).astype(np.int64), counts)


def _flat(names: Iterable[str], tensors: Tensors) -> jax.Array:
    return jnp.asarray(np.concatenate([tensors[name].ravel() for name in names]))
