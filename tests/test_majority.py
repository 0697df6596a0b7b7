"""TIES's majority sign, which is often known before the threshold is: it is exact."""

from __future__ import annotations

from typing import Any

import functions
import ml_dtypes
import numpy as np
import pytest
from grids import thin

from m3jax.methods import METHODS
from m3jax.methods.step import Problem, Reduction, run_statistics

SIZE = 200_000


def found(
    task_vectors: np.ndarray, sample: np.ndarray | None, trim_rate: float
) -> tuple[dict[str, Any], int]:
    """The statistics of (K, n) task vectors, and the whole passes that they took."""
    base = np.zeros(task_vectors.shape[1], np.float32)
    passes = 0

    def answer(reduction: Reduction) -> Any:
        nonlocal passes
        if reduction.sample:
            if sample is None:
                return None
            return functions.count(reduction, base[: sample.shape[1]], sample)
        passes += 1
        return functions.count(reduction, base, task_vectors)

    problem = Problem(*task_vectors.shape, {"trim_rate": np.float64(trim_rate)})
    generator = METHODS["ties"]().measure(problem)
    return run_statistics(generator, answer), passes


def expected(task_vectors: np.ndarray, trim_rate: float) -> tuple[np.ndarray, float]:
    magnitudes = np.sort(np.abs(task_vectors), axis=1)
    thresholds = magnitudes[:, int(task_vectors.shape[1] * trim_rate) - 1]
    kept = np.abs(task_vectors) >= thresholds[:, None]
    total = np.where(kept, task_vectors, 0).astype(np.float64).sum(axis=0)
    return thresholds, float(np.sign(np.sign(total).sum()))


def check(task_vectors: np.ndarray, sample: np.ndarray | None, trim_rate: float) -> int:
    info, passes = found(task_vectors, sample, trim_rate)
    thresholds, majority = expected(task_vectors, trim_rate)
    np.testing.assert_array_equal(info["thresholds"], thresholds)
    assert info["majority"] == majority
    return passes


def differences(seed: int, shift: float = 0.0, num_models: int = 2) -> np.ndarray:
    """Differences of bfloat16 numbers: few magnitudes, each of many entries."""
    random = np.random.default_rng(seed)
    base = random.normal(0, 0.02, SIZE).astype(ml_dtypes.bfloat16)
    steps = random.normal(shift, 1e-4, (num_models, SIZE))
    models = (base.astype(np.float32) + steps).astype(ml_dtypes.bfloat16)
    return models.astype(np.float32) - base.astype(np.float32)


@pytest.mark.parametrize(
    ("seed", "trim_rate", "num_models"), thin(range(6), [0.3, 0.5, 0.9], [2, 3])
)
def test_few_magnitudes(seed: int, trim_rate: float, num_models: int):
    task_vectors = differences(seed, num_models=num_models)
    passes = check(task_vectors, task_vectors[:, ::10], trim_rate)
    assert passes == 1  # for thresholds and majority together


@pytest.mark.parametrize(("seed", "shift"), thin(range(6), [-3e-3, 0.0, 3e-3]))
def test_many_magnitudes(seed: int, shift: float):
    random = np.random.default_rng(seed)
    task_vectors = random.normal(shift, 1, (2, SIZE)).astype(np.float32)
    check(task_vectors, task_vectors[:, ::10], 0.5)


@pytest.mark.parametrize("factor", [0.9, 0.999, 1.001, 1.1])
def test_a_sample_that_misleads(factor: float):
    """The sample's threshold lies elsewhere: what is between could turn the sign."""
    random = np.random.default_rng(1)
    task_vectors = random.normal(1e-3, 1, (2, SIZE)).astype(np.float32)
    check(task_vectors, task_vectors[:, ::10] * np.float32(factor), 0.5)


def test_what_is_between_turns_the_majority():
    """One magnitude that the guess keeps and the threshold trims outweighs the rest."""
    one = np.float32(1)
    low = (one.view(np.uint32) + np.uint32(40)).view(np.float32)
    high = (one.view(np.uint32) + np.uint32(60)).view(np.float32)
    row = np.concatenate(
        [np.full(60_000, 0.5), np.full(55_000, low), np.full(45_000, -high)]
    ).astype(np.float32)
    task_vectors = np.stack([row, row])
    sample = np.full((2, 1000), one, np.float32)
    assert check(task_vectors, sample, 0.5) == 1  # nothing is between
    assert check(task_vectors, sample, 0.75) == 2


def test_zeros_below_the_threshold_do_not_count():
    task_vectors = differences(3)
    task_vectors[:, : SIZE // 2] = 0  # then the threshold itself is 0
    assert check(task_vectors, task_vectors[:, ::10], 0.5) == 1
