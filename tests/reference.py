"""The formulas of merging in NumPy, written apart from m3jax: an oracle for tests.

A tensor is float32, or float64 where one of the inputs is, and everything happens in
the order of the formulas: whole models, with a sort where m3jax counts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

Tensors = Mapping[str, np.ndarray]
Masks = Callable[[int, str], np.ndarray]  # (model, tensor) -> True where dropped


def merge(
    base: Tensors | None,
    models: Sequence[Tensors],
    *,
    method: str,
    ratios: Sequence[float] | Mapping[str, Sequence[float]] | None = None,
    scaling: float = 1.0,
    trim_rate: float = 0.5,
    drop_rates: Sequence[float] | None = None,
    rescale: bool = True,
    target: str = "delta",
    masks: Masks | None = None,
) -> dict[str, np.ndarray]:
    """Merges whole models.

    Args:
      ratios: λ, for all tensors or by tensor; None: M3 is off.
      drop_rates: DARE's p, one per model, as it is used to rescale; None: no DARE.
      masks: what random DARE drops; None: by magnitude.

    Returns:
      The merged tensors, float32, or float64 where an input is.
    """
    base, *models = _widened([base, *models])
    if drop_rates is not None:
        models = [
            {
                name: _dare(
                    None if base is None else base[name],
                    tensor,
                    rate,
                    None if masks is None else masks(i, name),
                    rescale=rescale,
                    target=target,
                    count=int(tensor.size * rate),
                )
                for name, tensor in model.items()
            }
            for i, (model, rate) in enumerate(zip(models, drop_rates, strict=True))
        ]

    def weights(name: str, default: float) -> list[np.floating]:
        own = ratios[name] if isinstance(ratios, Mapping) else ratios
        number = models[0][name].dtype.type
        return [number(x) for x in own or [default] * len(models)]

    names = list(models[0])
    if method == "average":
        return {
            name: sum(
                weight * model[name]
                for weight, model in zip(
                    weights(name, 1 / len(models)), models, strict=True
                )
            )
            for name in names
        }
    assert base is not None
    deltas = [{name: model[name] - base[name] for name in names} for model in models]
    if method == "task_arithmetic":
        merged = {
            name: sum(
                w * d[name] for w, d in zip(weights(name, 1.0), deltas, strict=True)
            )
            for name in names
        }
    else:
        merged = _ties(deltas, names, lambda name: weights(name, 1.0), trim_rate)
    return {
        name: base[name] + base[name].dtype.type(scaling) * merged[name]
        for name in names
    }


def plain_jax_mask(
    seed: int, model: int, name: str, shape: Sequence[int], drop_rate: float
) -> np.ndarray:
    """DARE's mask by the documented contract, with nothing but `jax.random`."""
    size = int(np.prod(shape))
    key = jax.random.fold_in(jax.random.key(seed), 1)
    key = jax.random.fold_in(key, model)
    for word in np.frombuffer(hashlib.sha256(name.encode()).digest()[:8], "<u4"):
        key = jax.random.fold_in(key, word)
    with jax.enable_x64(True):
        bits = np.asarray(jax.random.bits(key, (-(-size // 4),), "uint64"))
    lanes = bits.astype("<u8").view("<u2")[:size]
    return (lanes < round(drop_rate * 65536)).reshape(shape)


def _dare(
    base: np.ndarray | None,
    tensor: np.ndarray,
    rate: float,
    dropped: np.ndarray | None,
    *,
    rescale: bool,
    target: str,
    count: int,
) -> np.ndarray:
    values = tensor if target == "weights" else tensor - base
    if dropped is None:
        sizes = np.abs(values).astype(np.float32)
        smallest = np.sort(sizes, axis=None)
        dropped = sizes <= smallest[count - 1] if count else np.zeros_like(sizes, bool)
    scale = values.dtype.type(1 / (1 - rate) if rescale and rate < 1 else 1)
    kept = np.where(dropped, values.dtype.type(0), values * scale)
    return kept if target == "weights" else base + kept


def _ties(
    deltas: Sequence[Tensors],
    names: Sequence[str],
    weights: Callable[[str], Sequence[np.floating]],
    trim_rate: float,
) -> dict[str, np.ndarray]:
    trimmed = [_trimmed(model, names, trim_rate) for model in deltas]
    rows = {name: np.stack([model[name] for model in trimmed]) for name in names}
    signs = {name: np.sign(sum(own)) for name, own in rows.items()}
    majority = np.sign(sum(own.sum(dtype=np.float64) for own in signs.values()))
    return {
        name: _merged_by_sign(rows[name], signs[name], majority, weights(name))
        for name in names
    }


def _trimmed(model: Tensors, names: Sequence[str], trim_rate: float) -> Tensors:
    """Zeros for the smallest entries of a whole model, compared in float32."""
    sizes = {name: np.abs(model[name]).astype(np.float32) for name in names}
    ordered = np.sort(np.concatenate([own.ravel() for own in sizes.values()]))
    count = int(ordered.size * trim_rate)
    if not count:
        return model
    least = ordered[count - 1]
    return {n: np.where(sizes[n] < least, 0, model[n]) for n in names}


def _merged_by_sign(
    rows: np.ndarray,
    signs: np.ndarray,
    majority: float,
    weights: Sequence[np.floating],
) -> np.ndarray:
    zero, one = rows.dtype.type(0), rows.dtype.type(1)
    coefficients = np.array(weights).reshape(-1, *[1] * (rows.ndim - 1))
    signs = np.where(signs == 0, majority, signs)
    survives = rows * signs > 0
    total = sum(np.where(survives, coefficients, zero))
    merged = sum(np.where(survives, rows * coefficients, zero))
    merged = merged / np.where(total > 0, total, one)
    # One survivor passes whole, whatever its λ; several that all have λ = 0 count
    # alike.
    number = survives.sum(axis=0).astype(rows.dtype)
    plain = sum(np.where(survives, rows, zero)) / np.maximum(number, one)
    return np.where((number == 1) | (total == 0), plain, merged)


def _widened(models: Sequence[Tensors | None]) -> list[Any]:
    """The models in the dtype of the arithmetic."""
    given = [model for model in models if model is not None]

    def wide(name: str) -> type:
        return (
            np.float64
            if any(model[name].dtype == np.float64 for model in given)
            else np.float32
        )

    return [
        None if model is None else {n: t.astype(wide(n)) for n, t in model.items()}
        for model in models
    ]
