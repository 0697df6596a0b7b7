"""Attacks on prompts: what they change, how they choose, and the drop rate."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
import tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from m3jax.evaluation.attacks.neighbours import Neighbours
from m3jax.evaluation.attacks.prompts import (
    attacked_prompt,
    check_attackable,
    misspellings,
)
from m3jax.evaluation.attacks.robustness import Robustness, under_attack
from m3jax.evaluation.evaluator import TaskEvaluator
from m3jax.evaluation.results import Result
from m3jax.evaluation.tasks.task import Task, TaskError, load_tasks

FAMILY = "one_layer"
TOKENIZER = tiny_tokenizer.Characters()
NO_DATA = Path("none.jsonl")
PROMPT = "Read {text}, and say whether the word 'answer' is in {text}. Reply:"


def task(prompt: str, **fields) -> Task:
    return Task("t", "exact_match", NO_DATA, prompt, answer="{a}", **fields)


def edits(a: str, b: str) -> int:
    """Insertions, deletions, substitutions and swaps from one text to another."""
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    table[:, 0], table[0] = range(len(a) + 1), range(len(b) + 1)
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            ways = [
                table[i - 1, j] + 1,
                table[i, j - 1] + 1,
                table[i - 1, j - 1] + (a[i - 1] != b[j - 1]),
            ]
            if min(i, j) > 1 and a[i - 2 : i] == b[j - 2 : j][::-1]:
                ways.append(table[i - 2, j - 2] + 1)
            table[i, j] = min(ways)
    return int(table[-1, -1])


@given(st.text("abcXYZ", min_size=1, max_size=8), st.integers(0, 2**32 - 1))
def test_a_misspelling_is_one_edit(word, seed):
    found = misspellings(word, random.Random(seed))
    assert found == misspellings(word, random.Random(seed))
    assert all(text and edits(word, text) == 1 for text in found)
    lengths = [len(text) - len(word) for text in found]
    assert lengths.count(1) == 1
    assert lengths.count(-1) == (len(word) > 1)
    assert lengths.count(0) == 1 + (len(set(word)) > 1)


def needs(*words: str):
    """A model that is right by the share of `words` that its prompt has."""

    def score(prompt: str) -> float:
        return sum(word in prompt for word in words) / len(words)

    return score


def test_deepwordbug_misspells_the_words_that_matter_and_no_field():
    score = needs("whether", "Reply", "Reply:")
    found = attacked_prompt("deepwordbug", task(PROMPT), score, 0, lambda word: [])
    before, after = PROMPT.split(" "), found.split(" ")
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    # Ten words of the template are its own, three in ten of which are changed.
    assert len(changed) == 3
    assert {a for a, _ in changed} > {"whether", "Reply:"}
    assert all(edits(a, b) == 1 for a, b in changed)
    assert found.count("{text}") == 2
    assert score(found) == 0
    again = attacked_prompt("deepwordbug", task(PROMPT), score, 0, lambda word: [])
    other = attacked_prompt("deepwordbug", task(PROMPT), score, 1, lambda word: [])
    assert (again == found, other == found) == (True, False)


def test_the_worst_variant_is_taken():
    prompt, worst = "add {a}", "gather"

    def score(prompt: str) -> float:
        return 0.2 if worst in prompt else 0.5

    found = attacked_prompt("words", task(prompt), score, 0, lambda w: ["sum", worst])
    assert found == "gather {a}"
    # A word without neighbours stays.
    assert attacked_prompt("words", task(prompt), score, 0, lambda w: []) == prompt


def test_stresstest_appends_the_worst_statement_behind_the_last_field():
    def score(prompt: str) -> float:
        return -len(prompt)

    found = attacked_prompt("stresstest", task(PROMPT), score, 0, lambda word: [])
    start, end = PROMPT[: PROMPT.rindex(".")], ". Reply:"
    assert found.startswith(start) and found.endswith(end)
    statement = found[len(start) : -len(end)]
    shorter = attacked_prompt("stresstest", task(PROMPT), len, 0, lambda word: [])
    assert len(shorter) < len(found)
    assert statement.startswith(" and ") and "{" not in statement
    bare = attacked_prompt("stresstest", task("Answer."), len, 0, lambda word: [])
    assert bare.startswith("Answer. and ")


def test_drop_rate():
    def result(*scores: float) -> Result:
        return Result("t", "accuracy", tuple({"score": s} for s in scores), 0)

    half = Robustness("words", "", result(1, 1, 1, 1), result(1, 1, 0, 0))
    assert half.drop_rate == 0.5
    better = dataclasses.replace(half, clean=result(1, 0, 0, 0))
    assert better.drop_rate == -1
    assert math.isnan(dataclasses.replace(half, clean=result(0, 0)).drop_rate)


def test_what_cannot_be_attacked_is_refused():
    loss = Task("t", "loss", NO_DATA, "Say {a}", completion="{b}")
    with pytest.raises(TaskError, match="has a loss"):
        check_attackable(loss, "stresstest")
    for attack in ("deepwordbug", "words"):
        with pytest.raises(TaskError, match="no words outside of its fields"):
            check_attackable(task("{a} + 1:"), attack)
    check_attackable(task("{a} + 1:"), "stresstest")


class Words:
    """A tokenizer of whole words."""

    stop_tokens = ()
    first_token = 0
    words = ("<s>", " Big", "large", " small", "LARGE", "xy", "7th", "tiny", "mid")

    def encode(self, text, *, add_special_tokens):
        return [6] if text == "unknown" else [self.words.index(text)]

    def decode(self, tokens):
        return "".join(self.words[token] for token in tokens)

    def chat(self, messages):
        raise NotImplementedError


def test_neighbours_are_the_nearest_words_by_cosine():
    embedding = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
    find = Neighbours(jnp.asarray(embedding), Words())
    unit = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)

    def expected(token: int, *but: str) -> list[str]:
        order = np.argsort(-(unit @ unit[token]))
        found = [
            Words.words[i].strip().lower() for i in order if i in (1, 2, 3, 4, 7, 8)
        ]
        return [word for word in dict.fromkeys(found) if word not in but]

    assert find("Big") == [word.capitalize() for word in expected(1, "big")]
    assert find("tiny") == expected(7, "tiny")
    assert find("unknown") == expected(6)  # by the embedding of its own tokens


def test_a_vocabulary_without_words_is_refused():
    with pytest.raises(TaskError, match="no token that is a word"):
        Neighbours(
            tiny_models.parameters(FAMILY)["model"]["embed_tokens"]["weight"], TOKENIZER
        )


def test_scores_under_attack_are_those_of_the_prompt_that_it_found(tmp_path):
    records = [
        {"text": f"{i}", "options": ["yes", "no way", "perhaps"], "label": i % 3}
        for i in range(9)
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, records)))
    spec = {"name": "t", "kind": "choice", "data": "t.jsonl", "prompt": "say {text} or"}
    spec |= {"choices": "{options}", "answer": "{label}"}
    (tmp_path / "t.json").write_text(json.dumps(spec))
    tasks = load_tasks(tmp_path / "t.json")
    parameters = tiny_models.parameters(FAMILY)

    def evaluator(task: Task) -> TaskEvaluator:
        return TaskEvaluator([task], tiny_models.config(FAMILY), TOKENIZER)

    def score(prompt: str) -> float:
        asked = evaluator(dataclasses.replace(tasks[0], prompt=prompt))
        return asked(parameters, None, jax.random.key(0))["t"]

    clean = evaluator(tasks[0]).evaluate(parameters)
    found = list(
        under_attack(
            tasks,
            ("deepwordbug", "stresstest"),
            clean,
            parameters,
            evaluator,
            neighbours=lambda word: [],
            examples=9,
            limit=None,
            seed=3,
        )
    )
    assert [each.attack for each in found] == ["deepwordbug", "stresstest"]
    for each in found:
        assert each.prompt != tasks[0].prompt
        assert each.attacked.mean == score(each.prompt)
        assert each.clean.mean == score(tasks[0].prompt)
    # It looked for the worst on these very examples.
    assert found[1].attacked.mean <= score("say {text} and one is one or")
