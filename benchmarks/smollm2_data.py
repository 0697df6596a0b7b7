"""Two skills to learn, and how their examples are split.

Maths: GSM8K (OpenAI, MIT licence), lines of {"question", "answer"}. Code: MBPP (Google,
CC BY 4.0), lines of {"text", "code", "test_list"}. Only the files of their test splits
are needed: of 1,319 and 500 problems. Which part an example belongs to follows from its
own prompt: the SHA-256, modulo 10, sends 0 to 5 to the training of experts, 6 to the
learning of coefficients, 7 to validation, 8 and 9 to test. So the parts are disjoint,
and the same with every seed, size and order.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

PARTS = ("train", "learning", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Skill:
    """What an expert learns.

    Attributes:
      name: of the expert.
      source: of the data, for the documentation.
      file: of the data.
      example: from a line of the data to ``prompt``, ``completion`` and what else
        the generated answer is marked with.
      answer: fields of the task that marks what a model writes.
    """

    name: str
    source: str
    file: str
    example: Callable[[Mapping[str, Any]], dict[str, str]]
    answer: Mapping[str, Any]


def _maths(line: Mapping[str, Any]) -> dict[str, str]:
    return {"prompt": line["question"], "completion": line["answer"]}


def _code(line: Mapping[str, Any]) -> dict[str, str]:
    code, tests = line["code"].replace("\r\n", "\n"), line["test_list"]
    prompt = f"{line['text']}\nYour code should pass this test:\n{tests[0]}"
    setup = line.get("test_setup_code", "")
    return {
        "prompt": prompt,
        "completion": code.strip(),
        "tests": "\n".join(tests),
        "setup": setup,
    }


SKILLS = (
    Skill(
        "maths",
        "GSM8K (OpenAI, MIT licence)",
        "gsm8k_test.jsonl",
        _maths,
        {"kind": "numeric", "answer": "{completion}"},
    ),
    Skill(
        "code",
        "MBPP (Google, CC BY 4.0)",
        "mbpp_test.jsonl",
        _code,
        {"kind": "code", "tests": "{tests}", "setup": "{setup}"},
    ),
)


def part_of(prompt: str) -> str:
    """The part that an example with this prompt belongs to."""
    place = int.from_bytes(hashlib.sha256(prompt.encode()).digest(), "big") % 10
    return PARTS[0] if place < 6 else PARTS[min(place - 5, 3)]


def split(examples: Iterable[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """The examples of each part, in their order; of like prompts only the first."""
    parts: dict[str, list[dict[str, str]]] = {part: [] for part in PARTS}
    seen = set()
    for example in examples:
        if example["prompt"] not in seen:
            seen.add(example["prompt"])
            parts[part_of(example["prompt"])].append(example)
    return parts


def read(skill: Skill, folder: Path) -> list[dict[str, str]]:
    """All examples of a skill."""
    text = (folder / skill.file).read_text(encoding="utf-8")
    return [skill.example(json.loads(line)) for line in text.split("\n") if line]


def write_tasks(
    folder: Path,
    parts: Mapping[str, Mapping[str, list[dict[str, str]]]],
    *,
    generate: bool = False,
    execute: bool = False,
) -> dict[str, Path]:
    """Writes the tasks of all parts but the first, as `m3jax explore` takes them.

    Args:
      folder: for the specs, ``PART.json``, and their data.
      parts: examples of each part of each skill.
      generate: let models write answers to the test problems, too, and mark them.
      execute: code is marked as well, by running it.

    Returns:
      The path of each spec.
    """
    folder.mkdir(parents=True, exist_ok=True)
    specs = {}
    for part in PARTS[1:]:
        tasks = []
        for skill in SKILLS:
            data = f"{skill.name}_{part}.jsonl"
            lines = [json.dumps(line) + "\n" for line in parts[skill.name][part]]
            (folder / data).write_text("".join(lines))
            asked = {"data": data, "prompt": "{prompt}", "chat": True}
            loss = {"name": skill.name, "kind": "loss", "completion": "{completion}"}
            tasks.append(loss | asked)
            marked = generate and part == "test"
            if marked and (execute or skill.answer["kind"] != "code"):
                answer = {"name": f"{skill.name} answers", "max_new_tokens": 256}
                tasks.append({**answer, **asked, **skill.answer})
        specs[part] = folder / f"{part}.json"
        specs[part].write_text(json.dumps(tasks, indent=1) + "\n")
    return specs
