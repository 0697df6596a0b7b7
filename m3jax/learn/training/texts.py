"""Batches of tokens from tasks, and the decoder's logits on them.

A batch has ``tokens`` (B, T), ``valid`` (B, T) and, at R positions of each row,
``rows`` (B, R), ``mask`` (B, R) and ``labels`` (B, R): the token behind each, or −100
where nobody has told. A batch of choices has (B, C, T) tokens, ``rows`` and ``mask``
(B, C, R), ``lengths`` (B, C) and ``labels`` (B,), the right one, and ``mask`` (B,) of
real examples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.evaluation.running import continuations, round_up
from m3jax.evaluation.tasks.examples import Example, load_examples
from m3jax.evaluation.tasks.requests import prepare
from m3jax.evaluation.tasks.task import Task, TaskError
from m3jax.learn.soup import IGNORED, log_likelihoods
from m3jax.models.config import Config
from m3jax.models.decoder import head, hidden_states
from m3jax.models.generation import Sampling
from m3jax.models.layers import positions_of
from m3jax.models.tokenizer import Tokenizer

_SHORTEST, _FEWEST = 32, 8  # slots, scored positions


@dataclasses.dataclass(frozen=True)
class Scored:
    """A row of tokens.

    Attributes:
      tokens: that the model reads.
      first, labels: what comes at positions `first`, `first` + 1, …; −100: unknown.
    """

    tokens: tuple[int, ...]
    first: int
    labels: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Choices:
    """The rows of an example of a choice task, and the right one."""

    rows: tuple[Scored, ...]
    lengths: tuple[float, ...]
    correct: int


Item = Scored | Choices


@dataclasses.dataclass(frozen=True)
class Speaker:
    """A config and a tokenizer: what texts become for a model.

    Attributes:
      config: of the decoder.
      tokenizer: of its checkpoint.
    """

    config: Config
    tokenizer: Tokenizer

    @property
    def length(self) -> int:
        return self.config.max_position_embeddings

    def items(self, task: Task, inputs: str) -> list[Item]:
        """What a model reads of a task's examples; see `Config.inputs`.

        Raises:
          TaskError: an example has no answer where one is asked for.
        """
        examples = load_examples(task)
        return [self._item(task, example, inputs) for example in examples]

    def continued(self, task: Task, parameters: Any, tokens_per_batch: int) -> Any:
        """What a model writes greedily behind each prompt of a task, as tokens."""
        contexts = [
            prepare(_asked(task, own), _generated(task), self.tokenizer, self.length)
            for own in load_examples(task)
        ]
        prompts = [own.contexts[0] for own in contexts]
        written = continuations(
            parameters,
            prompts,
            config=self.config,
            max_new_tokens=task.max_new_tokens,
            stop_tokens=self.tokenizer.stop_tokens,
            sampling=Sampling(),
            key=jax.random.key(0),
            tokens_per_batch=tokens_per_batch,
        )
        return [
            _behind(tuple(prompt), tuple(tokens))
            for prompt, tokens in zip(prompts, written, strict=True)
        ]

    def retold(self, task: Task, texts: Sequence[str]) -> list[Item]:
        """The examples with these texts behind their prompts."""
        told = dataclasses.replace(task, kind="loss", completion="", delimiter="")
        items: list[Item] = []
        for example, text in zip(load_examples(task), texts, strict=True):
            own = dataclasses.replace(_asked(task, example), completion=text or " ")
            found = prepare(own, told, self.tokenizer, self.length)
            items.append(_behind(found.contexts[0], found.completions[0]))
        return items

    def apply(self, parameters: Any, batch: Any) -> jax.Array:
        """Logits (B, R, V) at the scored positions; (B, C) of choices."""
        tokens = batch["tokens"]
        if tokens.ndim == 2:
            x = self._states(parameters, tokens, batch["valid"], batch["rows"])
            return head(parameters, x, config=self.config)
        flat = {
            name: batch[name].reshape(-1, batch[name].shape[-1])
            for name in ("tokens", "valid", "rows", "targets")
        }
        x = self._states(parameters, flat["tokens"], flat["valid"], flat["rows"])
        logits = head(parameters, x, config=self.config)
        total = jnp.sum(log_likelihoods(logits, flat["targets"]), axis=-1)
        return total.reshape(tokens.shape[:2]) / batch["lengths"]

    def _states(self, parameters: Any, tokens: Any, valid: Any, rows: Any) -> jax.Array:
        positions = positions_of(valid)
        x, _ = hidden_states(parameters, tokens, positions, config=self.config)
        return jnp.take_along_axis(x, rows[..., None], axis=1)

    def _item(self, task: Task, example: Example, inputs: str) -> Item:
        if task.kind == "choice":
            return self._choices(task, example)
        if inputs != "completion":
            own = _asked(task, example)
            found = prepare(own, _generated(task), self.tokenizer, self.length)
            prompt = found.contexts[0]
            if inputs == "prompt":
                return Scored(prompt, len(prompt) - 1, (IGNORED,))
            return Scored(prompt, 0, (*prompt[1:], IGNORED))
        text, end = example.completion, tuple[int, ...]()
        if task.kind != "loss":
            if example.answer is None or task.kind == "code":
                raise TaskError(
                    f"task {task.name!r}: a {task.kind} task has no answer to learn "
                    "from; choose inputs=prompt, text or continuation"
                )
            text = example.answer
            end = () if task.stop else self.tokenizer.stop_tokens[:1]
        told = dataclasses.replace(task, kind="loss", completion="")
        own = dataclasses.replace(example, completion=text)
        found = prepare(own, told, self.tokenizer, self.length)
        return _behind(found.contexts[0], (*found.completions[0], *end))

    def _choices(self, task: Task, example: Example) -> Choices:
        found = prepare(example, task, self.tokenizer, self.length)
        rows = tuple(map(_behind, found.contexts, found.completions))
        return Choices(rows, found.lengths, example.correct)


def _asked(task: Task, example: Example) -> Example:
    """The example without its answer: what may be read where nothing is told."""
    return dataclasses.replace(example, completion="", choices=(), answer=None)


def _generated(task: Task) -> Task:
    """The task as one whose prompt is continued."""
    return (
        dataclasses.replace(task, kind="exact_match") if task.kind == "loss" else task
    )


def _behind(context: tuple[int, ...], completion: tuple[int, ...]) -> Scored:
    """Tokens behind a context; the last one is only foreseen."""
    completion = completion or (IGNORED,)
    return Scored((*context, *completion[:-1]), len(context) - 1, completion)


def longest(item: Item, count: int) -> Item:
    """A prompt with so many tokens written behind it."""
    assert isinstance(item, Scored)
    return _behind(item.tokens, (0,) * count)


def in_batches(
    items: Sequence[Item], size: int, order: np.random.Generator | None
) -> list[dict[str, np.ndarray]]:
    """Batches of one shape, in which every item comes once; the last one is filled up.

    Args:
      items: of one kind.
      size: B.
      order: shuffles the items; None: as they are.
    """
    places = np.arange(len(items))
    if order is not None:
        places = order.permutation(places)
    size = min(size, len(items))
    rows = [r for i in items for r in (i.rows if isinstance(i, Choices) else (i,))]
    # Tasks of about the same length share a shape, which is a compilation.
    length = round_up(max(_SHORTEST, max(len(row.tokens) for row in rows)))
    most = max(len(row.labels) for row in rows)
    scored = 1 if most == 1 else round_up(max(_FEWEST, most))
    return [
        _batch([items[i] for i in places[at : at + size]], size, length, scored)
        for at in range(0, len(items), size)
    ]


def _batch(
    items: list[Item], size: int, length: int, scored: int
) -> dict[str, np.ndarray]:
    if not isinstance(items[0], Choices):
        return _filled(
            [i for i in items if isinstance(i, Scored)], size, length, scored
        )
    examples = [item for item in items if isinstance(item, Choices)]
    most = max(len(item.rows) for item in examples)
    if any(len(item.rows) != most for item in examples):
        raise TaskError("choice tasks need as many choices in every example to learn")
    flat = [row for item in examples for row in item.rows]
    found = _filled(flat, size * most, length, scored)
    found = {
        name: array.reshape(size, most, *array.shape[1:])
        for name, array in found.items()
    }
    found["targets"] = found.pop("labels")
    lengths, labels = (
        np.ones((size, most), np.float32),
        np.full(size, IGNORED, np.int32),
    )
    for place, item in enumerate(examples):
        lengths[place], labels[place] = item.lengths, item.correct
    mask = np.arange(size) < len(examples)
    return {**found, "lengths": lengths, "labels": labels, "mask": mask}


def _filled(
    rows: list[Scored], size: int, length: int, scored: int
) -> dict[str, np.ndarray]:
    found = {
        "tokens": np.zeros((size, length), np.int32),
        "valid": np.zeros((size, length), bool),
        "rows": np.zeros((size, scored), np.int32),
        "mask": np.zeros((size, scored), bool),
        "labels": np.full((size, scored), IGNORED, np.int32),
    }
    for place, row in enumerate(rows):
        count = len(row.labels)
        found["tokens"][place, : len(row.tokens)] = row.tokens
        found["valid"][place, : len(row.tokens)] = True
        found["rows"][place, :count] = row.first + np.arange(count)
        found["mask"][place, :count] = True
        found["labels"][place, :count] = row.labels
    return found
