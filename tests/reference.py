"""The formulas of merging in NumPy, written apart from m3jax: an oracle for tests.

Everything is float32 and happens in the order of the formulas: whole models, flattened
where the method says so, with a sort where m3jax counts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

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
      The merged tensors, float32.
    """
    base = None if base is None else _float32(base)
    models = [_float32(model) for model in models]
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

    def weights(name: str, default: float) -> list[np.float32]:
        own = ratios[name] if isinstance(ratios, Mapping) else ratios
        return [np.float32(x) for x in own or [default] * len(models)]

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
    return {name: base[name] + np.float32(scaling) * merged[name] for name in names}


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
        sizes = np.abs(values)
        smallest = np.sort(sizes, axis=None)
        dropped = sizes <= smallest[count - 1] if count else np.zeros_like(sizes, bool)
    scale = np.float32(1 / (1 - rate)) if rescale and rate < 1 else np.float32(1)
    kept = np.where(dropped, np.float32(0), values * scale)
    return kept if target == "weights" else base + kept


def _ties(
    deltas: Sequence[Tensors],
    names: Sequence[str],
    weights: Callable[[str], Sequence[np.float32]],
    trim_rate: float,
) -> dict[str, np.ndarray]:
    rows = np.stack([np.concatenate([d[n].ravel() for n in names]) for d in deltas])
    coefficients = np.concatenate(
        [np.tile(np.array(weights(n))[:, None], deltas[0][n].size) for n in names],
        axis=1,
    )  # (K, n)
    count = int(rows.shape[1] * trim_rate)
    for row in rows:
        if count:
            row[np.abs(row) < np.sort(np.abs(row))[count - 1]] = 0
    signs = np.sign(sum(rows))
    signs[signs == 0] = np.sign(signs.sum())
    survives = rows * signs > 0
    total = sum(np.where(survives, coefficients, np.float32(0)))
    merged = sum(np.where(survives, rows * coefficients, np.float32(0)))
    merged /= np.where(total > 0, total, np.float32(1))
    # One survivor passes whole, whatever its λ; several that all have λ = 0 count
    # alike.
    number = survives.sum(axis=0).astype(np.float32)
    plain = sum(np.where(survives, rows, np.float32(0))) / np.maximum(number, 1)
    merged = np.where((number == 1) | (total == 0), plain, merged)
    ends = np.cumsum([deltas[0][n].size for n in names])[:-1]
    return {
        name: part.reshape(deltas[0][name].shape)
        for name, part in zip(names, np.split(merged, ends), strict=True)
    }


def _float32(tensors: Tensors) -> dict[str, np.ndarray]:
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
