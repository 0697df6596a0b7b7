"""The skills of the demo's models, and how their examples are split.

    maths   add 4+7+8+5=      24
    code    close [(<>{=      })]
    words   sort mbhea=       abehm

What an example is for follows from its own text: the SHA-256 of the prompt, modulo 20,
sends one twentieth to validation, one to test and the rest to training. So nothing that
a model was trained on is ever asked of it, whatever the seeds and the sizes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Callable, Iterator

BRACKETS = {"(": ")", "[": "]", "{": "}", "<": ">"}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
ALPHABET = "".join(sorted({*"0123456789+= ", *LETTERS, *BRACKETS, *BRACKETS.values()}))
LONGEST = 21  # tokens of an example, those that begin and end it included
_PARTS = 20

Draw = Callable[[random.Random], tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Skill:
    """What an expert is good at.

    Attributes:
      template: of its prompts; {text} is the question.
      draw: gives a question and its answer.
    """

    template: str
    draw: Draw


def addition(rng: random.Random) -> tuple[str, str]:
    """The sum of four numbers below 10."""
    numbers = rng.choices(range(10), k=4)
    return "+".join(map(str, numbers)), str(sum(numbers))


def brackets(rng: random.Random) -> tuple[str, str]:
    """What closes the brackets that are still open, the last one first."""
    while True:
        text, still_open = "", []
        for _ in range(rng.randint(3, 6)):
            if still_open and rng.random() < 0.25:
                text += BRACKETS[still_open.pop()]
            else:
                still_open.append(rng.choice(list(BRACKETS)))
                text += still_open[-1]
        if still_open:
            return text, "".join(BRACKETS[each] for each in reversed(still_open))


def sorting(rng: random.Random) -> tuple[str, str]:
    """Letters in alphabetical order."""
    letters = rng.choices(LETTERS, k=rng.randint(4, 6))
    return "".join(letters), "".join(sorted(letters))


# By the name of the model that is the expert.
SKILLS = {
    "maths": Skill("add {text}=", addition),
    "code": Skill("close {text}=", brackets),
    "words": Skill("sort {text}=", sorting),
}


def part_of(prompt: str) -> str:
    """What an example is for: ``train``, ``validation`` or ``test``."""
    digest = hashlib.sha256(prompt.encode()).digest()
    place = int.from_bytes(digest[:8], "little") % _PARTS
    return {0: "validation", 1: "test"}.get(place, "train")


def examples(skill: str, part: str, seed: int) -> Iterator[tuple[str, str]]:
    """Questions and answers without end; those of training may come again."""
    rng = random.Random(f"{skill} {part} {seed}")
    asked: set[str] = set()
    while True:
        text, answer = SKILLS[skill].draw(rng)
        mine = part_of(SKILLS[skill].template.format(text=text)) == part
        if not mine or (part != "train" and text in asked):
            continue
        asked.add(text)
        yield text, answer
