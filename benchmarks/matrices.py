"""Times methods by whole matrix: seconds and memory per matrix, and of a whole model.

    python benchmarks/matrices.py --size=1.1b
    python benchmarks/matrices.py --size=160m --methods=tsv_m,iso_c --models=8

A process for each method and shape merges one matrix of K models twice, as
`merge_params` does it, and reports the second time and its peak memory. "Model" adds
the matrices of the size up, one after the other, as a streamed merge takes them. The
task vectors are random: an SVD costs the same whatever its matrix holds.

The whole of it, with the memory that was planned beside what was taken:

    python benchmarks/make_checkpoints.py --size=1.1b --output=/tmp/trio
    m3jax merge --base=/tmp/trio/base --models=/tmp/trio/maths,/tmp/trio/code \
        --config.method=tsv_m --output=/tmp/merged --dry_run
    python benchmarks/matrices.py --size=1.1b --trio=/tmp/trio --methods=tsv_m
"""

from __future__ import annotations

import collections
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bench
from absl import app, flags
from llamas import SIZES, shapes

_SIZE = flags.DEFINE_enum("size", "160m", list(SIZES), "Shapes of the model.")
_METHODS = flags.DEFINE_list("methods", ["tsv_m", "iso_c", "star"], "By matrix.")
_MODELS = flags.DEFINE_integer("models", 2, "K.", 1)
_TRIO = flags.DEFINE_string("trio", None, "A trio of that size, to merge whole.")
_CHILD = flags.DEFINE_string("child", None, "Of this program: METHOD,ROWS,COLUMNS.")


def main(argv: list[str]) -> None:
    if _CHILD.value is not None:
        method, rows, columns = _CHILD.value.split(",")
        print(json.dumps(_one(method, (int(rows), int(columns)))))
        return
    counts = collections.Counter(s for s in shapes(_SIZE.value).values() if len(s) == 2)
    print("| method | matrix | of them | seconds | GB | model, s |\n|" + "---|" * 6)
    for method in _METHODS.value:
        total = 0.0
        for shape, count in sorted(counts.items()):
            child = f"--child={method},{shape[0]},{shape[1]}"
            command = [sys.executable, __file__, child, f"--models={_MODELS.value}"]
            found = bench.run(command)
            seconds = found.report["seconds"]
            total += seconds * count
            print(
                f"| {method} | {shape[0]} × {shape[1]} | {count} | {seconds:.2f} | "
                f"{found.peak_bytes / 1e9:.2f} | {total:.0f} |",
                flush=True,
            )
        if _TRIO.value is not None:
            _whole(method, Path(_TRIO.value))


def _one(method: str, shape: tuple[int, int]) -> dict[str, float]:
    """The second of two merges of one matrix."""
    import jax
    import numpy as np

    import m3jax

    rng = np.random.default_rng(0)
    base, *models = (
        {"weight": rng.normal(0, 0.02, shape).astype(np.float32)}
        for _ in range(1 + _MODELS.value)
    )
    recipe = m3jax.Recipe(method=method, mixup=m3jax.Mixup(alpha=None))
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        jax.block_until_ready(m3jax.merge_params(base, models, recipe, 0))
        seconds = time.perf_counter() - start
    return {"seconds": seconds}


def _whole(method: str, trio: Path) -> None:
    """A merge from files to files."""
    with tempfile.TemporaryDirectory(dir=trio) as work:
        command = [
            *(sys.executable, "-m", "m3jax", "merge", f"--base={trio}/base"),
            f"--models={trio}/maths,{trio}/code",
            *(f"--output={work}/merged", f"--config.method={method}", "--nofsync"),
            "--config.mixup.alpha=None",
        ]
        planned = subprocess.run(
            [*command, "--dry_run"], check=True, capture_output=True, text=True
        ).stdout
        memory = next(x for x in planned.splitlines() if x.startswith("memory"))
        found = bench.run(command)
        print(
            f"| {method} | the trio | 1 | {found.wall:.1f} | "
            f"{found.peak_bytes / 1e9:.2f} | planned: {memory.split(maxsplit=1)[1]} |"
        )


if __name__ == "__main__":
    app.run(main)
