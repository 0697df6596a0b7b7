"""Turns examples into tokens to score or to continue."""

from __future__ import annotations

import dataclasses

from m3jax.evaluation.tasks.examples import Example
from m3jax.evaluation.tasks.task import Task, TaskError
from m3jax.models.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An example in tokens.

    Attributes:
      contexts, completions: for loss one pair, for choice one per choice; for the
        other kinds one context, to be continued.
      lengths: by which the log-likelihood of each completion is divided.
      truncated: the beginning of a context was cut off, to fit into the model.
    """

    contexts: tuple[tuple[int, ...], ...]
    completions: tuple[tuple[int, ...], ...] = ()
    lengths: tuple[int, ...] = ()
    truncated: bool = False


def prepare(
    example: Example, task: Task, tokenizer: Tokenizer, max_length: int
) -> Prepared:
    """Tokenises an example.

    Args:
      max_length: tokens that the model takes; what is longer loses its beginning.

    Raises:
      TaskError: nothing of the prompt would be left, or a completion has no tokens.
    """
    prompt, special = example.prompt, task.add_special_tokens
    if task.chat:
        messages = [{"role": "user", "content": prompt}]
        if task.system is not None:
            messages.insert(0, {"role": "system", "content": task.system})
        prompt, special = tokenizer.chat(messages), False
    where = f"task {task.name!r}, example {example.index}"
    if task.kind not in ("loss", "choice"):
        context = _encode(prompt, tokenizer, special, where)
        room = max_length - task.max_new_tokens
        if room < 1:
            raise TaskError(
                f"{where}: max_new_tokens={task.max_new_tokens} leaves no room for a "
                f"prompt; the model takes {max_length} tokens"
            )
        return Prepared((context[-room:],), truncated=len(context) > room)
    texts = example.choices or (example.completion,)
    contexts, completions, lengths, truncated = [], [], [], False
    for text in texts:
        context, completion = _encode_pair(
            prompt, task.delimiter + text, tokenizer, special, where, whole=task.chat
        )
        room = max_length + 1 - len(completion)  # the last token is only foreseen
        if not completion or room < 1:
            raise TaskError(
                f"{where}: a completion of {len(completion)} tokens; needs 1 to "
                f"{max_length}, which the model takes"
            )
        truncated |= len(context) > room
        contexts.append(context[-room:])
        completions.append(completion)
        divisors = {"bytes": len(text.encode()), "tokens": len(completion), "none": 1}
        lengths.append(divisors[task.normalise] if task.kind == "choice" else 1)
    return Prepared(tuple(contexts), tuple(completions), tuple(lengths), truncated)


def _encode(
    text: str, tokenizer: Tokenizer, special: bool, where: str
) -> tuple[int, ...]:
    tokens = tuple(tokenizer.encode(text, add_special_tokens=special))
    if tokens:
        return tokens
    if tokenizer.first_token is None:
        raise TaskError(f"{where}: the prompt is empty, and so a model cannot begin")
    return (tokenizer.first_token,)


def _encode_pair(
    prompt: str,
    completion: str,
    tokenizer: Tokenizer,
    special: bool,
    where: str,
    *,
    whole: bool,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens of a prompt and of what follows, as the two are tokenised together.

    Space at the end of the prompt counts to the completion, since most tokenizers
    join it to the next word; lm-evaluation-harness does the same. A `whole` prompt
    keeps it: a chat template's line break is no part of the answer.
    """
    if whole:
        context = _encode(prompt, tokenizer, special, where)
        joined = tokenizer.encode(prompt + completion, add_special_tokens=special)
        if tuple(joined[: len(context)]) == context:
            return context, tuple(joined[len(context) :])
        alone = tokenizer.encode(completion, add_special_tokens=False)
        return context, tuple(alone)
    stripped = prompt.rstrip()
    completion = prompt[len(stripped) :] + completion
    context = tuple(tokenizer.encode(stripped, add_special_tokens=special))
    both = tokenizer.encode(stripped + completion, add_special_tokens=special)
    behind = tuple(both[len(context) :])
    return context or _encode(stripped, tokenizer, special, where), behind
