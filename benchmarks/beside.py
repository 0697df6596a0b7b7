"""Times whole merges by two versions of m3jax in turn: this one and another checkout.

    git worktree add /tmp/before COMMIT
    python benchmarks/beside.py --before=/tmp/before --recipes=average_m3,ties_m3

For a machine that is never quiet: the two run one after the other, the ratios are those
within a round, and CPU seconds (user and system) are steadier than those that pass.
Checks that both write the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import statistics
import sys
from pathlib import Path

import bench
import programs
import recipes
from absl import app, flags

_BEFORE = flags.DEFINE_string("before", None, "The other checkout.", required=True)
_SIZE = flags.DEFINE_string("size", "1.1b", "Of the models; see make_checkpoints.py.")
_RECIPES = flags.DEFINE_list("recipes", ["average_m3"], "Which; see recipes.py.")
_ROUNDS = flags.DEFINE_integer("rounds", 4, "Times that everything is run.", 1)
_DATA = flags.DEFINE_string("data", "/tmp/m3jax-benchmarks", "For models and outputs.")


def main(argv: list[str]) -> None:
    del argv
    data = Path(_DATA.value)
    programs.make_models(data, [_SIZE.value])
    folder, output = data / _SIZE.value, data / f"output-{os.getpid()}"
    checkouts = {"before": _BEFORE.value, "now": str(bench.BENCHMARKS.parent)}
    rows = []
    for name, recipe in recipes.select(_RECIPES.value).items():
        runs: dict[str, list[bench.Run]] = {version: [] for version in checkouts}
        for i in range(_ROUNDS.value + 1):
            written = set()
            for version, checkout in checkouts.items():
                run, digest = _merge(checkout, folder, output, recipe)
                written.add(digest)
                if i:  # the first one reads files and compiles what is kept
                    runs[version].append(run)
            if len(written) > 1:
                raise ValueError(f"{name}: the two versions write different bytes")
        rows += [
            [
                name,
                version,
                bench.seconds(bench.spread([run.wall for run in own])),
                bench.seconds(bench.spread([run.user for run in own])),
                bench.seconds(bench.spread([run.system for run in own])),
                f"{_ratio(runs['before'], own, wall=True):.2f}",
                f"{_ratio(runs['before'], own, wall=False):.2f}",
            ]
            for version, own in runs.items()
        ]
    header = ["recipe", "version", "whole, s", "user, s", "system, s"]
    print(bench.table([*header, "times faster", "times less CPU"], rows))


def _merge(
    checkout: str, folder: Path, output: Path, recipe: recipes.BenchmarkRecipe
) -> tuple[bench.Run, str]:
    """One merge by the m3jax of a checkout, and a digest of what it wrote."""
    models = ",".join(str(folder / model) for model in recipes.MODELS[1:])
    command = [
        *(sys.executable, "-P", "-m", "m3jax", "merge"),
        *(f"--base={folder / 'base'}", f"--models={models}", f"--output={output}"),
        *recipe.flags,
    ]
    bench.warm([folder / model for model in recipes.MODELS])
    bench.settle()
    try:
        run = bench.run(command, {"PYTHONPATH": checkout})
        digest = hashlib.sha256()
        for path in sorted(output.glob("*.safetensors")):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return run, digest.hexdigest()
    finally:
        shutil.rmtree(output, ignore_errors=True)


def _ratio(before: list[bench.Run], own: list[bench.Run], *, wall: bool) -> float:
    def seconds(run: bench.Run) -> float:
        return run.wall if wall else run.user + run.system

    return statistics.median(
        seconds(one) / seconds(other) for one, other in zip(before, own, strict=True)
    )


if __name__ == "__main__":
    app.run(main)
