"""An evaluator of lm-evaluation-harness's tasks, for explorations."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from m3jax.evaluation.harness.model import HarnessModel
from m3jax.evaluation.harness.tasks import find_tasks, run_tasks
from m3jax.evaluation.running import up_to_depth
from m3jax.models.config import Config
from m3jax.models.layers import Parameters
from m3jax.models.parameters import padded
from m3jax.models.tokenizer import Tokenizer


class HarnessEvaluator:
    """Scores parameters at tasks by name; each by its first metric.

    Where less of a metric is better, its negative is the score, under "−task".
    """

    in_parts = False  # a budget is of the first examples

    def __init__(
        self,
        names: Sequence[str],
        config: Config,
        tokenizer: Tokenizer,
        *,
        folder: str | None = None,
        allow_code_execution: bool = False,
        **options: Any,
    ):
        """
        Args:
          names: of tasks, groups or tags.
          config, tokenizer: of the model.
          folder: of more tasks, as YAML.
          allow_code_execution: run programs that the model writes.
          options: of `HarnessModel`.

        Raises:
          TaskError: there is no such task.
        """
        self._names = tuple(names)
        self._manager = find_tasks(names, folder)
        self._allow = allow_code_execution
        self._made = config, tokenizer, options

    def __call__(
        self, parameters: Parameters, budget: int | None, key: jax.Array
    ) -> Mapping[str, float]:
        """See `Evaluator`; the budget is examples of each task."""
        return self.answered(parameters, budget, key)[0]

    def answered(
        self, parameters: Parameters, budget: int | None, key: jax.Array
    ) -> tuple[dict[str, float], dict[str, list[str]]]:
        """The scores, and the answers of the tasks that have some: what the model
        wrote, as the task's filters leave it, or which choice is the likeliest."""
        config, tokenizer, options = self._made
        model = HarnessModel(
            padded(parameters, config), config, tokenizer, key=key, **options
        )
        seed = int(jax.random.key_data(key)[-1])
        found: dict[str, float] = {}
        answers: dict[str, list[str]] = {}
        for result in run_tasks(
            model,
            self._names,
            self._manager,
            limit=budget,
            seed=seed,
            allow_code_execution=self._allow,
        ):
            name = result.task if result.higher_is_better else f"−{result.task}"
            sign = 1 if result.higher_is_better else -1
            found.setdefault(name, sign * result.mean)
            told = [_answer(record["output"]) for record in result.records]
            if told and None not in told:
                answers[result.task] = list(map(str, told))
        return found, answers

    def of_layers(self, layers: Sequence[int]) -> HarnessEvaluator:
        """As that of `TaskEvaluator`."""
        made = copy.copy(self)
        config, tokenizer, options = self._made
        made._made = config.of_layers(up_to_depth(layers)), tokenizer, options
        return made

    def fingerprint(self) -> list[str]:
        """What a resumed exploration has to have in common with the first one."""
        return ["lm-evaluation-harness", *self._names]


def _answer(output: Sequence[Any]) -> str | int | None:
    """Of a record of the harness: texts, or (log-likelihood, greedy) of each choice."""
    if all(isinstance(own, str) for own in output):
        return "\n".join(output)
    if len(output) < 2 or any(len(own) != 2 for own in output):
        return None  # a log-likelihood is no answer
    likelihoods = [likelihood for likelihood, _ in output]
    return likelihoods.index(max(likelihoods))
