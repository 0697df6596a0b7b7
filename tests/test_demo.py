"""`m3jax demo`: what it prints is so, and comes out the same again."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import m3jax


def rows_of(text: str, header: str) -> dict[str, list[str]]:
    """The cells of a table by the first one of each row."""
    lines = text[text.index(header) :].split("\n\n")[0].splitlines()[1:]
    cells = [re.split(r"\s{2,}", line.strip()) for line in lines]
    return {first: rest for first, *rest in cells}


@pytest.mark.slow  # CI runs the demo itself as well
def test_the_demo_tells_the_truth(run, tmp_path, monkeypatch):
    # Each of the tests' eight devices would compile everything.
    monkeypatch.setattr("m3jax.commands.demo._MOST_AT_ONCE", 1)
    monkeypatch.setattr("m3jax.commands.demo._LEARNED_STEPS", 2)
    folder = tmp_path / "with space"
    ran = run("demo", f"--output={folder}", "--draws=6", "--seed=3")
    assert ran.code == 0, ran.err
    merges = rows_of(ran.out, "recipe  ")
    checksums = {name: cells[-1] for name, cells in merges.items()}
    assert checksums["ties_dare, again"] == checksums["ties_dare"]
    assert checksums["ties_dare, other seed"] != checksums["ties_dare"]
    for name in ("average", "task_arithmetic_dare", "ties", "ties_dare"):
        assert m3jax.verify(folder / name) == []

    scores = rows_of(ran.out, "accuracy on test")
    for place, expert in enumerate(("maths", "code", "words")):
        column = {name: float(cells[place]) for name, cells in scores.items()}
        assert (
            max(column[name] for name in ("base", "maths", "code", "words"))
            == (column[expert])
        )
    (winner,) = (cells for name, cells in scores.items() if "winner" in name)
    trials = [
        json.loads(line)
        for line in (folder / "explored" / "trials.jsonl").read_text().splitlines()
    ]
    objectives = [line["objective"] for line in trials if "objective" in line]
    assert len(objectives) == 6
    assert float(winner[-1]) == pytest.approx(max(objectives), abs=6e-4)
    for command in re.findall(r"^    m3jax (.*)$", ran.out, re.M)[:6]:
        assert "with space" in command or "winner" in command

    learned = rows_of(ran.out, "test   metric    equal ratios")
    for place, row in enumerate(("maths", "code", "words")):
        equal = float(scores["equal ratios"][place])
        # The same merge, but for the order of products.
        assert float(learned[row][1]) == pytest.approx(equal, abs=0.01)

    explored, merged = folder / "explored" / "winner.json", folder / "winner"
    ran = run("merge", f"--config={explored}", f"--output={merged}")
    assert ran.code == 0, ran.err
    tasks = Path(m3jax.__file__).parent / "demo_data" / "tasks" / "test.json"
    ran = run("evaluate", merged, f"--tasks={tasks}", "--json")
    means = [entry["mean"] for entry in json.loads(ran.out)]
    assert means == pytest.approx([float(cell) for cell in winner[:3]], abs=6e-4)
