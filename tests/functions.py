"""Merges whole models with the steps of m3jax.methods, without an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.methods import METHODS
from m3jax.methods.dare import Dare
from m3jax.methods.selection import count_codes_on_host
from m3jax.methods.step import Operands, Problem, Reduction, Step, run_statistics

Tensors = Mapping[str, np.ndarray]


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
    given = {"scaling": scaling, "trim_rate": trim_rate}
    fields = METHODS[method].fields()
    step = METHODS[method](**{k: v for k, v in given.items() if k in fields})
    count = len(models)
    numbers = {k: np.float64(v) for k, v in given.items() if k in fields}
    numbers["weights"] = np.array(ratios or step.equal_weights(count), np.float64)
    flat = None
    if step.scope == "model":
        flat = found(step, _flat(models[0], base), _stacked(models), numbers)
    merged = {}
    for name in models[0]:
        own = None if base is None else jnp.asarray(base[name])
        stack = jnp.asarray(np.stack([model[name] for model in models]))
        info = flat if flat is not None else found(step, own, stack, numbers)
        merged[name] = np.asarray(apply(step, own, stack, numbers, info))
    return merged


def apply(step: Any, base: Any, stack: Any, numbers: Any, info: Any) -> Any:
    """A method on whole arrays; numbers and findings () or (K,)."""
    p, own = (_behind(values, stack.ndim - 1) for values in (numbers, info))
    return jax.jit(type(step).apply, static_argnums=0)(
        step.static, Operands(base, stack), p, own
    )


def drop(
    base: Tensors | None,
    models: Sequence[Tensors],
    *,
    rates: Sequence[float],
    rescale: bool = True,
    target: str = "delta",
    masks: Sequence[Mapping[str, np.ndarray]] | None = None,
) -> list[dict[str, np.ndarray]]:
    """DARE with the given masks, or by magnitude.

    The rates of given masks are taken as they are, not rounded to 1/65536.
    """
    strategy = "magnitude" if masks is None else "random"
    step = Dare(drop_rate=None, rescale=rescale, target=target, strategy=strategy)
    numbers = {"drop_rate": np.array(rates, np.float64)}
    kept = 1 - numbers["drop_rate"]
    dropped_models: list[dict[str, np.ndarray]] = [{} for _ in models]
    for name in models[0]:
        own = None if base is None else jnp.asarray(base[name])
        stack = jnp.asarray(np.stack([model[name] for model in models]))
        info = found(step, own, stack, numbers)
        draw = None
        if masks is not None:
            draw = jnp.asarray(np.stack([mask[name] for mask in masks]))
            scale = 1 / np.where(kept > 0, kept, 1) if rescale else np.ones_like(kept)
            info = {"scale": scale}
        info = _behind(info, stack.ndim - 1)
        result = jax.jit(Dare.apply, static_argnums=0)(
            step.static, Operands(own, stack), {}, info, draw
        )
        for model, part in zip(dropped_models, result.models, strict=True):
            model[name] = np.asarray(part)
    return dropped_models


def found(step: Step, base: Any, stack: Any, numbers: Any) -> dict[str, Any]:
    """What a step measures in whole arrays, and derives from that."""
    problem = Problem(len(stack), int(stack[0].size), numbers)
    info = {}
    if step.scope:
        info = run_statistics(
            step.static.measure(problem), lambda asked: answer(asked, base, stack)
        )
    tables = {k: np.asarray(v)[..., None] for k, v in {**info}.items()}
    own = {k: np.asarray(v)[..., None] for k, v in numbers.items()}
    derived = step.static.derive(own, tables, np)
    return {k: np.asarray(v)[..., 0] for k, v in derived.items()}


def answer(reduction: Reduction, base: Any, stack: Any) -> Any:
    """Performs a reading pass over whole arrays at once; a sample is declined."""
    if reduction.sample:
        return None
    return count(reduction, base, stack)


def count(reduction: Reduction, base: Any, stack: Any) -> Any:
    """Performs a reading pass over the given elements."""
    axes = np.ndim(stack) - 1
    arguments = _behind(reduction.arguments, axes, keep=True)
    own = None if base is None else jnp.asarray(base)
    parts = jax.jit(reduction.function)(Operands(own, jnp.asarray(stack)), arguments)
    shape = np.shape(stack)[1:]

    def combined(part: Any, how: str) -> Any:
        part = np.stack(part) if isinstance(part, list) else part
        lead = part.shape[: part.ndim - len(shape)]
        rows = np.asarray(part).reshape(*lead, -1)
        if how == "histogram":
            return count_codes_on_host(rows)
        if how == "max":
            return rows.max(axis=-1, initial=0)
        return rows.astype(np.int64).sum(axis=-1)

    return tuple(combined(*p) for p in zip(parts, reduction.combine, strict=True))


def _behind(values: Mapping[str, Any], axes: int, *, keep: bool = False) -> Any:
    """(), (K,) as (1, …) and (K, 1, …), in float32 unless they are bit patterns."""
    made = {}
    for name, value in values.items():
        array = np.asarray(value)
        if not keep and array.dtype != np.uint32:
            array = array.astype(np.float32)
        made[name] = array.reshape((*array.shape, *(1,) * axes))
    return made


def _stacked(models: Sequence[Tensors]) -> jax.Array:
    return jnp.stack([_flat(models[0], model) for model in models])


def _flat(names: Tensors, tensors: Tensors | None) -> Any:
    if tensors is None:
        return None
    return jnp.asarray(np.concatenate([tensors[name].ravel() for name in names]))
