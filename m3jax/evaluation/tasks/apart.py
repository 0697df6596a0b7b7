"""Sees to it that what is chosen on is not what is reported."""

from __future__ import annotations

from collections.abc import Sequence

from m3jax.evaluation.tasks.examples import read_data
from m3jax.evaluation.tasks.task import Task, TaskError


def check_apart(chosen_on: Sequence[Task], reported: Sequence[Task]) -> list[str]:
    """Compares the data of validation and test tasks, by path and by content.

    Returns:
      A note for each pair of files that has some lines in common.

    Raises:
      TaskError: two of them have the same data.
    """
    notes = []
    for own in chosen_on:
        for other in reported:
            pair = f"validation task {own.name!r} and test task {other.name!r}"
            if own.data.resolve() == other.data.resolve():
                raise TaskError(
                    f"{pair} have the same data, {own.data}; choose on one file and "
                    "report on another"
                )
            ours, theirs = _lines(own), _lines(other)
            if sorted(ours) == sorted(theirs):
                raise TaskError(
                    f"{pair} have the same data: {own.data} and {other.data} hold "
                    "the same lines; choose on one file and report on another"
                )
            common = sum(line in set(ours) for line in theirs)
            if common:
                notes.append(
                    f"{pair} have {common} of {len(theirs)} test lines in common"
                )
    return notes


def _lines(task: Task) -> list[bytes]:
    return [line.strip() for line in read_data(task).splitlines() if line.strip()]
