"""Runs lm-evaluation-harness's own tasks, by name, on a model in memory.

Needs the package `lm_eval`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from m3jax.evaluation.harness.model import HarnessModel
from m3jax.evaluation.tasks.task import TaskError

_RESAMPLES = 1000  # for the standard error of a metric that is no mean


@dataclasses.dataclass(frozen=True)
class HarnessResult:
    """One metric of a task, as the harness reports it; reads like a `Result`.

    Attributes:
      task, metric: the harness's names; behind the metric's comma stands the filter.
      mean, standard_error: NaN where the harness gives none.
      count: of examples.
      records: a JSON object for each example; the first metric of a task has them.
      higher_is_better: whether more of the metric is better.
    """

    task: str
    metric: str
    mean: float
    standard_error: float
    count: int
    records: tuple[dict[str, Any], ...] = ()
    higher_is_better: bool = True
    truncated: int = 0

    def to_dict(self) -> dict[str, Any]:
        """All but the records."""
        return {
            "task": self.task,
            "metric": self.metric,
            "mean": self.mean,
            "standard_error": self.standard_error,
            "n": self.count,
        }


def find_tasks(names: Sequence[str], folder: str | None = None) -> TaskManager:
    """The harness's index, in which every one of `names` stands.

    Args:
      names: of tasks, groups or tags, or patterns with ``*``.
      folder: of YAML tasks, which take precedence over the harness's own.

    Raises:
      TaskError: a name is unknown, or the folder is none.
    """
    if folder is not None and not Path(folder).is_dir():
        raise TaskError(f"{folder}: is not a folder of YAML tasks")
    manager = TaskManager(include_path=folder)
    for name in names:
        if not manager.match_tasks([name]):
            close = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise TaskError(
                f"{name}: neither a task's JSON file nor a task of "
                f"lm-evaluation-harness{hint}"
            )
    return manager


def run_tasks(
    model: HarnessModel,
    names: Sequence[str],
    manager: TaskManager,
    *,
    limit: int | None = None,
    seed: int = 0,
    allow_code_execution: bool = False,
) -> list[HarnessResult]:
    """Evaluates a model at tasks, with the few-shot examples that they ask for.

    Args:
      model: in memory.
      names: that `manager` knows.
      manager: from `find_tasks`.
      limit: only the first examples of each task.
      seed: of the choice of few-shot examples.
      allow_code_execution: run programs that the model writes.
    """
    found = simple_evaluate(
        model,
        tasks=list(names),
        task_manager=manager,
        limit=limit,
        bootstrap_iters=_RESAMPLES,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
        confirm_run_unsafe_code=allow_code_execution,
    )
    assert found is not None
    return [
        result
        for task, scores in found["results"].items()
        for result in _results(task, scores, found)
    ]


def _results(
    task: str, scores: Mapping[str, Any], found: Mapping[str, Any]
) -> Iterator[HarnessResult]:
    count = found["n-samples"].get(task, {}).get("effective", 0)
    records = tuple(
        {
            "index": sample["doc_id"],
            "filter": sample["filter"],
            "prompt": sample["arguments"][0][0],
            "output": sample["filtered_resps"],
            **{metric: sample[metric] for metric in sample["metrics"]},
        }
        for sample in found.get("samples", {}).get(task, ())
    )
    better = found.get("higher_is_better", {}).get(task, {})
    for name, value in scores.items():
        metric, comma, chosen = name.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        yield HarnessResult(
            task=task,
            metric=metric if chosen == "none" else name,
            mean=_number(value),
            standard_error=_number(scores.get(f"{metric}_stderr,{chosen}")),
            count=count,
            records=records,
            higher_is_better=better.get(metric) is not False,
        )
        records = ()


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
