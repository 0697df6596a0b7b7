"""Writes what an exploration found: summary, picture and the winner's recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from m3jax.checkpoints import durable
from m3jax.exploration.report import folder as files
from m3jax.exploration.report import summary
from m3jax.exploration.report.log import write_whole
from m3jax.exploration.search.result import Exploration


def write_outputs(found: Exploration, folder: Path, say: Callable[[str], None]) -> None:
    """Writes summary.json, summary.md, winner.json and scores.png into a folder.

    Without matplotlib there is no picture, and `say` is told so.
    """
    for name, content in (
        (files.SUMMARY, summary.as_json(found)),
        (files.WINNER, found.replay),
    ):
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        write_whole(folder / name, text + "\n")
    write_whole(folder / files.TABLE, summary.as_markdown(found))
    try:
        from m3jax.exploration.report import picture
    except ImportError:
        say(
            f"{files.PICTURE} was not drawn, it needs matplotlib; install it with: "
            "pip install 'm3jax[plot]'"
        )
        return
    with durable.naming(folder / files.PICTURE):
        picture.draw(found, folder / files.PICTURE)
