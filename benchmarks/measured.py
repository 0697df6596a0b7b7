"""Merges the demo's experts with what was measured of them, beside the plain average.

python benchmarks/measured.py --work=/tmp/measured

Fisher information and Gram matrices of each expert are measured on the 200 validation
examples of its own task; scores are accuracies on the 400 test examples of each task,
which no merge has seen. Nothing is tuned: every method has its defaults.
"""

from __future__ import annotations

import json
from pathlib import Path

from absl import app, flags

import m3jax
from m3jax.evaluation.evaluator import TaskEvaluator
from m3jax.evaluation.tasks.task import load_tasks
from m3jax.measuring.statistics import measure_fisher, measure_gram
from m3jax.models.parameters import read_model_config
from m3jax.models.tokenizer import Tokenizer

_WORK = flags.DEFINE_string("work", None, "A folder to make.", required=True)

_DATA = Path(m3jax.__file__).parent / "demo_data"
_EXPERTS = ("maths", "code", "words")


def main(argv: list[str]) -> None:
    work = Path(_WORK.value)
    tasks = {task.name: task for task in load_tasks(_DATA / "tasks/validation.json")}
    measured: dict[str, list[str]] = {}
    for expert in _EXPERTS:
        given = (str(_DATA / expert), [tasks[expert]])
        for kind in ("exact", "sampled", "empirical"):
            folder = measure_fisher(*given, work / f"{expert}-{kind}", kind=kind)
            measured.setdefault(f"fisher, {kind}", []).append(str(folder))
        folder = measure_gram(*given, work / f"{expert}-gram")
        measured.setdefault("regmean", []).append(str(folder))
    config, folder = read_model_config(str(_DATA / "base"))
    judge = TaskEvaluator(
        load_tasks(_DATA / "tasks/test.json"), config, Tokenizer(folder)
    )
    print(f"| method | {' | '.join(_EXPERTS)} | mean |\n|---|---|---|---|---|")
    for name, statistics in {"average": [], **measured}.items():
        recipe = m3jax.Recipe(
            method=name.partition(",")[0], mixup=m3jax.Mixup(alpha=None)
        )
        output = work / name.replace(", ", "-")
        m3jax.merge(
            str(_DATA / "base"),
            [str(_DATA / expert) for expert in _EXPERTS],
            output,
            recipe,
            statistics=statistics,
        )
        scores = {r.task: r.mean for r in judge.evaluate(m3jax.load(output))}
        mean = sum(scores.values()) / len(scores)
        cells = [*(scores[expert] for expert in _EXPERTS), mean]
        print(f"| {name} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")
    (work / "statistics.json").write_text(json.dumps(measured, indent=1))


if __name__ == "__main__":
    app.run(main)
