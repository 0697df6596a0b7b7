"""The folder that an exploration writes into, and what it leaves there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from m3jax.checkpoints.formats import tree
from m3jax.checkpoints.places import durable
from m3jax.exploration.report import summary
from m3jax.exploration.report.html.page import render
from m3jax.exploration.search.result import Exploration
from m3jax.runs.folder import write

TRIALS, SCORES, TIMES = "trials.jsonl", "scores.jsonl", "times.jsonl"
SUMMARY, TABLE, PICTURE = "summary.json", "summary.md", "scores.png"
WINNER, PAGE = "winner.json", "report.html"
STATISTICS = "statistics-{}.safetensors"  # of each model, which the winner reads
STUDY = "study.journal"  # of processes that share the work
_RESULTS = (TRIALS, SCORES, TIMES, SUMMARY, TABLE, PICTURE, WINNER, PAGE)
FILES = (*_RESULTS, STUDY, STATISTICS.format("*"))


def write_outputs(found: Exploration, folder: Path, say: Callable[[str], None]) -> None:
    """Writes summary, winner.json, report.html and scores.png into a folder.

    Without matplotlib there is no picture, and `say` is told so.
    """
    for name, content in (
        (SUMMARY, summary.as_dict(found)),
        (WINNER, found.replay),
    ):
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        write(folder / name, text + "\n")
    write(folder / TABLE, summary.as_markdown(found))
    write(folder / PAGE, render(found))
    try:
        from m3jax.exploration.report import picture
    except ImportError:
        say(
            f"{PICTURE} was not drawn, it needs matplotlib; install it from a "
            "checkout: pip install '.[plot]'"
        )
        return
    with durable.naming(folder / PICTURE):
        picture.draw(found, folder / PICTURE)


def write_statistics(found: Exploration, folder: Path) -> dict[str, Any]:
    """Writes what the winner's method reads beside the models; the replay's part."""
    if not found.statistics:
        return {}
    import numpy as np
    from safetensors.numpy import save_file

    paths = []
    for k, own in enumerate(found.statistics):
        leaves, _ = tree.flatten(own)
        arrays = {name: np.ascontiguousarray(leaf) for name, leaf in leaves.items()}
        paths.append(folder / STATISTICS.format(k))
        with durable.naming(paths[-1]):
            save_file(arrays, paths[-1])
    return {"statistics": [{"path": str(path)} for path in paths]}
