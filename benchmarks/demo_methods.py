"""Merges the demo's three experts by many methods, and scores each on unseen questions.

python benchmarks/demo_methods.py

Accuracies on the 400 test examples of each task. Nothing is tuned: defaults, but for
what stands in the row's name. It is a toy: three experts of 142,000 parameters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from absl import app, flags

import m3jax
from m3jax.evaluation.evaluator import TaskEvaluator
from m3jax.evaluation.tasks.task import load_tasks
from m3jax.models.parameters import read_model_config
from m3jax.models.tokenizer import Tokenizer

_DATA = Path(m3jax.__file__).parent / "demo_data"
_EXPERTS = ("maths", "code", "words")
_ONLY = flags.DEFINE_string("only", "", "Rows with this in their name.")
_HALF = {"method": "task_arithmetic", "scaling": 0.5}
ROWS: dict[str, dict[str, Any]] = {
    "average": {"method": "average"},
    "task arithmetic, s 0.5": _HALF,
    "task arithmetic, s 0.7": {**_HALF, "scaling": 0.7},
    "task arithmetic, s 0.5, DARE 0.5": {**_HALF, "dare": {"drop_rate": 0.5}},
    "task arithmetic, s 0.5, Breadcrumbs": {
        **_HALF,
        "breadcrumbs": {"beta": 0.5, "gamma": 0.01},
    },
    # a as the paper has it, of the norms that `m3jax measure similarity` tells.
    "task arithmetic, s 1, LiNeS 0.46 + 0.2 d": {
        **_HALF,
        "scaling": 1.0,
        "lines": {"first": 0.46, "slope": 0.2},
    },
    "task arithmetic, s 1, SVC 0.1": {**_HALF, "scaling": 1.0, "svc": {"alpha": 0.1}},
    "TIES": {"method": "ties"},
    "DELLA (MagPrune 0.5, TIES)": {
        "method": "ties",
        "ties": {"trim_rate": 0.0},
        "magprune": {"drop_rate": 0.5},
    },
    "TSV-M": {"method": "tsv_m"},
    "TSV-M, SVC 1": {"method": "tsv_m", "svc": {"alpha": 1.0}},
    "TSV-M, ranks by participation": {
        "method": "tsv_m",
        "tsv_m": {"rank": "participation"},
    },
    "Balanced TSV (ours)": {"method": "balanced_tsv"},
    "Iso-C": {"method": "iso_c"},
    "STAR": {"method": "star"},
    "WUDI, closed form": {"method": "wudi_closed_form"},
    "Consensus": {"method": "consensus"},
    "PCB": {"method": "pcb"},
    "MetaGPT": {"method": "metagpt"},
    "Localize-and-Stitch, 0.2": {
        "method": "localize_and_stitch",
        "localize_and_stitch": {"share": 0.2},
    },
}


def main(argv: list[str]) -> None:
    config, folder = read_model_config(str(_DATA / "base"))
    judge = TaskEvaluator(
        load_tasks(_DATA / "tasks/test.json"), config, Tokenizer(folder)
    )
    base, *models = (m3jax.load(_DATA / name) for name in ("base", *_EXPERTS))
    print(f"| method | {' | '.join(_EXPERTS)} | mean |\n|---|---|---|---|---|")
    for name, fields in ROWS.items():
        if _ONLY.value not in name:
            continue
        recipe = m3jax.Recipe.from_dict({"mixup": {"alpha": None}, **fields})
        merged = m3jax.merge_params(base, models, recipe, 0)
        scores = {r.task: r.mean for r in judge.evaluate(merged)}
        cells = [scores[expert] for expert in _EXPERTS]
        cells.append(sum(cells) / len(cells))
        print(f"| {name} | {' | '.join(f'{c:.3f}' for c in cells)} |", flush=True)


if __name__ == "__main__":
    app.run(main)
