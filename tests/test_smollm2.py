"""The parts of benchmarks/smollm2.py that need neither its model nor its data."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import m3jax
from m3jax.evaluation.tasks.apart import check_apart
from m3jax.evaluation.tasks.examples import load_examples
from m3jax.evaluation.tasks.task import load_tasks
from m3jax.exploration.search.result import Exploration, Row
from m3jax.exploration.search.scoring import Objective, Scored
from m3jax.exploration.search.trials import Trial
from m3jax.learn import Learning

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import smollm2_data as data
import smollm2_gguf as gguf
import smollm2_table as table

EXAMPLES = [{"prompt": f"Add {i} and 1.", "completion": f"{i + 1}"} for i in range(300)]


def test_parts_are_disjoint_and_complete() -> None:
    parts = data.split([*EXAMPLES, *EXAMPLES])
    prompts = [example["prompt"] for own in parts.values() for example in own]
    assert sorted(prompts) == sorted(example["prompt"] for example in EXAMPLES)
    assert 150 < len(parts["train"]) < 210
    assert 15 < len(parts["learning"]) < 45
    assert 15 < len(parts["validation"]) < 45
    assert 40 < len(parts["test"]) < 80


def test_parts_follow_from_the_prompt_alone() -> None:
    backwards = data.split(reversed(EXAMPLES))
    for part, own in data.split(EXAMPLES).items():
        assert backwards[part] == own[::-1]
        for example in own:
            digits = hashlib.sha256(example["prompt"].encode()).hexdigest()
            later = {6: "learning", 7: "validation", 8: "test", 9: "test"}
            assert part == later.get(int(digits, 16) % 10, "train")


@pytest.mark.parametrize(
    ("prompt", "part"),
    [
        ("Add 0 and 1.", "train"),
        ("Add 1 and 1.", "learning"),
        ("Add 4 and 1.", "validation"),
        ("Add 12 and 1.", "test"),
    ],
)
def test_parts_never_change(prompt: str, part: str) -> None:
    assert data.part_of(prompt) == part


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    maths = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(40)]
    code = [
        {
            "text": f"Write a function that adds {i}.",
            "code": f"def add(x):\r\n    return x + {i}\r\n",
            "test_list": [f"assert add(1) == {1 + i}", f"assert add(2) == {2 + i}"],
            "test_setup_code": "",
        }
        for i in range(40)
    ]
    for skill, own in zip(data.SKILLS, (maths, code), strict=True):
        text = "".join(json.dumps(line) + "\n" for line in own)
        (tmp_path / skill.file).write_text(text)
    return tmp_path


def test_task_files_hold_the_parts(lines: Path, tmp_path: Path) -> None:
    parts = {skill.name: data.split(data.read(skill, lines)) for skill in data.SKILLS}
    specs = data.write_tasks(tmp_path / "tasks", parts)
    tasks = {part: load_tasks(spec) for part, spec in specs.items()}
    assert check_apart(tasks["validation"], tasks["test"]) == []
    for part, own in tasks.items():
        assert [(task.name, task.kind) for task in own] == [
            ("maths", "loss"),
            ("code", "loss"),
        ]
        for task in own:
            found = [(e.prompt, e.completion) for e in load_examples(task)]
            examples = parts[task.name][part]
            assert found == [(e["prompt"], e["completion"]) for e in examples]
            assert not any("\r" in completion for _, completion in found)


def test_answers_are_asked_for_in_test_alone(lines: Path, tmp_path: Path) -> None:
    parts = {skill.name: data.split(data.read(skill, lines)) for skill in data.SKILLS}
    specs = data.write_tasks(tmp_path / "tasks", parts, generate=True)
    kinds = {part: [t.kind for t in load_tasks(own)] for part, own in specs.items()}
    assert kinds == {
        "learning": ["loss", "loss"],
        "validation": ["loss", "loss"],
        "test": ["loss", "numeric", "loss"],
    }
    specs = data.write_tasks(tmp_path / "tasks", parts, generate=True, execute=True)
    code = load_tasks(specs["test"])[-1]
    example = load_examples(code)[0]
    assert code.kind == "code"
    assert example.tests.count("assert add(") == 2
    assert example.prompt.count("assert add(") == 1


def test_rows_are_ordered_for_rotation_by_halves() -> None:
    heads, head_dim, columns = 3, 8, 5
    halves = np.arange(heads * head_dim * columns).reshape(-1, columns)
    # As the file holds them: channel i beside channel i + head_dim / 2.
    pairs = np.concatenate(
        [
            halves[[head * head_dim + i, head * head_dim + i + head_dim // 2]]
            for head in range(heads)
            for i in range(head_dim // 2)
        ]
    )
    assert np.array_equal(gguf.halves_together(pairs, heads), halves)


def test_names_of_tensors() -> None:
    found = [
        gguf.checkpoint_name(f"{name}.weight")
        for name in ("token_embd", "blk.11.attn_output", "output_norm")
    ]
    assert found == [
        "model.embed_tokens.weight",
        "model.layers.11.self_attn.o_proj.weight",
        "model.norm.weight",
    ]
    with pytest.raises(ValueError, match=r"'blk\.0\.ssm\.weight'"):
        gguf.checkpoint_name("blk.0.ssm.weight")


def test_batches_hold_every_sequence_once_an_epoch() -> None:
    pytest.importorskip("optax")
    import smollm2_training as training

    sequences = [
        training.Tokens(list(range(i, 2 * i + 5)), learned=i % 4 + 1)
        for i in range(1, 65)
    ]
    source = training.batches(sequences, 8, seed=0)
    for _ in range(2):
        firsts = []
        for _ in range(8):
            tokens, valid, learned = next(source)
            assert tokens.shape[1] % 64 == 0
            firsts += tokens[:, 0].tolist()
            for row, (first, count) in enumerate(
                zip(tokens[:, 0], valid.sum(1), strict=True)
            ):
                assert tokens[row][valid[row]].tolist() == sequences[first - 1].tokens
                assert count == first + 5
                ends = np.flatnonzero(learned[row])
                assert len(ends) == first % 4 + 1
                assert ends[-1] == count - 1
        assert sorted(firsts) == list(range(1, 65))


def scored(maths: float, code: float) -> Scored:
    """Means over two examples, of which one is harder by 1."""
    examples = {"maths": [maths - 0.5, maths + 0.5], "code": [code - 0.5, code + 0.5]}
    return Scored({"maths": maths, "code": code}, examples)


def exploration(draws: list[float], ratio: float | None = None) -> Exploration:
    """Losses on test as given, on validation greater by 1, of maths less by 0.2."""

    def lists(loss: float) -> dict[str, Scored]:
        return {
            "validation": scored(loss + 0.8, loss + 1.2),
            "test": scored(loss - 0.2, loss + 0.2),
        }

    trials = tuple(
        Trial(
            index=i,
            budget=None,
            recipe=m3jax.Recipe(),
            seed=i,
            ratios=None if ratio is None else {"model": (ratio, 1 - ratio)},
            scores=lists(loss)["validation"].scores,
            objective=-loss - 1,
        )
        for i, loss in enumerate(draws)
    )
    rows = [Row(name, "parent", lists(3.0)) for name in ("base", "maths", "code")]
    rows.append(Row("winner", "winner", lists(min(draws))))
    losses = Objective({}, frozenset({"maths", "code"}))
    return Exploration(trials, trials[0], tuple(rows), losses, ("maths", "code"), 0)


ENTRIES = [
    table.Entry("average", exploration([2.0])),
    table.Entry("average + M3", exploration([1.5, 1.7, 2.2], 0.25), "average"),
    table.Entry("TIES", exploration([2.25])),
    table.Entry("LFS, searched", exploration([2.4, 1.9, 2.3])),
]


def test_the_main_table_has_parents_draws_and_winners():
    main = table.main_table(ENTRIES, ["maths", "code"]).splitlines()
    assert main[0] == (
        "|  | validation: maths | validation: code | validation: mean | "
        "test: maths | test: code | test: mean |"
    )
    rows = dict(line[2:-2].split(" | ", maxsplit=1) for line in main[2:])
    assert list(rows) == [
        *("base", "maths", "code", "average", "average + M3, 3 draws"),
        *("average + M3, winner (λ = 0.25)", "TIES", "LFS, searched"),
    ]
    assert rows["base"] == "3.8000 | 4.2000 | 4.0000 | 2.8000 | 3.2000 | 3.0000"
    drawn = rows["average + M3, 3 draws"]
    assert drawn.startswith("2.6000 ± 0.3606 | ") and drawn.endswith(" |  |  | ")
    best = rows["average + M3, winner (λ = 0.25)"]
    assert best.endswith("| **1.3000** | **1.7000** | **1.5000**")


def test_what_changes_is_counted_against_the_first():
    against, sentence = table.comparison(ENTRIES, ["maths", "code"])
    change = "-0.5000 [-0.5000, -0.5000]"
    assert f"| average + M3 | 1.5000 | {change} | {change} |" in against
    assert "| TIES | 2.2500 | +0.2500 [+0.2500, +0.2500] |  |" in against
    assert sentence.startswith(
        "Of 3 ways to merge, 2 (average + M3; LFS, searched) are better than average "
        "and 1 (TIES) is worse,"
    )


def test_what_was_learned_is_told():
    found = Learning(
        recipe=m3jax.Recipe(),
        seed=0,
        statistics=(),
        coefficients={"a": np.array([0.25, 0.75]), "b": np.array([0.5, 0.5])},
        losses=(3.0, 2.0),
        looks=((0, 1.5), (8, 1.25)),
        step=8,
    )
    told = table.learned({"soup": found}, ["maths", "code"]).splitlines()
    assert told[2] == (
        "| soup | 1.5000 | 1.2500 | 8 of 8 | 0.375 (0.250 to 0.500) | "
        "0.625 (0.500 to 0.750) |"
    )
