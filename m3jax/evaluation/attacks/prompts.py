"""Adversarial prompts: how much of its score a model keeps when a prompt is disturbed.

An attack changes the instruction, which is the text of a task's template outside its
{fields}, and never the examples, so that every right answer stays right. It searches
for the change that costs this model most on a few examples, as an adversary would; then
the whole task is run with the prompt that it found. The setting is PromptRobust's (Zhu
et al., arXiv 2306.04528).

deepwordbug  swaps, substitutes, deletes or inserts a letter in the words that matter
             most (Gao et al., arXiv 1801.04354)
stresstest   appends a statement that is true and beside the point (Naik et al.,
             arXiv 1806.00692)
words        puts neighbours in the model's own embedding in the place of the words that
             matter most; synonyms, as far as the model can tell

How much a word matters is how far the score falls when it is left out.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from string import ascii_lowercase, ascii_uppercase

from m3jax.evaluation.tasks.task import Task, TaskError

ATTACKS = ("deepwordbug", "stresstest", "words")

# The mean score of a task with the given text in its prompt's place.
Score = Callable[[str], float]
# Words that may stand in the place of one.
Variants = Callable[[str], Sequence[str]]

_PIECES = re.compile(r"(\{\w+\}|[^\W\d_]+)")  # fields and words; what is left, between
_SHARE = 0.3  # of an instruction's words that are changed, rounded up
_STATEMENTS = (
    " and one is one",
    " and not false is true",
    " and what is so is so" * 3,
    " and a day is a day and a night is a night",
)


def check_attackable(task: Task, attack: str) -> None:
    """Raises TaskError if an attack would have no meaning or nothing to change."""
    where = f"task {task.name!r}, attack {attack}"
    if task.kind == "loss":
        raise TaskError(
            f"{where}: a drop rate is that of an accuracy, and this task has a loss; "
            "leave it out"
        )
    if attack != "stresstest" and not _words(_PIECES.split(task.prompt)):
        raise TaskError(
            f"{where}: the prompt has no words outside of its fields; an attack "
            "changes the instruction, so write that into the prompt"
        )


def attacked_prompt(
    attack: str, task: Task, score: Score, seed: int, neighbours: Variants
) -> str:
    """The prompt in which an attack results.

    Args:
      attack: one of ATTACKS.
      task: with a prompt that `check_attackable` accepts.
      score: of the model under attack; called for each prompt that is tried.
      seed: of the letters; the same seed tries the same prompts.
      neighbours: of a word, for the attack on words.
    """
    if attack == "deepwordbug":
        return _change_words(
            task.prompt,
            score,
            lambda word: misspellings(word, random.Random(f"{seed} {word}")),
        )
    if attack == "words":
        return _change_words(task.prompt, score, neighbours)
    assert attack == "stresstest"
    return min((_append(task.prompt, text) for text in _STATEMENTS), key=score)


def misspellings(word: str, rng: random.Random) -> list[str]:
    """A word with two letters swapped, one substituted, one deleted, one inserted.

    Those that leave nothing, or the word as it was, are left out.
    """

    def other(letter: str) -> str:
        letters = ascii_uppercase if letter.isupper() else ascii_lowercase
        return rng.choice([each for each in letters if each != letter])

    places = [i for i in range(len(word) - 1) if word[i] != word[i + 1]]
    found = []
    if places:
        i = rng.choice(places)
        found.append(word[:i] + word[i + 1] + word[i] + word[i + 2 :])
    i = rng.randrange(len(word))
    found.append(word[:i] + other(word[i]) + word[i + 1 :])
    if len(word) > 1:
        i = rng.randrange(len(word))
        found.append(word[:i] + word[i + 1 :])
    i = rng.randrange(1, len(word) + 1)
    found.append(word[:i] + other(word[i - 1]) + word[i:])
    return found


def _change_words(prompt: str, score: Score, variants: Variants) -> str:
    """Replaces the words that matter most, each by the worst of its variants."""
    pieces = _PIECES.split(prompt)
    words = _words(pieces)

    def with_piece(place: int, text: str) -> str:
        return "".join([*pieces[:place], text, *pieces[place + 1 :]])

    by_importance = sorted(words, key=lambda place: score(with_piece(place, "")))
    for place in by_importance[: math.ceil(_SHARE * len(words))]:
        found = variants(pieces[place])
        if found:
            pieces[place] = min(found, key=lambda text: score(with_piece(place, text)))
    return "".join(pieces)


def _words(pieces: Sequence[str]) -> list[int]:
    """Which pieces of a prompt are words."""
    return [i for i in range(1, len(pieces), 2) if not pieces[i].startswith("{")]


def _append(prompt: str, text: str) -> str:
    """Puts a text behind the last field of a prompt: at the end of what is asked."""
    pieces = _PIECES.split(prompt)
    fields = [i for i in range(1, len(pieces), 2) if pieces[i].startswith("{")]
    place = fields[-1] + 1 if fields else len(pieces)
    return "".join([*pieces[:place], text, *pieces[place:]])
