"""What a run learns from: tasks read by decoders, or a user's own batches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from m3jax.evaluation.tasks.task import Task, load_tasks
from m3jax.learn.training.config import Config
from m3jax.learn.training.data import TaskBatches, check_weights, taught
from m3jax.learn.training.objectives import KL, Weighted
from m3jax.learn.training.texts import Item, Speaker, in_batches, longest
from m3jax.recipe import RecipeError

# Gives the parameters of the k-th teacher, and how it reads; loaded when it is called.
Teacher = Callable[[int], tuple[Any, Speaker]]
_TOKENS_PER_BATCH = 4096  # of what experts write


def read_tasks(specs: Iterable[str | Path | Task]) -> list[Task]:
    """The tasks of JSON files, and tasks as they are."""
    return [
        task
        for spec in specs
        for task in ([spec] if isinstance(spec, Task) else load_tasks(spec))
    ]


def experts_as(experts: Mapping[str, int]) -> str:
    """How a user gives experts, in Python and on the command line."""
    return f'experts={dict(experts)} (--config.experts="{tuple(experts.items())}")'


def experts_of(
    given: Mapping[str, int] | None, tasks: Sequence[str], names: Sequence[str]
) -> dict[str, int]:
    """Which teacher belongs to each task.

    Args:
      given: of a config; None: tasks that have the names of the teachers are theirs,
        or the k-th task is the k-th teacher's.
      tasks, names: of the tasks and of the teachers.

    Raises:
      RecipeError: it is not clear.
    """
    if given is not None:
        for task in tasks:
            if not 0 <= given.get(task, -1) < len(names):
                raise RecipeError(
                    f"experts={dict(given)!r} needs a place from 0 to {len(names) - 1} "
                    f"for task {task!r}"
                )
        return {task: given[task] for task in tasks}
    if set(tasks) <= set(names):
        return {task: list(names).index(task) for task in tasks}
    if len(tasks) == len(names):
        return {task: place for place, task in enumerate(tasks)}
    given = dict.fromkeys(tasks, 0)
    raise RecipeError(
        f"{len(tasks)} tasks ({', '.join(tasks)}) and {len(names)} models "
        f"({', '.join(names)}) neither have the same names nor are as many; say which "
        f"model is the expert of each task, counted from 0, as in {experts_as(given)}"
    )


@dataclasses.dataclass(frozen=True)
class Texts:
    """Tasks, made into batches.

    Attributes:
      config: of the run.
      objective: what teachers are asked for.
      student: how the merged model reads.
      seed: of the order of examples.
    """

    config: Config
    objective: Weighted
    student: Speaker
    seed: int

    @property
    def needs_experts(self) -> bool:
        """Whether a teacher has to be run before it starts."""
        return self.objective.needs_teacher or self.config.inputs == "continuation"

    def batches(
        self,
        lists: Sequence[Sequence[Task]],
        names: Sequence[str],
        teacher: Teacher,
        foreign: bool,
    ) -> list[list[TaskBatches]]:
        """The batches of each list of tasks; teachers are loaded one after another.

        Args:
          lists: training and validation tasks.
          names: of the teachers.
          teacher: gives one.
          foreign: the teachers have tokenizers of their own.

        Raises:
          RecipeError, TaskError: one line each.
        """
        every = [task for own in lists for task in own]
        named = {task.name: task for task in lists[0]}
        check_weights(self.config.task_weights, named)
        self._check(every, foreign and self.needs_experts)
        if not self.needs_experts:
            made = {
                id(task): self._batched(task, self.student.items(task, self._inputs))
                for task in every
            }
            return [[made[id(task)] for task in own] for own in lists]
        owners: dict[int, list[Task]] = {}
        for own in lists:
            tasks = [task.name for task in own]
            found = experts_of(self.config.experts, tasks, names)
            for task in own:
                owners.setdefault(found[task.name], []).append(task)
        made = {}
        for k in sorted(owners):
            parameters, speaker = teacher(k)
            for task in owners[k]:
                read = self._foreign if foreign else self._alike
                made[id(task)] = read(task, parameters, speaker)
            del parameters
        return [[made[id(task)] for task in own] for own in lists]

    def shapes(self, tasks: Sequence[Task]) -> list[TaskBatches]:
        """Batches of the shapes that `batches` makes, without running a teacher: what
        experts write is as long as it may be, and what is kept of them is zeros."""
        found = []
        for task in tasks:
            inputs = "prompt" if self._inputs == "continuation" else self._inputs
            items = self.student.items(task, inputs)
            if self._inputs == "continuation" and task.kind != "choice":
                items = [longest(item, task.max_new_tokens) for item in items]
            found.append(self._batched(task, items))
        return found

    def _check(self, tasks: Sequence[Task], foreign: bool) -> None:
        """Raises RecipeError where objective, inputs and tasks do not fit."""
        asked = [task.name for task in tasks if task.kind != "choice"]
        if self.objective.needs_labels and self._inputs == "prompt" and asked:
            raise RecipeError(
                f"objective: cross_entropy needs labels, and inputs=prompt has none of "
                f"task {asked[0]!r}; give inputs=completion"
            )
        if foreign and self._inputs == "text":
            raise RecipeError(
                "inputs=text: teachers with tokenizers of their own have other "
                "positions there; give completion, continuation or prompt"
            )
        for _, term in self.objective.terms if foreign else ():
            if isinstance(term, KL):
                raise RecipeError(
                    "objective: kl compares token by token; teachers with tokenizers "
                    "of their own need uld"
                )

    @property
    def _inputs(self) -> str:
        return self.config.inputs

    def _batched(self, task: Task, items: Sequence[Item]) -> TaskBatches:
        # Of the task's own seed, so that student and teacher have one order.
        words = [self.seed, *task.name.encode()]
        order = np.random.default_rng(words) if self.config.shuffle else None
        weight = float(self.config.task_weights.get(task.name, 1.0))
        batches = in_batches(items, self.config.batch, order)
        return TaskBatches(task.name, batches, weight)

    def _teach(self, parameters: Any, speaker: Speaker) -> Callable[[Any], Any]:
        run = _teaching(self.objective, speaker)
        return lambda batch: run(parameters, batch)

    def _alike(self, task: Task, parameters: Any, speaker: Speaker) -> TaskBatches:
        """With a teacher that reads as the student does."""
        if self.config.inputs == "continuation" and task.kind != "choice":
            items = speaker.continued(task, parameters, _TOKENS_PER_BATCH)
        else:
            items = self.student.items(task, self._inputs)
        own = self._batched(task, items)
        if not self.objective.needs_teacher:
            return own
        return taught([own], {task.name: self._teach(parameters, speaker)})[0]

    def _foreign(self, task: Task, parameters: Any, speaker: Speaker) -> TaskBatches:
        """With a teacher of another tokenizer: the same texts, row by row."""
        if self.config.inputs == "continuation":
            theirs = speaker.continued(task, parameters, _TOKENS_PER_BATCH)
            texts = [speaker.tokenizer.decode(item.labels) for item in theirs]
            ours = self.student.retold(task, texts)
        else:
            theirs = speaker.items(task, self._inputs)
            ours = self.student.items(task, self._inputs)
        own, other = self._batched(task, ours), self._batched(task, theirs)
        teach = self._teach(parameters, speaker)
        batches = [
            {**batch, **_fitted(teach(asked), asked["mask"], batch["mask"].shape[1])}
            for batch, asked in zip(own.batches, other.batches, strict=True)
        ]
        return dataclasses.replace(own, batches=batches)


@functools.lru_cache(maxsize=2)
def _teaching(objective: Weighted, speaker: Speaker) -> Callable[[Any, Any], Any]:
    """Compiled once for all teachers that read alike."""
    return jax.jit(lambda p, batch: objective.teach(speaker.apply(p, batch)))


def _fitted(made: Mapping[str, Any], mask: np.ndarray, rows: int) -> dict[str, Any]:
    """A teacher's rows cut, or filled up, to as many as the student has."""

    def fit(array: Any) -> np.ndarray:
        array = np.asarray(array)[:, :rows]
        missing = [(0, 0)] * array.ndim
        missing[1] = (0, rows - array.shape[1])
        return np.pad(array, missing)

    return {**{name: fit(own) for name, own in made.items()}, "teacher_mask": fit(mask)}
