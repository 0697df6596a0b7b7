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

# Counters per model. With 17 bits, all 2**31 magnitudes take two histograms; as a
# window around a sampled threshold they span ±0.8 % of it, or 0.5 MB of counters,
# which stay in a core's cache.
BINS = 1 << 17
_END = 1 << 31  # one past the largest pattern of |x|


class Window(NamedTuple):
    """Per model, bin b counts patterns [low + (b << shift), low + (b+1 << shift))."""

    low: np.ndarray  # (K,) int32
    shift: np.ndarray  # (K,) int32


def count_magnitudes(values: jax.Array, valid: jax.Array, window: Window) -> jax.Array:
    """Histogram of |values| per model over a window of bit patterns.

    Args:
      values: (K, ...) float32.
      valid: bool, the shape of one model's values; others are not counted.
      window: where the bins lie.

    Returns:
      (K, BINS + 2) int32: below the window, its bins, above it.
    """
    counts = []
    for i in range(values.shape[0]):
        bits = jax.lax.bitcast_convert_type(jnp.abs(values[i]), jnp.int32)
        bins = jnp.right_shift(bits - window.low[i], window.shift[i])
        index = jnp.where(valid, jnp.clip(bins, -1, BINS) + 1, BINS + 2)
        zeros = jnp.zeros(BINS + 2, jnp.int32)
        counts.append(zeros.at[index.reshape(-1)].add(1, mode="drop"))
    return jnp.stack(counts)


def count_deltas(
    base: jax.Array, stack: jax.Array, valid: jax.Array, window: Window
) -> jax.Array:
    """`count_magnitudes` of the task vectors, a `Reduction` function."""
    return count_magnitudes(stack - base[None], valid, window)


def count_weights(
    base: jax.Array | None, stack: jax.Array, valid: jax.Array, window: Window
) -> jax.Array:
    """`count_magnitudes` of the models' own weights, a `Reduction` function."""
    del base
    return count_magnitudes(stack, valid, window)


def kth_smallest(
    function: Any, ranks: list[int], size: int
) -> Generator[Reduction, Any, np.ndarray]:
    """The ranks[i]-th smallest magnitude (from 1) of model i's `size` values.

    Args:
      function: `count_deltas` or `count_weights`.
      ranks: per model, 1 <= rank <= size.
      size: the number of values of each model.

    Yields:
      The reading passes it needs: usually a sample and one pass, at most a sample
      and three passes.

    Returns:
      (K,) float32.
    """
    rank = np.array(ranks, np.int64)
    low = np.zeros(len(rank), np.int64)  # the answer's pattern is in [low, high)
    high = np.full(len(rank), _END, np.int64)
    sample = yield Reduction(function, _covering(low, high), sample=True)
    window = _covering(low, high) if sample is None else _guess(sample, rank / size)
    while True:
        counts = yield Reduction(function, window)
        for i, count in enumerate(counts):
            first, shift = int(window.low[i]), int(window.shift[i])
            edge = int(np.searchsorted(np.cumsum(count), rank[i]))  # bin edge - 1
            if edge > 0:
                low[i] = max(low[i], first + ((edge - 1) << shift))
            if edge <= BINS:
                high[i] = min(high[i], first + (edge << shift))
        if np.all(high - low == 1):
            return low.astype(np.int32).view(np.float32)
        window = _covering(low, high)


def _covering(low: np.ndarray, high: np.ndarray) -> Window:
    """The finest window that covers the patterns [low, high)."""
    shift = [max(0, int(span - 1).bit_length() - 17) for span in high - low]
    return Window(low.astype(np.int32), np.array(shift, np.int32))


def _guess(sample: np.ndarray, quantile: np.ndarray) -> Window:
    """A window of single patterns around a quantile of a sampled histogram."""
    lows = []
    for count, q in zip(sample, quantile, strict=True):
        total = np.cumsum(count)
        edge = int(np.searchsorted(total, max(1, round(q * total[-1]))))
        inside = count[edge] and (q * total[-1] - total[edge] + count[edge]) / count[edge]
        pattern = (edge - 1 + inside) * (_END // BINS)
        lows.append(int(np.clip(pattern - BINS // 2, 0, _END - BINS)))
    return Window(np.array(lows, np.int32), np.zeros(len(lows), np.int32))
