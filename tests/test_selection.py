"""The k-th smallest magnitude by counting, against NumPy's partition: to the bit."""

from __future__ import annotations

from typing import Any

import functions
import jax
import numpy as np
import pytest
from grids import thin
from hypothesis import given, settings
from hypothesis import strategies as st

from m3jax.engine.kernel import Numbers, Program, Reducing, reduce
from m3jax.methods import METHODS, selection, sums
from m3jax.methods.step import Operands, Problem, Reduction, run_statistics

INFINITY = 0x7F800000  # its bit pattern, the largest of a magnitude
SMALLEST = np.float32(1e-45)  # denormal
SIZE = 37  # of the property test: one size, one compilation

_random = np.random.default_rng(0)
_normal = _random.normal(0, 0.02, 1001).astype(np.float32)

# Few sizes, since each is compiled.
DATA = {
    "one value": np.float32([-3.5]),
    "one zero": np.float32([-0.0]),
    "zeros": np.zeros(1001, np.float32),
    "zeros of both signs": np.float32([0.0, *[-0.0, 0.0] * 500]),
    "equal": np.full(1001, -0.125, np.float32),
    "few distinct": _random.choice(np.float32([0, 1, -1, 2e-3, 5e8]), 1001),
    "normal": _normal,
    "like bfloat16": (_normal.view(np.uint32) & 0xFFFF0000).view(np.float32),
    "mostly zeros": np.where(_random.random(1001) < 0.9, 0, _normal),
    "denormal": np.arange(1001).astype(np.uint32).view(np.float32),
    "denormal and zeros": np.float32([0, SMALLEST, 0, 2 * SMALLEST, 0]),
    "infinite": np.float32([np.inf, 1, -np.inf, 2, np.inf]),
    "all infinite": np.full(1001, -np.inf, np.float32),
    "every exponent": _random.integers(0, INFINITY, 4097, np.uint32).view(np.float32),
    "neighbours": (
        np.float32(1).view(np.uint32) + np.arange(1001, dtype=np.uint32)
    ).view(np.float32),
    "ends of bins": np.arange(0, INFINITY, 1 << 15, np.uint32).view(np.float32),
    "just below ends": np.arange((1 << 15) - 1, INFINITY, 1 << 15, np.uint32).view(
        np.float32
    ),
    "largest": np.float32([np.finfo(np.float32).max, 1e38, np.inf, 0, 1]),
}
MISLEADING = {
    "zeros": np.zeros(64, np.float32),
    "small": np.full(64, 1e-30, np.float32),
    "large": np.full(64, 1e30, np.float32),
    "infinite": np.full(64, np.inf, np.float32),
    "not numbers": np.full(64, np.nan, np.float32),
    "odd not-numbers": np.full(64, 0x7FFFFFFF, np.uint32).view(np.float32),
    "another spread": np.linspace(-5, 5, 64).astype(np.float32),
}


@pytest.mark.parametrize("values", DATA.values(), ids=DATA)
def test_equals_partition(values: np.ndarray):
    size = values.size
    for rank in sorted(
        {1, 2, size // 3, size // 2, size - 1, size} & {*range(1, size)}
    ):
        found, passes = find(values[None], [rank])
        assert_same(found[0], kth(values, rank))
        assert passes <= 2
    for rank in (1, size):
        assert_same(find(values[None], [rank])[0][0], kth(values, rank))


@pytest.mark.parametrize(("name", "misleading"), thin(DATA, [None, *MISLEADING]))
def test_a_sample_changes_no_result(name: str, misleading: str | None):
    values = DATA[name]
    sample = values[::7] if misleading is None else MISLEADING[misleading]
    for rank in (1, max(1, values.size // 2), values.size):
        found, passes = find(values[None], [rank], sample=sample[None])
        assert_same(found[0], kth(values, rank))
        assert passes <= 3


def test_a_good_sample_saves_a_pass():
    values = _random.normal(0, 0.02, 200_000).astype(np.float32)[None]
    rank = [values.size // 2]
    assert find(values, rank)[1] == 2
    found, passes = find(values, rank, sample=values)
    assert passes == 1
    assert_same(found[0], kth(values[0], rank[0]))


@pytest.mark.parametrize("name", DATA)
def test_a_guess_that_is_checked_changes_no_result(name: str):
    values = DATA[name]
    for sample in (values, MISLEADING["another spread"]):
        for rank in (1, max(1, values.size // 2), values.size):
            found, _ = find(values[None], [rank], sample=sample[None], at_hand=True)
            assert_same(found[0], kth(values, rank))


@pytest.mark.parametrize("name", ["like bfloat16", "mostly zeros", "equal"])
def test_a_right_guess_needs_no_histogram(name: str):
    values, asked = np.stack([DATA[name]] * 2), []
    ranks = [values.shape[1] // 2] * 2
    found, passes = find(values, ranks, sample=values, at_hand=True, asked=asked)
    assert (passes, asked) == (1, [("sum", "sum")])
    assert_same(found[1], kth(values[1], ranks[1]))


def test_models_have_their_own_threshold():
    values = np.stack([_normal, _normal * 1e6, np.zeros_like(_normal)])
    ranks = [1, 700, 1001]
    found, _ = find(values, ranks)
    for own, rank, threshold in zip(values, ranks, found, strict=True):
        assert_same(threshold, kth(own, rank))


def test_task_vectors():
    base = _random.normal(0, 0.02, 1001).astype(np.float32)
    stack = np.stack([_normal, -_normal])
    found = run_statistics(
        kth_smallest(sums.deltas, [500, 1], 1001),
        lambda reduction: functions.answer(reduction, base, stack),
    )
    assert_same(found[0], kth(stack[0] - base, 500))
    assert_same(found[1], kth(stack[1] - base, 1))


def test_counts_add_up_over_chunks():
    values = DATA["every exponent"]
    found, _ = find(values[None], [2000], pieces=5)
    assert_same(found[0], kth(values, 2000))


def test_ranks_among_nans_are_infinite():
    values = np.float32([1, np.nan, 3, np.nan])
    assert [find(values[None], [rank])[0][0] for rank in (1, 2, 3, 4)] == [
        1,
        3,
        np.inf,
        np.inf,
    ]


def test_padding_is_not_counted():
    x = Operands(None, jax.numpy.asarray(np.float32([[5, 6, 0, 0]])))
    window = {"low": np.zeros((1, 1), np.int32), "shift": np.full((1, 1), 16, np.int32)}
    program = Program((), METHODS["average"]())
    codes = selection.Codes(sums.weights)
    for count in (True, False):
        how = Reducing(program, codes, ("histogram",), count)
        real = np.arange(1024)[None] < 2
        (found,) = reduce(x, Numbers((), ()), None, window, real, how)
        if not count:
            found = selection.count_codes_on_host(np.asarray(found)[0])
        assert int(np.asarray(found).sum()) == 2


@pytest.mark.parametrize(("low", "shift"), thin([0, 1 << 16, INFINITY - 5], [0, 7, 15]))
def test_counting_on_host_and_device_agree(low: int, shift: int):
    values = np.concatenate([*DATA.values()])[None]
    window = {"low": np.int32([[low]]), "shift": np.int32([[shift]])}
    codes = selection.magnitude_codes(jax.numpy.asarray(values), window)
    device = np.asarray(selection.count_codes(codes))
    host = selection.count_codes_on_host(np.asarray(codes))
    np.testing.assert_array_equal(device, host)
    inside = (patterns(values[0]).astype(np.int64) - low) >> shift
    expected = np.bincount(
        inside[(inside >= 0) & (inside < selection.BINS)], minlength=selection.BINS
    )
    np.testing.assert_array_equal(host[0, : selection.BINS], expected)
    assert host[0, selection.BINS] == np.count_nonzero(patterns(values[0]) < low)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_values(data: st.DataObject):
    pattern = st.integers(0, INFINITY) | st.sampled_from([0, 1, 2, INFINITY])
    drawn = data.draw(st.lists(pattern, min_size=SIZE, max_size=SIZE))
    sampled = data.draw(st.none() | st.lists(pattern, min_size=8, max_size=8))
    rank = data.draw(st.integers(1, SIZE))
    values = np.array(drawn, np.uint32).view(np.float32)
    sample = (
        None if sampled is None else np.array([sampled], np.uint32).view(np.float32)
    )
    found, passes = find(values[None], [rank], sample=sample)
    assert_same(found[0], kth(values, rank))
    assert passes <= 3


def find(
    values: np.ndarray,
    ranks: list[int],
    *,
    sample: np.ndarray | None = None,
    pieces: int = 1,
    at_hand: bool = False,
    asked: list[tuple[str, ...]] | None = None,
) -> tuple[np.ndarray, int]:
    """The thresholds of (K, n) values, and the number of whole passes it took.

    `asked` receives what each of them counts.
    """
    passes = 0

    def answer(reduction: Reduction) -> Any:
        nonlocal passes
        if reduction.sample:
            return None if sample is None else functions.count(reduction, None, sample)
        passes += 1
        if asked is not None:
            asked.append(reduction.combine)
        parts = np.array_split(values, pieces, axis=1)
        counts = [functions.count(reduction, None, part) for part in parts]
        return jax.tree.map(lambda *own: sum(own), *counts)

    generator = kth_smallest(sums.weights, ranks, values.shape[1], at_hand)
    return run_statistics(generator, answer), passes


def kth_smallest(
    function: Any, ranks: list[int], size: int, at_hand: bool = False
) -> Any:
    """The generator for ranks instead of rates: rates that give those ranks."""
    rates = np.array([(rank + 0.5) / size for rank in ranks])
    rates = np.minimum(rates, 1.0)
    assert (rates * size).astype(np.int64).tolist() == ranks
    problem = Problem(len(ranks), size, {}, at_hand=at_hand)
    return selection.kth_smallest(function, rates, problem)


def kth(values: np.ndarray, rank: int) -> np.float32:
    """By sorting bit patterns, whose order is the magnitudes': no denormal is lost."""
    return np.partition(patterns(values), rank - 1)[rank - 1 :][:1].view(np.float32)[0]


def patterns(values: np.ndarray) -> np.ndarray:
    return np.abs(values).view(np.uint32)


def assert_same(found: np.float32, expected: np.float32) -> None:
    assert found.dtype == np.float32
    assert found.tobytes() == expected.tobytes(), (found, expected)
