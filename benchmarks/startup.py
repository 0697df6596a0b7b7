"""Times what a user waits for before any weight is read.

    python benchmarks/startup.py

`m3jax --help`, a mistyped flag, and the whole merge of three models of 19 M parameters
(the size 10m), which is nearly all start: imports, compilation, exit.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import bench
import programs
import recipes
from absl import app, flags

_ROUNDS = flags.DEFINE_integer("rounds", 7, "Times that everything is run.", 1)
_RECIPES = flags.DEFINE_list("recipes", ["average", "dare_ties_m3"], "See recipes.py.")
_DATA = flags.DEFINE_string("data", "/tmp/m3jax-benchmarks", "For models and outputs.")

_SIZE = "10m"
_COMMANDS = ("m3jax --help", "m3jax merge --help", "m3jax merge --modles=a,b")


def main(argv: list[str]) -> None:
    del argv
    data = Path(_DATA.value)
    programs.make_models(data, [_SIZE])
    runner = programs.Programs(data / _SIZE, data / f"output-{os.getpid()}")
    times: dict[str, list[float]] = {}
    for _ in range(_ROUNDS.value):
        for command in _COMMANDS:
            arguments = [sys.executable, "-m", *command.split()]
            start = time.perf_counter()
            subprocess.run(arguments, capture_output=True)  # one of them fails
            times.setdefault(f"`{command}`", []).append(time.perf_counter() - start)
        for name, recipe in recipes.select(_RECIPES.value).items():
            run = runner.m3jax(recipe)
            times.setdefault(f"merge of size {_SIZE}: {name}", []).append(run.wall)
    rows = [[name, bench.seconds(bench.spread(own))] for name, own in times.items()]
    print(bench.table(["", "seconds"], rows))


if __name__ == "__main__":
    app.run(main)
