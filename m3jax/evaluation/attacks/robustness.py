"""Scores of a model under attack, beside its scores without."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import jax

from m3jax.evaluation.attacks.prompts import Variants, attacked_prompt
from m3jax.evaluation.evaluator import TaskEvaluator
from m3jax.evaluation.results import Result
from m3jax.evaluation.tasks.task import Task
from m3jax.models.layers import Parameters


@dataclasses.dataclass(frozen=True)
class Robustness:
    """What an attack did to the score of a task.

    Attributes:
      attack: its name.
      prompt: the template that it found.
      clean, attacked: the results with the task's own prompt, and with that one.
    """

    attack: str
    prompt: str
    clean: Result
    attacked: Result

    @property
    def drop_rate(self) -> float:
        """(clean − attacked) / clean; NaN where there was nothing to lose."""
        clean, attacked = self.clean.mean, self.attacked.mean
        return (clean - attacked) / clean if clean > 0 else math.nan

    def to_dict(self) -> dict[str, object]:
        """All but the records."""
        return {
            "task": self.clean.task,
            "attack": self.attack,
            "clean": self.clean.mean,
            "attacked": self.attacked.mean,
            "drop_rate": self.drop_rate,
            "n": self.attacked.count,
            "prompt": self.prompt,
        }


def under_attack(
    tasks: Sequence[Task],
    attacks: Sequence[str],
    clean: Sequence[Result],
    parameters: Parameters,
    evaluator: Callable[[Task], TaskEvaluator],
    *,
    neighbours: Variants,
    examples: int,
    limit: int | None,
    seed: int,
) -> Iterator[Robustness]:
    """Attacks each task in each way.

    Args:
      tasks: with prompts that `attacks.check_attackable` accepts.
      attacks: names.
      clean: the result of each task with its own prompt.
      parameters: of the model under attack.
      evaluator: of a task, for this model.
      neighbours: of a word, for the attack on words.
      examples: the first of each task, on which an attack searches.
      limit: the first of each task, on which it is reported; None: all.
      seed: of attacks and sampling.
    """
    tried, key = min(examples, limit or examples), jax.random.key(seed)

    def run(task: Task, limit: int | None, prompt: str) -> Result:
        asked = evaluator(dataclasses.replace(task, prompt=prompt))
        (result,) = asked.evaluate(parameters, limit, key)
        return result

    def score(task: Task, prompt: str) -> float:
        return run(task, tried, prompt).mean

    for task, without in zip(tasks, clean, strict=True):
        tries = functools.partial(score, task)
        for attack in attacks:
            prompt = attacked_prompt(attack, task, tries, seed, neighbours)
            yield Robustness(attack, prompt, without, run(task, limit, prompt))
