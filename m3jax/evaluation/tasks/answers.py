"""Finds the answer in what a model wrote, and marks it."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from m3jax.evaluation.tasks.examples import Example
from m3jax.evaluation.tasks.task import Task

# A minus is a sign unless it stands behind a number or a word: "10-5" ends in 5.
_NUMBER = re.compile(r"(?:(?<![\w)])-\s?)?[$€£]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_FENCE = re.compile(r"```(?:[Pp]ython3?|py)?[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL)
_MARK = "####"  # GSM8K's, before the final answer


def until_stop(text: str, stop: tuple[str, ...]) -> str:
    """`text` up to the first of the stop texts."""
    ends = [text.find(part) for part in stop]
    return text[: min((end for end in ends if end >= 0), default=len(text))]


def number(text: str) -> Decimal | None:
    """The number behind the first "####", or else the last number of the text."""
    marked = text.partition(_MARK)[2]
    found = _NUMBER.findall(marked)[:1] or _NUMBER.findall(text)[-1:]
    if not found:
        return None
    try:
        return Decimal(re.sub(r"[^\d.-]", "", found[0]))
    except InvalidOperation:
        return None


def code(text: str) -> str:
    """The first fenced block of Python, or else the whole text."""
    fenced = _FENCE.search(text)
    return fenced[1] if fenced else text


def found(text: str, task: Task) -> str | None:
    """What the answer is compared with; None if the text has no answer."""
    if task.kind == "exact_match":
        return text.strip()
    if task.kind == "numeric":
        value = number(text)
        return None if value is None else f"{value.normalize():f}"
    assert task.kind == "regex" and task.pattern is not None
    match = re.search(task.pattern, text)
    if match is None:
        return None
    return (match[1] or "").strip() if match.re.groups else match[0].strip()


def is_right(answer: str | None, task: Task, example: Example) -> bool:
    """Whether an answer from `found` is that of the example."""
    if answer is None:
        return False
    if example.answer is None:  # a pattern is all that was asked for
        return True
    if task.kind == "numeric":
        expected = number(example.answer)
        return expected is not None and Decimal(answer) == expected
    expected_text = example.answer.strip()
    if task.ignore_case:
        return answer.casefold() == expected_text.casefold()
    return answer == expected_text
