"""Intervals of scores by resampling the examples, seeded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

_SAMPLES = 2000
_BLOCK = 1 << 22  # indices held at a time
_PERCENT = (2.5, 97.5)

Interval = tuple[float, float]


def resampled(
    examples: Mapping[str, Sequence[float]], seed: int
) -> dict[str, np.ndarray]:
    """Means over examples drawn with replacement, for each task.

    Draws depend on the seed, on the task's place and on its number of examples, so
    that two sets of parameters are resampled alike and can be compared in pairs.

    Returns:
      (samples,) float64 for each task.
    """
    return {
        task: _means(np.asarray(own, np.float64), np.random.default_rng([seed, place]))
        for place, (task, own) in enumerate(examples.items())
    }


def interval(samples: np.ndarray) -> Interval | None:
    """The middle 95 % of resampled values; None among NaN."""
    if not np.all(np.isfinite(samples)):
        return None
    low, high = np.percentile(samples, _PERCENT)
    return float(low), float(high)


def _means(scores: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    step = max(1, _BLOCK // len(scores))
    parts = []
    for start in range(0, _SAMPLES, step):
        count = min(step, _SAMPLES - start)
        chosen = generator.integers(len(scores), size=(count, len(scores)))
        parts.append(scores[chosen].mean(axis=1))
    return np.concatenate(parts)
