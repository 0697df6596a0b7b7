"""Times methods: by whole matrix each matrix, and any of them on a whole model.

    python benchmarks/matrices.py --size=1.1b
    python benchmarks/matrices.py --size=160m --methods=tsv_m,iso_c --models=8

A process for each method and shape merges one matrix of K models twice, as
`merge_params` does it, and reports the second time and its peak memory. "Model" adds
the matrices of the size up, one after the other, as a streamed merge takes them. The
task vectors are random: an SVD costs the same whatever its matrix holds.

A trio from files to files, with the memory that was planned beside what was taken;
`data_free` are all methods that read nothing but models:

    python benchmarks/make_checkpoints.py --size=1.1b --output=/tmp/trio
    python benchmarks/matrices.py --trio=/tmp/trio --methods=data_free
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
_METHODS = flags.DEFINE_list(
    "methods", ["tsv_m", "iso_c", "star"], "Those by matrix; with --trio any."
)
_MODELS = flags.DEFINE_integer("models", 2, "K.", 1)
_TRIO = flags.DEFINE_string("trio", None, "A folder of models, to merge whole.")
_OUTPUT = flags.DEFINE_string("output", None, "A folder with room. [that of the trio]")
_CHILD = flags.DEFINE_string("child", None, "Of this program: METHOD,ROWS,COLUMNS.")


def main(argv: list[str]) -> None:
    if _CHILD.value is not None:
        method, rows, columns = _CHILD.value.split(",")
        print(json.dumps(_one(method, (int(rows), int(columns)))))
        return
    if _TRIO.value is not None:
        _whole(Path(_TRIO.value))
        return
    counts = collections.Counter(s for s in shapes(_SIZE.value).values() if len(s) == 2)
    print("| method | matrix | of them | s | CPU s | GB | model, s |\n|" + "---|" * 7)
    for method in _METHODS.value:
        total = 0.0
        for shape, count in sorted(counts.items()):
            child = f"--child={method},{shape[0]},{shape[1]}"
            command = [sys.executable, __file__, child, f"--models={_MODELS.value}"]
            found = bench.run(command)
            seconds, cpu = found.report["seconds"], found.report["cpu"]
            total += seconds * count
            print(
                f"| {method} | {shape[0]} × {shape[1]} | {count} | {seconds:.2f} | "
                f"{cpu:.2f} | {found.peak_bytes / 1e9:.2f} | {total:.0f} |",
                flush=True,
            )


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
    found = {}
    for _ in range(2):
        start, cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(m3jax.merge_params(base, models, recipe, 0))
        found["seconds"] = time.perf_counter() - start
        found["cpu"] = time.process_time() - cpu
    return found


def _whole(trio: Path) -> None:
    """Merges from files to files, and what each was planned to take."""
    print("| method | s | CPU s | GB | GB planned |\n|" + "---|" * 5)
    for method in _data_free() if _METHODS.value == ["data_free"] else _METHODS.value:
        with tempfile.TemporaryDirectory(dir=_OUTPUT.value or trio) as work:
            command = [
                *(sys.executable, "-m", "m3jax", "merge", f"--base={trio}/base"),
                f"--models={trio}/maths,{trio}/code",
                *(f"--output={work}/merged", f"--config.method={method}", "--nofsync"),
                "--config.mixup.alpha=None",
            ]
            planned = subprocess.run(
                [*command, "--dry_run"], capture_output=True, text=True
            )
            if planned.returncode:  # it is for one model, or three
                print(f"| {method} | {planned.stderr.strip()} |")
                continue
            lines = planned.stdout.splitlines()
            memory = next(line for line in lines if line.startswith("memory")).split()
            found = bench.run(command)
        print(
            f"| {method} | {found.wall:.0f} | {found.user + found.system:.0f} | "
            f"{found.peak_bytes / 1e9:.2f} | {' '.join(memory[1:3])} |",
            flush=True,
        )


def _data_free() -> list[str]:
    from m3jax.methods import METHODS

    return [
        name
        for name, method in sorted(METHODS.items())
        if not method.beside and method.num_models in (None, 2)
    ]


if __name__ == "__main__":
    app.run(main)
