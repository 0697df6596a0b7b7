"""The folder of a run, and what it leaves there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from m3jax.checkpoints.places import durable
from m3jax.evaluation.results import as_json
from m3jax.learn.report.result import Comparison, Learning
from m3jax.runs.folder import write

STATE = "state.msgpack"  # where the run stands
RECIPE, SUMMARY, CURVES = "recipe.json", "summary.json", "curves.png"
PICTURE = "coefficients.png"
# Of the coefficients of model k, where they are too many for the recipe.
COEFFICIENTS = "coefficients-{}.safetensors"
FILES = (STATE, RECIPE, SUMMARY, CURVES, PICTURE, COEFFICIENTS.format("*"))


def write_outputs(found: Learning, folder: Path, say: Callable[[str], None]) -> None:
    """Writes recipe, coefficients, summary and pictures.

    Without matplotlib there are no pictures, and `say` is told so.
    """
    from safetensors.numpy import save_file

    for k, own in enumerate(found.statistics):
        with durable.appearing(folder / COEFFICIENTS.format(k)) as unfinished:
            save_file(dict(sorted(own.items())), unfinished)
    for name, content in ((RECIPE, found.replay), (SUMMARY, summary(found))):
        text = json.dumps(as_json(content), indent=1, ensure_ascii=False)
        write(folder / name, text + "\n")
    try:
        from m3jax.learn.report import picture
    except ImportError:
        say(
            f"{CURVES} was not drawn, it needs matplotlib; install it from a checkout: "
            "pip install '.[plot]'"
        )
        return
    names = [Path(own["path"]).name for own in found.replay.get("models", ())]
    with durable.naming(folder):
        picture.curves(found, folder / CURVES)
        picture.coefficients(found, names, folder / PICTURE)


def summary(found: Learning) -> dict[str, Any]:
    """What was learned, as JSON values."""
    return {
        "step": found.step,
        "losses": list(found.losses),
        "validation": [{"step": step, "loss": loss} for step, loss in found.looks],
        "test": [dataclasses.asdict(own) for own in found.comparisons],
        "coefficients": {
            name: {
                "mean": [float(row.mean()) for row in own],
                "least": [float(row.min()) for row in own],
                "most": [float(row.max()) for row in own],
            }
            for name, own in found.coefficients.items()
            if own.size
        },
    }


def rows(comparisons: tuple[Comparison, ...]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the test table, as text."""
    header = ["test", "metric", "start", "learned", "gain", "95 % interval"]
    return header, [
        [
            own.task,
            own.metric,
            f"{own.start:.4f}",
            f"{own.learned:.4f}",
            f"{own.gain:+.4f}",
            "—"
            if own.interval is None
            else f"{own.interval[0]:+.4f} to {own.interval[1]:+.4f}",
        ]
        for own in comparisons
    ]
