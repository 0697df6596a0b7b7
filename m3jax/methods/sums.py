"""Exact sums over a tensor or a model: L1, L2, dot products, Gram matrices.

Floating-point sums depend on their order, and so on chunks, shards and devices. Here
each float32 term is split into integers of 20 bits under a bound on the largest term;
they add up as int64, in any order, to the same bits on any hardware. Terms of less
than 2^-60 of the largest are lost. Under a transformation of the caller's
(`jax.jit`, …) the sums are plain float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Generator
from typing import Any

import numpy as np

from m3jax.lazy import jax, jnp
from m3jax.methods.step import Numbers, Operands, Problem, Reduction

# Float32 terms of J sums, (J, ...) or J arrays, of the operands and the sum's own
# arguments if any.
Terms = Callable[..., Any]
_BITS, _LIMBS = 20, 3


@dataclasses.dataclass(frozen=True)
class _Largest:
    terms: Terms

    def __call__(self, x: Operands, arguments: Numbers) -> tuple[Any]:
        return ([jnp.abs(own) for own in _terms(self.terms, x, arguments)],)


@dataclasses.dataclass(frozen=True)
class _Plain:
    terms: Terms

    def __call__(self, x: Operands, arguments: Numbers) -> tuple[Any]:
        return (_terms(self.terms, x, arguments),)


@dataclasses.dataclass(frozen=True)
class _Limbs:
    terms: Terms

    def __call__(self, x: Operands, arguments: Numbers) -> tuple[Any, ...]:
        unit = arguments["unit"]
        arguments = {name: own for name, own in arguments.items() if name != "unit"}
        terms = _terms(self.terms, x, arguments)
        lefts = [own * unit[j] for j, own in enumerate(terms)]  # |left| <= 1
        limbs = []
        for i in range(_LIMBS):
            # A step is the last bit of `grid`: what is added to it is rounded to whole
            # steps, and the bits of the sum count them. Faster than round and convert.
            step = np.float32(2.0 ** (-_BITS * (i + 1)))
            grid = step * np.float32(1.5 * (1 << 23))
            limb = [_pattern(left + grid) - grid.view(np.int32) for left in lefts]
            limbs.append(limb)
            # Exact: both have the same last bit at the least.
            lefts = [
                left - own.astype(jnp.float32) * step
                for left, own in zip(lefts, limb, strict=True)
            ]
        return tuple(limbs)


def _pattern(values: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(values, jnp.int32)


def _terms(terms: Terms, x: Operands, arguments: Numbers) -> list[jax.Array]:
    found = terms(x, arguments) if arguments else terms(x)
    return [own.astype(jnp.float32) for own in found]


def exact_sums(
    terms: Terms, problem: Problem, arguments: Numbers | None = None
) -> Generator[Reduction, Any, Any]:
    """Σ over a group's elements of each of J terms.

    Args:
      terms: operands, and arguments if there are any -> (J, ...) terms, or J arrays; a
        function of a module.
      problem: the group.
      arguments: arrays () or (J,) by name, which `terms` gets ready to broadcast.

    Yields:
      Two reading passes: the largest terms, then the sums.

    Returns:
      (J,) float64, each rounded once; NaN where a term is not finite.
    """
    if problem.traced:
        (sums,) = yield Reduction(_Plain(terms), arguments or {}, ("float",))
        return sums
    own = dict(arguments or {})
    (largest,) = yield Reduction(_Largest(terms), own, ("max",))
    _, exponents = np.frexp(largest)  # largest <= 2^exponent
    exponents = np.clip(exponents, -125, 127)
    unit = np.ldexp(np.float32(1), -exponents).astype(np.float32)
    limbs = yield Reduction(_Limbs(terms), {**own, "unit": unit}, ("sum",) * _LIMBS)
    sums = []
    for j, exponent in enumerate(exponents.tolist()):
        if not np.isfinite(largest[j]):
            sums.append(math.nan)
            continue
        total = sum(
            int(limb[j]) << _BITS * (_LIMBS - 1 - i) for i, limb in enumerate(limbs)
        )
        sums.append(math.ldexp(total, exponent - _BITS * _LIMBS))
    return np.array(sums)


@dataclasses.dataclass(frozen=True)
class _Products:
    vectors: Terms

    def __call__(self, x: Operands) -> list[jax.Array]:
        v = self.vectors(x).astype(jnp.float32)
        count = v.shape[0]
        return [v[i] * v[j] for i in range(count) for j in range(i, count)]


def gram(vectors: Terms, problem: Problem) -> Generator[Reduction, Any, Any]:
    """The (J, J) dot products ⟨v_i, v_j⟩ of J vectors over a group's elements."""
    upper = yield from exact_sums(_Products(vectors), problem)
    count = int(math.isqrt(8 * len(upper) + 1) - 1) // 2
    rows, columns = np.triu_indices(count)
    place = np.zeros((count, count), np.int64)
    place[rows, columns] = place[columns, rows] = np.arange(len(rows))
    return upper[place]


def row_sums(terms: Any) -> Any:
    """Σ over the last axis, which is seen whole; (..., 1) float32.

    The same bits wherever a row lies: integers of 12 bits under the row's largest term
    add up as int32. Rows have at most 2^18 elements.
    """
    bits, limbs = 12, 4
    terms = terms.astype(jnp.float32)
    largest = jnp.max(jnp.abs(terms), axis=-1, keepdims=True)
    # The power of two at or below the largest, from its bits; twice that is the bound.
    exponent = jax.lax.bitcast_convert_type(largest, jnp.int32) >> 23
    exponent = jnp.clip(exponent - 126, -125, 127)
    unit = jax.lax.bitcast_convert_type((127 - exponent) << 23, jnp.float32)
    left, total = terms * unit, jnp.zeros_like(largest)
    for i in range(1, limbs + 1):
        left = left * (1 << bits)
        limb = jnp.round(left)
        left = left - limb
        counted = jnp.sum(limb.astype(jnp.int32), axis=-1, keepdims=True)
        total = total + counted.astype(jnp.float32) * 2.0 ** (-bits * i)
    scale = jax.lax.bitcast_convert_type((127 + exponent) << 23, jnp.float32)
    return jnp.where(jnp.isfinite(largest), total * scale, largest * jnp.nan)


def deltas(x: Operands, arguments: Numbers | None = None) -> jax.Array:
    """The task vectors, (K, ...)."""
    return x.deltas


def weights(x: Operands, arguments: Numbers | None = None) -> jax.Array:
    """The models' own weights, (K, ...)."""
    return x.models
