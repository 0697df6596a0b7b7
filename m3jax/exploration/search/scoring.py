"""Scores parameters on the lists of tasks, and puts the scores into one number."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from m3jax.evaluation.evaluator import Evaluator, TaskEvaluator
from m3jax.evaluation.results import answers_of, as_json
from m3jax.evaluation.tasks.task import TaskError
from m3jax.exploration.search.trials import Answers, Scores, with_nan
from m3jax.models.layers import Parameters
from m3jax.recipe import RecipeError

Examples = dict[str, list[float]]  # task -> score of each example


@dataclasses.dataclass(frozen=True)
class Scored:
    """What parameters score on a list of tasks.

    Attributes:
      scores: by task.
      examples: of which the scores are means; None where the evaluator tells none.
      answers: in words; {} where the evaluator tells none. They are not kept.
    """

    scores: Scores
    examples: Examples | None = None
    answers: Answers | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values; null for what is not finite."""
        entry = {"scores": self.scores, "examples": self.examples}
        found: dict[str, Any] = as_json(entry)
        return found

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Scored:
        examples = entry["examples"]
        return cls(with_nan(entry["scores"]), examples and with_nan(examples))


@dataclasses.dataclass(frozen=True)
class Objective:
    """The weighted mean of scores: Σ w_t s_t / Σ |w_t|, a loss counting −w_t.

    Attributes:
      weights: by task; 1 where none is given.
      losses: the tasks of which less is better.
    """

    weights: Mapping[str, float]
    losses: frozenset[str] = frozenset()

    def __call__(self, scores: Mapping[str, Any]) -> Any:
        """Of numbers, or of arrays of them; NaN where a score is.

        Raises:
          RecipeError: a weight's task is not among the scores.
        """
        self.check(list(scores))
        return sum(self.parts(scores)) / math.fsum(map(abs, self._signed(scores)))

    def parts(self, scores: Mapping[str, Any]) -> list[Any]:
        """What each task adds, w_t s_t; more is better."""
        signed = self._signed(scores)
        return [w * s for w, s in zip(signed, scores.values(), strict=True)]

    def _signed(self, scores: Mapping[str, Any]) -> list[float]:
        return [
            self.weights.get(name, 1.0) * (-1 if name in self.losses else 1)
            for name in scores
        ]

    def check(self, names: list[str]) -> None:
        for name, weight in self.weights.items():
            if name not in names:
                raise RecipeError(
                    f"weights: {name!r} is no validation task; those are "
                    f"{', '.join(names)}"
                )
            if not math.isfinite(weight):
                raise RecipeError(f"weights: {name}={weight} needs a finite number")
        if names and not any(self.weights.get(name, 1.0) for name in names):
            raise RecipeError("weights: one of them needs to be other than 0")


def score(
    evaluator: Evaluator,
    parameters: Parameters,
    budget: int | None,
    key: jax.Array,
    answers: bool = False,
    *,
    part: int = 0,
    layers: Sequence[int] | None = None,
) -> Scored:
    """Evaluates; with the examples' own scores where the evaluator has them.

    Args:
      answers: ask for them, too.
      part: which examples: of tasks, the part-th `budget` of them; a function gets a
        key of its own, ``fold_in(key, part)``.
      layers: of the model that the evaluator knows, for each of the parameters' own;
        None: they are the same.
    """
    if layers is not None and hasattr(evaluator, "of_layers"):
        evaluator = evaluator.of_layers(layers)
    if not isinstance(evaluator, TaskEvaluator):
        key = jax.random.fold_in(key, part) if part else key
        found, told = _asked(evaluator, parameters, budget, key, answers)
        scores = {name: float(value) for name, value in found.items()}
        return Scored(
            scores, answers={name: list(map(str, own)) for name, own in told.items()}
        )
    results = evaluator.evaluate(parameters, budget, key, part)
    return Scored(
        {result.task: result.mean for result in results},
        {result.task: result.scores.tolist() for result in results},
        answers_of(results),
    )


def _asked(
    evaluator: Any, parameters: Parameters, budget: int | None, key: Any, answers: bool
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Scores and, if they are asked for, answers; by one evaluation where it can."""
    if not answers:
        return evaluator(parameters, budget, key), {}
    if hasattr(evaluator, "answered"):
        found, told = evaluator.answered(parameters, budget, key)
    else:
        found = evaluator(parameters, budget, key)
        told = evaluator.answers(parameters, budget, key)
    if not any(told.values()):
        raise TaskError("no validation task tells what the model answers")
    return found, told


def answering(evaluator: Evaluator) -> bool:
    """Whether it tells what the models answer, and not their scores alone."""
    if isinstance(evaluator, TaskEvaluator):
        return any(task.kind != "loss" for task in evaluator.tasks)
    return hasattr(evaluator, "answers") or hasattr(evaluator, "answered")


def losses(evaluator: Evaluator | None) -> frozenset[str]:
    """The tasks of which less is better; a function says so by a negative weight."""
    found: frozenset[str] = getattr(evaluator, "losses", frozenset())
    return found


def describe(evaluator: Evaluator | None) -> Any:
    """What a resumed exploration must have in common with the one it resumes."""
    if evaluator is None:
        return None
    if hasattr(evaluator, "fingerprint"):
        return evaluator.fingerprint()
    named = evaluator if hasattr(evaluator, "__qualname__") else type(evaluator)
    return f"{named.__module__}.{named.__qualname__}"
