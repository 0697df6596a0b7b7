"""Trials: a draw, the budget it was evaluated at, and what it scored."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from m3jax import programs
from m3jax.evaluation.results import as_json
from m3jax.programs import Block
from m3jax.recipe import Recipe

Scores = dict[str, float]
Answers = dict[str, list[str]]  # task -> of each example


@dataclasses.dataclass(frozen=True)
class Proposal:
    """A merge that is to be evaluated: recipe and seed fix every number of it.

    Attributes:
      index: of the draw, from 0.
      recipe, seed: that make it.
      budget: of the evaluation; None: all there is.
      part: which part of that size of what there is to evaluate on.
    """

    index: int
    recipe: Recipe
    seed: int
    budget: int | None
    part: int = 0


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
      answers: of the validation tasks, by name, to a search that looks at them.
      part: as for `Proposal`.
    """

    index: int
    budget: int | None
    recipe: Recipe
    seed: int
    ratios: dict[str, tuple[float, ...]] | None
    scores: Scores
    objective: float
    other: dict[str, Scores] = dataclasses.field(default_factory=dict)
    answers: Answers | None = None
    part: int = 0

    @property
    def proposal(self) -> Proposal:
        return Proposal(self.index, self.recipe, self.seed, self.budget, self.part)

    @functools.cached_property
    def program(self) -> list[Block] | None:
        """Which layers of which models it is made of; None where it is a merge."""
        return programs.of_recipe(self.recipe)

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
        found: dict[str, Any] = as_json(
            {
                "index": self.index,
                "budget": self.budget,
                **({"part": self.part} if self.part else {}),
                "seed": self.seed,
                "ratios": self.ratios,
                "objective": self.objective,
                "scores": self.scores,
                **self.other,
                **({} if self.answers is None else {"answers": self.answers}),
                "recipe": self.recipe.to_dict(),
            }
        )
        return found

    @classmethod
    def from_dict(cls, line: Mapping[str, Any]) -> Trial:
        known = {field.name for field in dataclasses.fields(cls)} - {"other"}
        ratios = line["ratios"]
        return cls(
            index=line["index"],
            budget=line["budget"],
            recipe=Recipe.from_dict(line["recipe"]),
            seed=line["seed"],
            ratios=ratios and {name: tuple(own) for name, own in ratios.items()},
            scores=with_nan(line["scores"]),
            objective=with_nan(line["objective"]),
            other={k: with_nan(v) for k, v in line.items() if k not in known},
            answers=line.get("answers"),
            part=line.get("part", 0),
        )


def best(trials: Sequence[Trial], count: int) -> list[Trial]:
    """The trials of highest objective, the earlier one where two are equal."""

    def rank(trial: Trial) -> tuple[bool, float, int]:
        lost = math.isnan(trial.objective)
        return lost, 0.0 if lost else -trial.objective, trial.index

    return sorted(trials, key=rank)[:count]


def at_the_largest_budget(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that were evaluated on the most; None stands for all there is."""
    budgets = [math.inf if t.budget is None else t.budget for t in trials]
    largest = max(budgets)
    return [t for t, own in zip(trials, budgets, strict=True) if own == largest]


def with_nan(value: Any) -> Any:
    """What `as_json` was given: NaN for each null."""
    if isinstance(value, dict):
        return {name: with_nan(part) for name, part in value.items()}
    if isinstance(value, list):
        return [with_nan(part) for part in value]
    return math.nan if value is None else value
