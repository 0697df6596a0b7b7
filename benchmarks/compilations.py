"""Counts the programs that XLA compiles in a merge, per recipe, at two sizes.

    python benchmarks/compilations.py

The count must not depend on the number of tensors or on the size of the model: the
exit code is 1 if it does. Each merge is a process of its own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import bench
import programs
import recipes
from absl import app, flags

_SIZES = flags.DEFINE_list("sizes", ["10m", "160m"], "See make_checkpoints.py.")
_RECIPES = flags.DEFINE_list("recipes", ["all"], "Which; see recipes.py.")
_DATA = flags.DEFINE_string("data", "/tmp/m3jax-benchmarks", "For models and outputs.")


def main(argv: list[str]) -> int:
    del argv
    data = Path(_DATA.value)
    programs.make_models(data, _SIZES.value)
    rows, constant = [], True
    for name, recipe in recipes.select(_RECIPES.value).items():
        counts = []
        for size in _SIZES.value:
            runner = programs.Programs(data / size, data / f"output-{os.getpid()}")
            counts.append(runner.m3jax(recipe).report["compiled"])
        constant &= all(count == counts[0] for count in counts)
        programs_ = ", ".join(
            f"{function} {count}" if count > 1 else function
            for function, count in sorted(counts[-1].items())
        )
        rows.append([name, *[str(sum(count.values())) for count in counts], programs_])
    header = ["recipe", *_SIZES.value, f"programs at {_SIZES.value[-1]}"]
    print(bench.table(header, rows))
    return 0 if constant else 1


if __name__ == "__main__":
    app.run(lambda argv: sys.exit(main(argv)))
