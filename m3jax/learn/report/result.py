"""What was learned."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from m3jax.evaluation.results import Result
from m3jax.recipe import Recipe
from m3jax.runs import bootstrap


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A task's scores before and after, on the same examples.

    Attributes:
      task, metric: of the results.
      start, learned: means.
      gain: learned less start, and the middle 95 % of it when the examples are drawn
        again, in pairs. A loss counts negative, so that more is better.
    """

    task: str
    metric: str
    start: float
    learned: float
    gain: float
    interval: tuple[float, float] | None


@dataclasses.dataclass(frozen=True)
class Learning:
    """What a run has found.

    Attributes:
      recipe, seed, statistics: `m3jax.merge_params(base, models, recipe, seed,
        statistics=statistics)` makes the model; the last are pytrees of coefficients,
        one for each model, where they are by column or element, else none.
      coefficients: (K, ...) of each tensor that is merged, float32.
      losses: of each step, regularisers included, before it.
      looks: (step, loss) on validation.
      step: whose coefficients these are.
      comparisons: of the test tasks, the last one of their mean.
      replay: what `m3jax merge --config` reads.
    """

    recipe: Recipe
    seed: int
    statistics: tuple[Any, ...]
    coefficients: dict[str, np.ndarray]
    losses: tuple[float, ...]
    looks: tuple[tuple[int, float], ...]
    step: int
    comparisons: tuple[Comparison, ...] = ()
    replay: dict[str, Any] = dataclasses.field(default_factory=dict)


def compared(
    start: list[Result], learned: list[Result], seed: int
) -> tuple[Comparison, ...]:
    """The results at the same tasks, and the mean of all where there are several."""
    signs = [-1.0 if own.metric == "loss" else 1.0 for own in start]
    scores = [
        {
            own.task: (sign * own.scores).tolist()
            for own, sign in zip(results, signs, strict=True)
        }
        for results in (start, learned)
    ]
    before, after = (bootstrap.resampled(own, seed) for own in scores)
    differences = {task: after[task] - before[task] for task in before}
    found = [
        Comparison(
            old.task,
            old.metric,
            old.mean,
            new.mean,
            sign * (new.mean - old.mean),
            bootstrap.interval(differences[old.task]),
        )
        for old, new, sign in zip(start, learned, signs, strict=True)
    ]
    if len(found) > 1:
        mean = sum(differences.values()) / len(differences)
        found.append(
            Comparison(
                "mean",
                found[0].metric if len({own.metric for own in start}) == 1 else "gain",
                float(np.mean([own.start for own in found])),
                float(np.mean([own.learned for own in found])),
                float(np.mean([own.gain for own in found])),
                bootstrap.interval(mean),
            )
        )
    return tuple(found)
