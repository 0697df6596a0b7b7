"""The k-th smallest magnitude of any number of float32 values, exactly, by counting.

The bits of |x|, read as an integer, have the order of the magnitudes. A histogram of
those integers over a window finds the bin that holds the k-th smallest, and a second
one over that bin finds it to the bit. Histograms add up over chunks, tensors and
hosts: no sort, and nothing of the model's size in memory.

A sample of the values first tells where to put a window fine enough that one reading
pass nearly always suffices. It decides how many passes there are, never the result.

Of few values, those of a small tensor, a histogram is mostly zeros: they are looked at
themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import numpy as np

from m3jax.lazy import jax, jnp
from m3jax.methods.step import Numbers, Operands, Problem, Reduction
from m3jax.traced import is_traced

# Counters per model. Codes of 16 bits then say where a value falls, two of them
# standing for "below" and "above". Two histograms resolve every magnitude up to
# infinity, and as a window around a sampled threshold they span ±0.2 to 0.4 % of it.
BINS = (1 << 16) - 2
_BELOW, ABOVE = BINS, BINS + 1
_END = 0x7F800001  # one past the pattern of infinity
# Elements of a group that are sorted rather than counted, where the engine can. Sorting
# as many takes as long as making and summing up the histograms.
FEW = 1 << 16


class Window(NamedTuple):
    """Per model, bin b counts patterns [low + (b << shift), low + (b+1 << shift))."""

    low: np.ndarray  # (K,) int32
    shift: np.ndarray  # (K,) int32


def magnitudes(values: jax.Array) -> jax.Array:
    """|x| in float32, in which magnitudes are compared whatever the inputs are."""
    return jnp.abs(values).astype(jnp.float32)


def magnitude_codes(values: jax.Array, window: Numbers) -> jax.Array:
    """Which bin of a window the magnitude of each value falls into.

    Args:
      values: (K, ...) float32.
      window: ``low`` and ``shift`` of `Window`, ready to broadcast; for J = m · K rows,
        the first K of which are of the K rows of values, and so on.

    Returns:
      (J, ...) uint16: the bin, or `BINS` below the window, `BINS` + 1 above it.
    """
    bits = _patterns(values)
    bits = jnp.concatenate([bits] * (len(window["low"]) // len(bits)))
    shift = jnp.broadcast_to(window["shift"], bits.shape)
    bins = jnp.right_shift(bits - window["low"], shift)
    codes = jnp.where(bins < BINS, bins, ABOVE)
    return jnp.where(bits < window["low"], _BELOW, codes).astype(jnp.uint16)


def _patterns(values: jax.Array) -> jax.Array:
    """The bits of the magnitudes as int32, whose order is theirs."""
    return jax.lax.bitcast_convert_type(magnitudes(values), jnp.int32)


def count_codes(codes: jax.Array) -> jax.Array:
    """(K, BINS + 1) int32: how often each code but the last occurs, on a device.

    Args:
      codes: (K, ...) uint16, of `magnitude_codes`.
    """

    def count(codes: jax.Array) -> jax.Array:
        zeros = jnp.zeros(BINS + 2, jnp.int32)
        where = codes.reshape(-1).astype(jnp.int32)
        return zeros.at[where].add(1, mode="promise_in_bounds")[:ABOVE]

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
            count[:] = np.bincount(own, minlength=BINS + 2)[:ABOVE]
    return counts


@dataclasses.dataclass(frozen=True)
class Codes:
    """`magnitude_codes` of some values, for a `Reduction` to a histogram.

    Attributes:
      of: (operands, arguments) -> (K, ...) float32; a function of a module.
    """

    of: Callable[[Operands, Numbers], Any]

    def __call__(self, x: Operands, arguments: Numbers) -> tuple[jax.Array]:
        return (magnitude_codes(self.of(x, arguments), arguments),)


@dataclasses.dataclass(frozen=True)
class _Patterns:
    """The patterns of the same values themselves."""

    of: Callable[[Operands, Numbers], Any]

    def __call__(self, x: Operands, arguments: Numbers) -> tuple[jax.Array]:
        return (_patterns(self.of(x, arguments)),)


@dataclasses.dataclass(frozen=True)
class _Around:
    """Of the same values, which magnitudes are below ``guess``, and which are equal."""

    of: Callable[[Operands, Numbers], Any]

    def __call__(self, x: Operands, arguments: Numbers) -> tuple[Any, Any]:
        guess, bits = arguments["guess"], _patterns(self.of(x, arguments))
        rows = [(bits[j % len(bits)], own) for j, own in enumerate(guess)]
        return [own < at for own, at in rows], [own == at for own, at in rows]


class Beside(NamedTuple):
    """What the pass that found the answer has counted beside it.

    Attributes:
      counts: the sum of the function's second array, with ``guess`` for the answer.
      between: how many magnitudes lie between the guess and the answer, so that they
        are on another side of the one than of the other; zeros do not count.
    """

    counts: Any
    between: int


def kth_smallest(
    values: Any, rates: Any, problem: Problem, none: float = 0.0
) -> Generator[Reduction, Any, Any]:
    """The k-th smallest magnitude of each model in a group of n elements, k = int(n·r).

    Args:
      values: whose magnitudes: what `Codes` takes, such as `sums.deltas`.
      rates: r, () or (K,), from 0 to 1; (J,) with J = m · K for m ranks of each model.
      problem: the group; its `num_models` is J.
      none: the answer where k = 0.

    Yields:
      The reading passes it needs: usually a sample and one pass, at most a sample
      and three passes.

    Returns:
      (K,) float32; a rank among NaNs gives infinity.
    """
    found, _ = yield from kth_smallest_and(values, None, rates, problem, none)
    return found


def kth_smallest_and(
    values: Any,
    function_at_guess: Any,
    rates: Any,
    problem: Problem,
    none: float = 0.0,
) -> Generator[Reduction, Any, tuple[Any, Beside | None]]:
    """`kth_smallest`, counting something else in the same pass.

    Args:
      values, rates, problem, none: as for `kth_smallest`.
      function_at_guess: (operands, window and ``guess``) -> codes and integers, where
        ``guess`` is what the sample says of the answer; None counts nothing else.

    Yields:
      The same reading passes.

    Returns:
      The answer, and what was counted; None where the answer took more than one pass
      over everything.
    """
    function = Codes(values)
    if problem.traced or is_traced(rates):
        found = yield from _in_two_passes(function, rates, problem, none)
        return found, None
    count = problem.num_models
    rank = (np.broadcast_to(rates, count) * problem.size).astype(np.int64)
    absent = np.float32(none)
    if not rank.any():
        return np.full(count, absent), None
    asked, rank = rank, np.maximum(rank, 1)
    if problem.few:
        (patterns,) = yield Reduction(_Patterns(values), {}, ("values",))
        found = _sorted_out(patterns, rank)
        return np.where(asked > 0, found, absent), None
    low = np.zeros(count, np.int64)  # the answer's pattern is in [low, high)
    high = np.full(count, _END, np.int64)
    whole = _covering(low, high)
    sample = yield Reduction(function, whole._asdict(), ("histogram",), sample=True)
    window, guess = whole, None
    if sample is not None:
        window, guess = _guess(sample[0], rank / problem.size)
        if problem.at_hand:
            at = np.where(guess > 1, guess, 0)  # `_guess` never says 0
            around = Reduction(_Around(values), {"guess": at}, ("sum", "sum"))
            below, equal = yield around
            if np.all((below < rank) & (rank <= below + equal)):
                return np.where(asked > 0, at.view(np.float32), absent), None
    if function_at_guess is None:
        guess = None
    while True:
        beside = None
        if guess is None:
            (counts,) = yield Reduction(function, window._asdict(), ("histogram",))
        else:
            arguments = {**window._asdict(), "guess": guess.view(np.float32)}
            counts, beside = yield Reduction(
                function_at_guess, arguments, ("histogram", "sum")
            )
        for i, bins in enumerate(counts):
            first, shift = int(window.low[i]), int(window.shift[i])
            below = int(bins[_BELOW])
            if rank[i] <= below:
                high[i] = min(high[i], first)
                continue
            place = int(np.searchsorted(below + np.cumsum(bins[:BINS]), rank[i]))
            low[i] = min(max(low[i], first + (place << shift)), high[i] - 1)
            if place < BINS:
                high[i] = min(high[i], first + ((place + 1) << shift))
        if np.all(high - low == 1):
            found = low.astype(np.int32)
            answer = np.where(asked > 0, found.view(np.float32), absent)
            if guess is None:
                return answer, None
            lows = window.low.tolist()
            spans = zip(lows, guess.tolist(), found.tolist(), strict=True)
            between = sum(map(_between, counts, spans))
            return answer, Beside(beside, between)
        window, guess = _covering(low, high), None


def _sorted_out(patterns: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """(J,) float32: the values of these ranks, from 1 on, of (K, n) patterns."""
    found = np.empty(len(rank), np.int32)
    for i, own in enumerate(patterns):
        places = rank[i :: len(patterns)] - 1
        found[i :: len(patterns)] = np.partition(own, places)[places]
    return np.minimum(found, _END - 1).view(np.float32)  # a rank among NaNs


def _in_two_passes(
    function: Any, rates: Any, problem: Problem, none: float
) -> Generator[Reduction, Any, Any]:
    """The same under a transformation: one histogram of 2^15 patterns a bin, and one
    of single patterns in the bin that holds the answer."""
    rank = jnp.floor(jnp.asarray(rates) * problem.size)
    rank = jnp.broadcast_to(rank.astype(jnp.int32), (problem.num_models,))
    low = jnp.zeros(problem.num_models, jnp.int32)
    for shift in (15, 0):
        window = {"low": low, "shift": jnp.full_like(low, shift)}
        (counts,) = yield Reduction(function, window, ("histogram",))
        total = counts[:, _BELOW:] + jnp.cumsum(counts[:, :BINS], axis=1)
        place = jnp.sum(total < jnp.maximum(rank, 1)[:, None], axis=1, dtype=jnp.int32)
        low = low + (place << shift)
    low = jnp.minimum(low, _END - 1)  # a rank among NaNs
    found = jax.lax.bitcast_convert_type(low, jnp.float32)
    return jnp.where(rank > 0, found, jnp.float32(none))


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
