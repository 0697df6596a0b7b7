"""Sees to it that what is chosen on is not what is reported."""

from __future__ import annotations

from collections.abc import Sequence

from m3jax.evaluation.tasks.examples import read_data
from m3jax.evaluation.tasks.task import Task, TaskError


def check_apart(
    chosen_on: Sequence[Task],
    reported: Sequence[Task],
    lists: tuple[str, str] = ("validation", "test"),
) -> list[str]:
    """Compares the data of two lists of tasks, by path and by content.

    Args:
      chosen_on, reported: the tasks.
      lists: what each is called.

    Returns:
      A note for each pair of files that has some lines in common.

    Raises:
      TaskError: two of them have the same data.
    """
    notes = []
    for own in chosen_on:
        for other in reported:
            pair = f"{lists[0]} task {own.name!r} and {lists[1]} task {other.name!r}"
            if own.data.resolve() == other.data.resolve():
                raise TaskError(
                    f"{pair} have the same data, {own.data}; give each its own"
                )
            ours, theirs = _lines(own), _lines(other)
            if sorted(ours) == sorted(theirs):
                raise TaskError(
                    f"{pair} have the same data: {own.data} and {other.data} hold "
                    "the same lines; give each its own"
                )
            common = sum(line in set(ours) for line in theirs)
            if common:
                notes.append(
                    f"{pair} have {common} of {len(theirs)} {lists[1]} lines in common"
                )
    return notes


def _lines(task: Task) -> list[bytes]:
    return [line.strip() for line in read_data(task).splitlines() if line.strip()]
