"""Times what a user waits for before any weight is read.

    python benchmarks/startup.py

`m3jax --help`, a mistyped flag, JAX's own start, and the whole merge of three models of
19 M parameters (the size 10m), which is nearly all start: imports, compilation, exit;
with the programs that an earlier merge has kept, and without. CPU seconds, user and
system, are steadier than those that pass.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
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
_PYTHON = {
    "`m3jax --help`": ["-m", "m3jax", "--help"],
    "`m3jax merge --help`": ["-m", "m3jax", "merge", "--help"],
    "`m3jax merge --modles=a,b`": ["-m", "m3jax", "merge", "--modles=a,b"],
    "`import jax`": ["-c", "import jax; jax.devices()"],
}


def main(argv: list[str]) -> None:
    del argv
    data = Path(_DATA.value)
    programs.make_models(data, [_SIZE])
    models = ",".join(str(data / _SIZE / model) for model in recipes.MODELS[1:])
    output = data / f"output-{os.getpid()}"
    commands = dict(_PYTHON)
    for name, recipe in recipes.select(_RECIPES.value).items():
        commands[f"merge of size {_SIZE}: {name}"] = [
            *("-m", "m3jax", "merge", f"--base={data / _SIZE / 'base'}"),
            *(f"--models={models}", f"--output={output}", *recipe.flags),
        ]
    wall: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as cache:
        for i in range(_ROUNDS.value + 1):
            for name, arguments in commands.items():
                for kept in (True, False) if name.startswith("merge") else (True,):
                    row = name if kept else f"{name}, compiled anew"
                    spent = _run(arguments, cache if kept else None)
                    shutil.rmtree(output, ignore_errors=True)
                    if i:  # the first one reads files, and compiles what is kept
                        wall.setdefault(row, []).append(spent[0])
                        cpu.setdefault(row, []).append(spent[1])
    rows = [
        [name, bench.seconds(bench.spread(own)), bench.seconds(bench.spread(cpu[name]))]
        for name, own in wall.items()
    ]
    print(bench.table(["", "seconds", "CPU seconds"], rows))


def _run(arguments: list[str], cache: str | None) -> tuple[float, float]:
    """Wall and CPU seconds of a Python process."""
    kept = {"XDG_CACHE_HOME": cache} if cache else {"M3JAX_CACHE": "off"}
    start = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,  # one of them fails
        env={**os.environ, **kept},
    )
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    app.run(main)
