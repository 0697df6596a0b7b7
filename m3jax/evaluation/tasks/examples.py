"""The examples of a task: the lines of its data, filled into its templates."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.places.files import InputFile
from m3jax.evaluation.tasks.task import Task, TaskError

_PLACE = re.compile(r"\{(\w+)\}")


@dataclasses.dataclass(frozen=True)
class Example:
    """A line of a task's data, filled into its templates; what a kind lacks is empty.

    Attributes:
      index: of the line, from 0, blank lines not counted.
      correct: index of the right choice.
    """

    index: int
    prompt: str
    completion: str = ""
    choices: tuple[str, ...] = ()
    correct: int = -1
    answer: str | None = None
    tests: str = ""
    setup: str = ""


def read_data(task: Task) -> bytes:
    """The content of a task's data.

    Raises:
      TaskError: the file cannot be read.
    """
    try:
        with InputFile(task.data) as file:
            return file.read(0, file.size)
    except OSError as error:
        raise TaskError(
            f"task {shown(task.name)}: {task.data}: {error.strerror}"
        ) from None
    except CheckpointError as error:  # a FIFO, say
        raise TaskError(f"task {shown(task.name)}: {error}") from None


def load_examples(task: Task) -> list[Example]:
    """The examples of a task, in the order of its file.

    Raises:
      TaskError: the file or a line cannot be used; it is named.
    """
    try:
        lines = read_data(task).decode().split("\n")
    except UnicodeDecodeError:
        raise TaskError(f"{task.data}: is not UTF-8 text") from None
    examples: list[Example] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{task.data}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TaskError(f"{where}: not valid JSON ({error})") from None
        if not isinstance(record, dict):
            raise TaskError(f"{where}: needs an object, has {shown(record)}")
        examples.append(_example(task, record, len(examples), where))
    if not examples:
        raise TaskError(f"{task.data}: has no examples")
    return examples


def _example(task: Task, record: Mapping[str, Any], index: int, where: str) -> Example:
    def text(template: str | None) -> str:
        return _fill(template or "", record, where)

    choices: tuple[str, ...] = ()
    correct = -1
    if task.choices is not None:
        choices = _choices(task.choices, record, where)
        correct = _correct(task.answer or "", choices, record, where)
    return Example(
        index=index,
        prompt=text(task.prompt),
        completion=text(task.completion),
        choices=choices,
        correct=correct,
        answer=None if task.answer is None else text(task.answer),
        tests=text(task.tests),
        setup=text(task.setup),
    )


def _fill(template: str, record: Mapping[str, Any], where: str) -> str:
    def value(place: re.Match[str]) -> str:
        found = _field(place[1], record, where)
        if isinstance(found, list) and all(isinstance(part, str) for part in found):
            return "\n".join(found)
        if isinstance(found, str | int | float) and not isinstance(found, bool):
            return str(found)
        raise TaskError(f"{where}: {place[1]}={shown(found)} needs to be a text")

    return _PLACE.sub(value, template)


def _field(name: str, record: Mapping[str, Any], where: str) -> Any:
    if name not in record:
        known = ", ".join(map(shown, record))
        raise TaskError(f"{where}: has no field {shown(name)}; it has {known}")
    return record[name]


def _choices(
    choices: str | tuple[str, ...], record: Mapping[str, Any], where: str
) -> tuple[str, ...]:
    if isinstance(choices, str):
        place = _PLACE.fullmatch(choices)
        found = _field(place[1], record, where) if place else None
        if not isinstance(found, list) or not all(isinstance(c, str) for c in found):
            raise TaskError(f"{where}: choices={shown(choices)} needs a list of texts")
        filled = tuple(found)
    else:
        filled = tuple(_fill(choice, record, where) for choice in choices)
    if len(filled) < 2 or "" in filled:
        raise TaskError(f"{where}: needs two choices or more, none of them empty")
    return filled


def _correct(
    answer: str, choices: tuple[str, ...], record: Mapping[str, Any], where: str
) -> int:
    """The index that an answer means: a number, a choice's text, or a letter."""
    place = _PLACE.fullmatch(answer)
    found = _field(place[1], record, where) if place else _fill(answer, record, where)
    if isinstance(found, int) and 0 <= found < len(choices):
        return found
    if isinstance(found, str):
        text = found.strip()
        if found in choices:
            return choices.index(found)
        if len(text) == 1 and 0 <= ord(text.upper()) - ord("A") < len(choices):
            return ord(text.upper()) - ord("A")
        if text.isdecimal() and int(text) < len(choices):
            return int(text)
    raise TaskError(
        f"{where}: answer={shown(found)} needs to be one of the {len(choices)} "
        "choices: its index from 0, its letter or its text"
    )
