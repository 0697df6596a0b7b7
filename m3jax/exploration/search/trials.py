"""Trials: a draw, the budget it was evaluated at, and what it scored."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from m3jax.recipe import Recipe

Scores = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Trial:
    """One evaluation of one draw.

    Attributes:
      index: of the draw, from 0.
      budget: of the evaluation; None: all there is.
      recipe, seed: that make the draw again.
      ratios: per group of tensors; None where M3 is off.
      scores: on the validation tasks, by name.
      objective: what is maximised; NaN where a score is.
      other: scores on lists of tasks that nothing is chosen on, if asked for.
    """

    index: int
    budget: int | None
    recipe: Recipe
    seed: int
    ratios: dict[str, tuple[float, ...]] | None
    scores: Scores
    objective: float
    other: dict[str, Scores] = dataclasses.field(default_factory=dict)

    @property
    def mean_ratios(self) -> tuple[float, ...] | None:
        """The ratios, averaged over the groups that were drawn for."""
        if not self.ratios:
            return None
        groups = list(self.ratios.values())
        columns = zip(*groups, strict=True)
        return tuple(math.fsum(column) / len(groups) for column in columns)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; null for what is not finite."""
        return {
            "index": self.index,
            "budget": self.budget,
            "seed": self.seed,
            "ratios": self.ratios,
            "objective": finite(self.objective),
            "scores": all_finite(self.scores),
            **{name: all_finite(scores) for name, scores in self.other.items()},
            "recipe": self.recipe.to_dict(),
        }

    @classmethod
    def from_dict(cls, line: Mapping[str, Any]) -> Trial:
        known = {"index", "budget", "seed", "ratios", "objective", "scores", "recipe"}
        ratios = line["ratios"]
        return cls(
            index=line["index"],
            budget=line["budget"],
            recipe=Recipe.from_dict(line["recipe"]),
            seed=line["seed"],
            ratios=ratios and {name: tuple(own) for name, own in ratios.items()},
            scores=numbers(line["scores"]),
            objective=number(line["objective"]),
            other={k: numbers(v) for k, v in line.items() if k not in known},
        )


def best(trials: Sequence[Trial], count: int) -> list[Trial]:
    """The trials of highest objective, the earlier one where two are equal."""

    def rank(trial: Trial) -> tuple[bool, float, int]:
        lost = math.isnan(trial.objective)
        return lost, 0.0 if lost else -trial.objective, trial.index

    return sorted(trials, key=rank)[:count]


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def all_finite(scores: Mapping[str, float]) -> dict[str, float | None]:
    return {name: finite(value) for name, value in scores.items()}


def number(value: float | None) -> float:
    return math.nan if value is None else value


def numbers(scores: Mapping[str, float | None]) -> Scores:
    return {name: number(value) for name, value in scores.items()}
