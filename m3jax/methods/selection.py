"""The k-th smallest magnitude of any number of float32 values, exactly, by counting.

The bits of |x|, read as an integer, have the order of the magnitudes. A histogram of
those integers over a window finds the bin that holds the k-th smallest, and a second
one over that bin finds it to the bit. Histograms add up over chunks, tensors and
hosts: no sort, and nothing of the model's size in memory.

A sample of the values first tells where to put a window fine enough that one reading
pass nearly always suffices. It decides how many passes there are, never the result.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.methods.method import Reduction

# Counters per model. Codes of 16 bits then say where a value falls, two of them
# standing for "below" and "above". Two histograms resolve every magnitude up to
# infinity, and as a window around a sampled threshold they span ±0.2 to 0.4 % of it.
BINS = (1 << 16) - 2
_BELOW, _ABOVE = BINS, BINS + 1
_END = 0x7F800001  # one past the pattern of infinity


class Window(NamedTuple):
    """Per model, bin b counts patterns [low + (b << shift), low + (b+1 << shift))."""

    low: np.ndarray  # (K,) int32
    shift: np.ndarray  # (K,) int32


def magnitude_codes(values: jax.Array, valid: jax.Array, window: Window) -> jax.Array:
    """Which bin of a window the magnitude of each value falls into.

    Args:
      values: (K, ...) float32.
      valid: bool, the shape of one model's values; others are not to be counted.
      window: where the bins lie.

    Returns:
      (K, ...) uint16: the bin, or `BINS` below the window, `BINS` + 1 above it and
      where not valid.
    """
    per_model = (-1,) + (1,) * (values.ndim - 1)
    low, shift = (jnp.reshape(field, per_model) for field in window)
    bits = jax.lax.bitcast_convert_type(jnp.abs(values), jnp.int32)
    bins = jnp.right_shift(bits - low, jnp.broadcast_to(shift, bits.shape))
    codes = jnp.where(bits < low, _BELOW, jnp.where(bins < BINS, bins, _ABOVE))
    return jnp.where(valid[None], codes, _ABOVE).astype(jnp.uint16)


def count_codes(codes: jax.Array) -> jax.Array:
    """(K, BINS + 1) int32: how often each code but the last occurs, on a device."""

    def count(codes: jax.Array) -> jax.Array:
        zeros = jnp.zeros(BINS + 2, jnp.int32)
        where = codes.reshape(-1).astype(jnp.int32)
        return zeros.at[where].add(1, mode="promise_in_bounds")[:_ABOVE]

    return jnp.stack([count(codes[i]) for i in range(codes.shape[0])])


def count_codes_on_host(codes: np.ndarray) -> np.ndarray:
    """`count_codes` in NumPy, int64: for the few codes inside a narrow window it is
    several times faster than scattered additions by XLA's CPU backend."""
    counts = np.zeros((len(codes), BINS + 1), np.int64)
    for own, count in zip(codes.reshape(len(codes), -1), counts, strict=True):
        inside = own < BINS
        if 4 * np.count_nonzero(inside) < own.size:
            count[:BINS] = np.bincount(own[np.flatnonzero(inside)], minlength=BINS)
            count[_BELOW] = np.count_nonzero(own == _BELOW)
        else:
            count[:] = np.bincount(own, minlength=BINS + 2)[:_ABOVE]
    return counts


def delta_codes(
    base: jax.Array, stack: jax.Array, valid: jax.Array, window: Window
) -> jax.Array:
    """`magnitude_codes` of the task vectors: a `Reduction` to count."""
    return magnitude_codes(stack - base[None], valid, window)


def weight_codes(
    base: jax.Array | None, stack: jax.Array, valid: jax.Array, window: Window
) -> jax.Array:
    """`magnitude_codes` of the models' own weights: a `Reduction` to count."""
    del base
    return magnitude_codes(stack, valid, window)


def kth_smallest(
    function: Any, ranks: list[int], size: int
) -> Generator[Reduction, Any, np.ndarray]:
    """The ranks[i]-th smallest magnitude (from 1) of model i's `size` values.

    Args:
      function: `delta_codes` or `weight_codes`.
      ranks: per model, 1 <= rank <= size.
      size: the number of values of each model.

    Yields:
      The reading passes it needs: usually a sample and one pass, at most a sample
      and three passes.

    Returns:
      (K,) float32; a rank among NaNs gives infinity.
    """
    rank = np.array(ranks, np.int64)
    low = np.zeros(len(rank), np.int64)  # the answer's pattern is in [low, high)
    high = np.full(len(rank), _END, np.int64)
    whole = _covering(low, high)
    sample = yield Reduction(function, whole, histogram=True, sample=True)
    window = whole if sample is None else _guess(sample, rank / size)
    while True:
        counts = yield Reduction(function, window, histogram=True)
        for i, count in enumerate(counts):
            first, shift = int(window.low[i]), int(window.shift[i])
            below = int(count[_BELOW])
            if rank[i] <= below:
                high[i] = min(high[i], first)
                continue
            place = int(np.searchsorted(below + np.cumsum(count[:BINS]), rank[i]))
            low[i] = min(max(low[i], first + (place << shift)), high[i] - 1)
            if place < BINS:
                high[i] = min(high[i], first + ((place + 1) << shift))
        if np.all(high - low == 1):
            return low.astype(np.int32).view(np.float32)
        window = _covering(low, high)


def _covering(low: np.ndarray, high: np.ndarray) -> Window:
    """The finest window that covers the patterns [low, high)."""
    shift = [
        next(s for s in range(32) if (last - first - 1) >> s < BINS)
        for first, last in zip(low.tolist(), high.tolist(), strict=True)
    ]
    return Window(low.astype(np.int32), np.array(shift, np.int32))


def _guess(sample: np.ndarray, quantile: np.ndarray) -> Window:
    """A window of single patterns around a quantile of a sampled histogram."""
    shift = int(_covering(np.zeros(1, np.int64), np.array([_END])).shift[0])
    lows = []
    for count, q in zip(sample, quantile, strict=True):
        total = np.cumsum(count[:BINS])
        place = int(np.searchsorted(total, max(1, round(q * total[-1]))))
        place = min(place, BINS - 1)  # a sample of NaNs has nothing to count
        inside = (q * total[-1] - total[place] + count[place]) / max(count[place], 1)
        pattern = int((place + inside) * (1 << shift))
        # Never from 0 on: the many entries that are exactly 0 are counted as "below",
        # and if the answer is among them, that settles it.
        lows.append(int(np.clip(pattern - BINS // 2, 1, _END - BINS)))
    return Window(np.array(lows, np.int32), np.zeros(len(lows), np.int32))
