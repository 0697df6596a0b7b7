"""EMR-Merging on the demo's experts: each task's modulated model beside single merges.

python benchmarks/modulated.py --work=/tmp/modulated

Accuracies on the 400 test examples of each task. A row of one model is that model on
all tasks; the modulated models are each on its own.
"""

from __future__ import annotations

from pathlib import Path

from absl import app, flags

import m3jax
from m3jax import modulation
from m3jax.evaluation.evaluator import TaskEvaluator
from m3jax.evaluation.tasks.task import load_tasks
from m3jax.models.parameters import read_model_config
from m3jax.models.tokenizer import Tokenizer

_WORK = flags.DEFINE_string("work", None, "A folder to make.", required=True)

_DATA = Path(m3jax.__file__).parent / "demo_data"
_EXPERTS = ("maths", "code", "words")


def main(argv: list[str]) -> None:
    work, models = Path(_WORK.value), [str(_DATA / expert) for expert in _EXPERTS]
    config, folder = read_model_config(str(_DATA / "base"))
    tokenizer = Tokenizer(folder)
    judges = {
        task.name: TaskEvaluator([task], config, tokenizer)
        for task in load_tasks(_DATA / "tasks/test.json")
    }

    def score(task: str, path: str | Path) -> float:
        (result,) = judges[task].evaluate(m3jax.load(path))
        return result.mean

    def row(name: str, scores: list[float]) -> None:
        cells = " | ".join(f"{s:.3f}" for s in (*scores, sum(scores) / len(scores)))
        print(f"| {name} | {cells} |", flush=True)

    print(f"| model | {' | '.join(_EXPERTS)} | mean |\n|---|---|---|---|---|")
    row("each expert on its own task", [*map(score, _EXPERTS, models)])
    for method in ("average", "emr"):
        recipe = m3jax.Recipe(method=method, mixup=m3jax.Mixup(alpha=None))
        m3jax.merge(str(_DATA / "base"), models, work / method, recipe)
        name = {"average": "average", "emr": "EMR, unified model alone"}[method]
        row(name, [score(task, work / method) for task in _EXPERTS])
    own = [modulation.write(work / "emr", t, work / f"emr-{t}") for t in _EXPERTS]
    row("EMR, modulated for each task", [*map(score, _EXPERTS, own)])


if __name__ == "__main__":
    app.run(main)
