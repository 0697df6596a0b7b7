"""The texts of tasks that a model is measured on, as batches of tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from m3jax.checkpoints.errors import shown
from m3jax.evaluation.running import plan_batches
from m3jax.evaluation.tasks.examples import Example, load_examples
from m3jax.evaluation.tasks.requests import Prepared, prepare
from m3jax.evaluation.tasks.task import Task, TaskError
from m3jax.models.tokenizer import Tokenizer

_ANSWERED = ("exact_match", "numeric")


@dataclasses.dataclass(frozen=True)
class Question:
    """An example with what may follow its prompt.

    Attributes:
      item: its tokens; of a choice task each choice, of other tasks one completion.
      correct: which of them is right.
      is_choice: the completions are the classes; otherwise each token is one of the
        vocabulary.
    """

    item: Prepared
    correct: int
    is_choice: bool

    @property
    def whole(self) -> tuple[tuple[int, ...], ...]:
        """Context and completion, joined."""
        pairs = zip(self.item.contexts, self.item.completions, strict=True)
        return tuple(context + own for context, own in pairs)


class Batch(NamedTuple):
    """Questions with as many completions each, padded; R rows, C completions, T slots.

    Attributes:
      index: (R,) int32, of the question among all; −1 for a row that is none.
      tokens, valid: (R, C, T).
      weights: (R, C, T − 1) float32: what the log-likelihood of token t + 1 counts in
        its completion's score; 0 outside it.
      correct: (R,) int32.
    """

    index: Any
    tokens: Any
    valid: Any
    weights: Any
    correct: Any


def questions(
    tasks: Sequence[Task], tokenizer: Tokenizer, max_length: int, limit: int | None
) -> list[Question]:
    """The examples of tasks, in tokens.

    Args:
      tasks: of kinds that say what the answer is: loss, choice, exact_match, numeric.
      tokenizer: of the model.
      max_length: tokens that the model takes; what is longer loses its beginning.
      limit: only the first examples of each task; None: all.

    Raises:
      TaskError: a task has no answers, or cannot be used.
    """
    return [
        _question(example, task, tokenizer, max_length)
        for task in tasks
        for example in load_examples(task)[:limit]
    ]


def _question(
    example: Example, task: Task, tokenizer: Tokenizer, max_length: int
) -> Question:
    if task.kind in _ANSWERED:  # the answer, as what the model should go on with
        task = dataclasses.replace(task, kind="loss")
        example = dataclasses.replace(example, completion=example.answer or "")
    if task.kind not in ("loss", "choice"):
        raise TaskError(
            f"task {shown(task.name)}: kind {task.kind} does not say what a model "
            f"should write; measure on one of loss, choice, {', '.join(_ANSWERED)}"
        )
    item = prepare(example, task, tokenizer, max_length)
    is_choice = task.kind == "choice"
    return Question(item, example.correct if is_choice else 0, is_choice)


def batches(asked: Sequence[Question], tokens_per_batch: int) -> list[Batch]:
    """Batches of every question once; of one kind and number of completions each."""
    kinds: dict[tuple[bool, int], list[int]] = {}
    for i, question in enumerate(asked):
        key = question.is_choice, len(question.item.completions)
        kinds.setdefault(key, []).append(i)
    found = []
    for (_, count), members in kinds.items():
        lengths = [max(map(len, asked[i].whole)) for i in members]
        for planned in plan_batches(lengths, max(1, tokens_per_batch // count)):
            own = [members[m] for m in planned.members]
            found.append(_batch(asked, own, planned.rows, count, planned.slots))
    return found


def _batch(
    asked: Sequence[Question], members: list[int], rows: int, count: int, slots: int
) -> Batch:
    made = Batch(
        index=np.full(rows, -1, np.int32),
        tokens=np.zeros((rows, count, slots), np.int32),
        valid=np.zeros((rows, count, slots), bool),
        weights=np.zeros((rows, count, slots - 1), np.float32),
        correct=np.zeros(rows, np.int32),
    )
    for row, member in enumerate(members):
        question = asked[member]
        item = question.item
        made.index[row], made.correct[row] = member, question.correct
        for c, (context, own, length) in enumerate(
            zip(item.contexts, question.whole, item.lengths, strict=True)
        ):
            made.tokens[row, c, : len(own)] = own
            made.valid[row, c, : len(own)] = True
            # The score of token t + 1 stands at t.
            made.weights[row, c, len(context) - 1 : len(own) - 1] = 1 / length
    return made
