"""What an exploration says while it works."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

import m3jax
from m3jax.exploration.progress import Progress, duration
from m3jax.exploration.search.trials import Trial


def trial(index, objective, budget=None):
    scores = {"a": objective, "b": objective}
    return Trial(index, budget, m3jax.Recipe(), 0, None, scores, objective)


def test_time_left_is_that_of_those_done_since_the_first():
    now = [100.0]
    progress = Progress(lambda: now[0])
    progress.add(trial(0, 5.0), recorded=True)
    now[0] = 170.0  # compiling
    progress.add(trial(1, 1.0), recorded=False)
    assert progress.text(trial(1, 1.0), 6) == "best so far draw 0 (5.0000)"
    for i in (2, 3):
        now[0] += 20
        progress.add(trial(i, math.nan), recorded=False)
    told = progress.text(trial(3, 0.0), 6)
    assert told == "best so far draw 0 (5.0000), about 2 min left"
    for left in (0, None):
        assert "left" not in progress.text(trial(3, 0.0), left)


def test_the_best_is_one_of_the_same_budget():
    progress = Progress()
    for one in (trial(0, 9.0, 1), trial(1, 8.0, 1), trial(1, 2.0, 3)):
        progress.add(one, recorded=True)
    assert "draw 1 (2.0000)" in progress.text(trial(1, 2.0, 3), None)


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.2, "1 s"), (59.4, "59 s"), (90, "2 min"), (7500, "2 h 5 min")],
)
def test_durations(seconds, told):
    assert duration(seconds) == told


@pytest.mark.parametrize("halving", [None, 2])
def test_every_line_says_the_best_so_far(halving):
    def evaluator(parameters, budget, key):
        return {"first": float(np.asarray(parameters["weight"])[0])}

    models = [{"weight": jnp.array([1.0, 0.0])}, {"weight": jnp.array([0.0, 1.0])}]
    said = []
    found = m3jax.explore(
        None,
        models,
        evaluator=evaluator,
        draws=4,
        halving=halving,
        budget=halving and 4,
        say=said.append,
    )
    lines = [line for line in said if " of " in line]
    assert len(lines) == len(found.trials)
    for i, line in enumerate(lines):
        own = [t for t in found.trials[: i + 1] if t.budget == found.trials[i].budget]
        top = max(own, key=lambda t: t.objective)
        assert f"; best so far draw {top.index} ({top.objective:.4f})" in line
    assert "left" in lines[1]
    for last in (lines[3], lines[-1]):  # of the first rung, and of all
        assert "left" not in last
