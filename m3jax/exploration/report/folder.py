"""The folder that an exploration writes into, and what it leaves there."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.formats import tree
from m3jax.checkpoints.places import durable
from m3jax.exploration.report import summary
from m3jax.exploration.report.html.page import render
from m3jax.exploration.search.result import Exploration

TRIALS, SCORES, TIMES = "trials.jsonl", "scores.jsonl", "times.jsonl"
SUMMARY, TABLE, PICTURE = "summary.json", "summary.md", "scores.png"
WINNER, PAGE = "winner.json", "report.html"
STATISTICS = "statistics-{}.safetensors"  # of each model, which the winner reads
STUDY = "study.journal"  # of processes that share the work
_RESULTS = (TRIALS, SCORES, TIMES, SUMMARY, TABLE, PICTURE, WINNER, PAGE)
FILES = (*_RESULTS, STUDY, STATISTICS.format("*"))


@contextlib.contextmanager
def claimed(
    folder: Path,
    *,
    overwrite: bool,
    resume: bool,
    what: str = "exploration",
    files: tuple[str, ...] = FILES,
    first: str = TRIALS,
) -> Iterator[None]:
    """Makes the folder, and keeps others from writing into it meanwhile.

    Args:
      folder: may hold other files; they are left alone.
      overwrite: remove what an earlier run has written.
      resume: go on from there.
      what: a run is called.
      files: that it writes, as patterns.
      first: of these, the one that says whose they are.

    Raises:
      CheckpointError: a run is there, and neither was asked for; or another process is
        writing.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise CheckpointError(
            f"{folder}: it, or what it lies in, is not a folder; choose another "
            "--output"
        ) from None
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{folder}: another {what} is writing there; wait for it, or "
                "choose another --output"
            ) from None
        there = [own.name for name in files for own in sorted(folder.glob(name))]
        if there and first not in there:
            raise CheckpointError(
                f"{folder}: holds {there[0]}, but no {first}, so it is not m3jax's; "
                "move it away or choose another --output"
            )
        if there and not (overwrite or resume):
            raise CheckpointError(
                f"{folder}: holds an earlier {what}; --resume goes on with it, "
                "--overwrite begins anew"
            )
        if not resume:
            for name in reversed(there):  # the trials last: they say whose it is
                (folder / name).unlink()
        try:
            yield
        except BaseException as error:
            # A ValueError would be raised again: something has to be mended first.
            if (folder / first).exists() and not isinstance(error, ValueError):
                error.add_note(
                    f"what is done so far is kept in {folder}; the same command with "
                    "--resume goes on from there"
                )
            raise
    finally:
        os.close(fd)


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


def write(path: Path, text: str) -> None:
    """Writes a file that is there completely or not at all."""
    unfinished = path.with_name(f".{path.name}.partial")
    try:
        with durable.naming(path):
            unfinished.write_text(text, encoding="utf-8")
        durable.sync(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
