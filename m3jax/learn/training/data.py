"""Batches of tasks, and which of them comes at which step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

Batch = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class TaskBatches:
    """The batches of one task.

    Attributes:
      name: of the task.
      batches: pytrees of arrays; those of another shape cost a compilation.
      weight: of the task in the loss.
    """

    name: str
    batches: Sequence[Any]
    weight: float = 1.0


def at_step(
    tasks: Sequence[TaskBatches], step: int, seed: int, *, shuffle: bool
) -> Iterator[tuple[float, Any]]:
    """Weight and batch of each task: a function of seed and step alone.

    Every pass over a task's batches has an order of its own, or that of the batches.
    """
    for place, task in enumerate(tasks):
        count = len(task.batches)
        turn, where = divmod(step, count)
        if shuffle and count > 1:
            generator = np.random.default_rng([seed, place, turn])
            where = int(generator.permutation(count)[where])
        yield task.weight, task.batches[where]


def by_task(batches: Any, weights: Mapping[str, float]) -> list[TaskBatches]:
    """The batches that a user gives: a sequence, or {task: sequence}.

    Raises:
      ValueError: a task has none, or a weight no task.
    """
    named = dict(batches) if isinstance(batches, Mapping) else {"task": batches}
    found = []
    for name, own in named.items():
        own = list(own)
        if not own:
            raise ValueError(f"batches of task {name!r} are empty; needs one or more")
        found.append(TaskBatches(name, own, float(weights.get(name, 1.0))))
    check_weights(weights, named)
    return found


def check_weights(weights: Mapping[str, float], tasks: Mapping[str, Any]) -> None:
    """Raises ValueError for a weight of a task that there is not."""
    for name in weights:
        if name not in tasks:
            raise ValueError(
                f"task_weights has {name!r}; the tasks are {', '.join(tasks)}"
            )


def taught(
    tasks: Sequence[TaskBatches],
    of: Mapping[str, Callable[[Any], Mapping[str, Any]]],
) -> list[TaskBatches]:
    """The batches with what a teacher's function makes of each, kept on the host."""
    return [
        dataclasses.replace(
            task,
            batches=[
                {**batch, **{n: np.asarray(a) for n, a in of[task.name](batch).items()}}
                for batch in task.batches
            ],
        )
        if task.name in of
        else task
        for task in tasks
    ]
