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
    """(K, BINS + 1) int32: how often each code but the last occurs, on a device.

    Args:
      codes: (K, ...) uint16, of `magnitude_codes`.
    """

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
) -> tuple[jax.Array]:
    """`magnitude_codes` of the task vectors: a `Reduction` that makes a histogram."""
    return (magnitude_codes(stack - base[None], valid, window),)


def weight_codes(
    base: jax.Array | None, stack: jax.Array, valid: jax.Array, window: Window
) -> tuple[jax.Array]:
    """`magnitude_codes` of the models' own weights, likewise."""
    del base
    return (magnitude_codes(stack, valid, window),)


class Beside(NamedTuple):
    """What the pass that found the answer has counted beside it.

    Attributes:
      counts: of the function's second part, with `guess` for the answer.
      between: how many magnitudes lie between the guess and the answer, so that they
        are on another side of the one than of the other; zeros do not count.
    """

    counts: Any
    between: int


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
    found, _ = yield from kth_smallest_and(function, None, ranks, size)
    return found


def kth_smallest_and(
    function: Any, function_at_guess: Any, ranks: list[int], size: int
) -> Generator[Reduction, Any, tuple[np.ndarray, Beside | None]]:
    """`kth_smallest`, counting something else in the same pass.

    Args:
      function, ranks, size: as for `kth_smallest`.
      function_at_guess: (base, stack, valid, (window, guess)) -> (codes, counts),
        where `guess`, (K,) float32, is what the sample says of the answer; None
        counts nothing else.

    Yields:
      The same reading passes.

    Returns:
      The answer, and what was counted; None where the answer took more than one pass
      over everything.
    """
    rank = np.array(ranks, np.int64)
    low = np.zeros(len(rank), np.int64)  # the answer's pattern is in [low, high)
    high = np.full(len(rank), _END, np.int64)
    whole = _covering(low, high)
    sample = yield Reduction(function, whole, histogram=True, sample=True)
    window, guess = whole, None
    if sample is not None:
        window, guess = _guess(sample[0], rank / size)
    if function_at_guess is None:
        guess = None
    while True:
        beside = None
        if guess is None:
            (counts,) = yield Reduction(function, window, histogram=True)
        else:
            arguments = window, guess.view(np.float32)
            counts, beside = yield Reduction(
                function_at_guess, arguments, histogram=True
            )
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
            found = low.astype(np.int32)
            if guess is None:
                return found.view(np.float32), None
            lows = window.low.tolist()
            spans = zip(lows, guess.tolist(), found.tolist(), strict=True)
            between = sum(map(_between, counts, spans))
            return found.view(np.float32), Beside(beside, between)
        window, guess = _covering(low, high), None


def _covering(low: np.ndarray, high: np.ndarray) -> Window:
    """The finest window that covers the patterns [low, high)."""
    shift = [
        next(s for s in range(32) if (last - first - 1) >> s < BINS)
        for first, last in zip(low.tolist(), high.tolist(), strict=True)
    ]
    return Window(low.astype(np.int32), np.array(shift, np.int32))


def _guess(sample: np.ndarray, quantile: np.ndarray) -> tuple[Window, np.ndarray]:
    """A window of single patterns around a quantile of a sampled histogram.

    Returns:
      The window, and in it the pattern that is guessed for each model, (K,) int32.
      It has no more than 8 bits after the first, as the differences of bfloat16
      numbers mostly have: it often is the answer.
    """
    shift = int(_covering(np.zeros(1, np.int64), np.array([_END])).shift[0])
    lows, guesses = [], []
    for count, q in zip(sample, quantile, strict=True):
        total = np.cumsum(count[:BINS])
        place = int(np.searchsorted(total, max(1, round(q * total[-1]))))
        place = min(place, BINS - 1)  # a sample of NaNs has nothing to count
        inside = (q * total[-1] - total[place] + count[place]) / max(count[place], 1)
        pattern = int((place + inside) * (1 << shift))
        # Never from 0 on: the many entries that are exactly 0 are counted as "below",
        # and if the answer is among them, that settles it.
        lows.append(int(np.clip(pattern - BINS // 2, 1, _END - BINS)))
        guesses.append(max(place << shift, lows[-1]))
    window = Window(np.array(lows, np.int32), np.zeros(len(lows), np.int32))
    return window, np.array(guesses, np.int32)


def _between(count: np.ndarray, span: tuple[int, int, int]) -> int:
    """How many magnitudes are in [guess, found) or the reverse, of one model.

    Args:
      count: histogram of a window of single patterns.
      span: the window's first pattern, the guess and the answer. What lies between
        them below the window can only be 0.
    """
    low, *ends = span
    first, last = (max(end - low, 0) for end in sorted(ends))
    return int(count[first:last].sum())
