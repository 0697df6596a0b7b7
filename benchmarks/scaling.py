"""Times m3jax and the floor at several sizes: time per parameter, and memory.

    python benchmarks/scaling.py --sizes=160m,1.1b,7b --recipes=average,ties_m3

Inputs that fit are read from the page cache, as in end_to_end.py; those larger than
half of the machine's memory (7b: 42 GB), or all with `--cold`, are read from the disk.
Writes scaling.json and scaling.md.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from pathlib import Path
from typing import Any

import bench
import programs
import recipes
from absl import app, flags

_SIZES = flags.DEFINE_list("sizes", ["160m", "1.1b", "7b"], "See make_checkpoints.py.")
_RECIPES = flags.DEFINE_list("recipes", ["average", "ties_m3"], "See recipes.py.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Times that everything is run.", 1)
_COLD = flags.DEFINE_bool("cold", False, "Read every input from the disk.")
_FSYNC = flags.DEFINE_bool("fsync", False, "Wait until the disk has the output.")
_DATA = flags.DEFINE_string("data", "/tmp/m3jax-benchmarks", "For models and outputs.")
_RESULTS = flags.DEFINE_string(
    "results", str(bench.BENCHMARKS / "results"), "Where results go."
)


def measure(
    runner: programs.Programs, recipe: recipes.BenchmarkRecipe, rounds: int
) -> dict[str, Any]:
    """m3jax and the floor in turn; who goes first changes from round to round, since
    what the disk has just been read for, a cache below this system may still hold."""
    merges: list[bench.Run] = []
    floors: list[bench.Run] = []
    for round_ in range(rounds):
        if round_ % 2:
            floors.append(runner.floor(recipe, merges[0].report))
        merges.append(runner.m3jax(recipe))
        if not round_ % 2:
            floors.append(runner.floor(recipe, merges[0].report))
    read = floors[0].report["read_bytes"]
    wall, streaming, floor = (
        bench.spread(values)
        for values in (
            [run.wall for run in merges],
            [programs.streaming(run) for run in merges],
            [programs.streaming(run) for run in floors],
        )
    )
    return {
        "cold": runner.cold,
        "read_bytes": read,
        "written_bytes": floors[0].report["written_bytes"],
        "wall": wall,
        "streaming": streaming,
        "floor": floor,
        "streaming_to_floor": streaming["median"] / floor["median"],
        "from_disk": max(run.disk_bytes for run in merges) / read,
        "peak_bytes": max(run.peak_bytes for run in merges),
        "peak_anonymous_bytes": max(run.peak_anonymous_bytes for run in merges),
    }


def markdown(results: dict[str, Any]) -> str:
    header = [
        "size",
        "recipe",
        "inputs",
        "read + written, GB",
        "whole process, s",
        "streaming, s",
        "floor, s",
        "of the floor",
        "streaming, ns a parameter",
        "peak memory, GB",
    ]
    rows = [
        [
            row["size"],
            row["recipe"],
            "disk" if row["cold"] else "page cache",
            f"{bench.gigabytes(row['read_bytes'])} + "
            f"{bench.gigabytes(row['written_bytes'])}",
            bench.seconds(row["wall"]),
            bench.seconds(row["streaming"]),
            bench.seconds(row["floor"]),
            bench.times(row["streaming_to_floor"]),
            f"{row['streaming']['median'] / (row['written_bytes'] / 2) * 1e9:.2f}",
            bench.peak(row),
        ]
        for row in results["rows"]
    ]
    growth = ", ".join(
        f"{name}: {slope:.2f}" for name, slope in results["growth"].items()
    )
    waits = "wait" if results["fsync"] else "do not wait"
    return (
        bench.table(header, rows)
        + f"\nMedian (least–greatest) of {results['rounds']} rounds; programs {waits} "
        "for the disk. Peak memory: resident, mapped files included (of which memory "
        "that no file backs).\n\n"
        + (
            f"Streaming time grows as size to the power of: {growth}.\n\n"
            * bool(growth)
        )
        + bench.environment(results)
        + f"\n\n`{results['command']}`\n"
    )


def growth(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Per recipe, d log(time) / d log(size) from the smallest to the largest size."""
    slopes = {}
    for name in dict.fromkeys(row["recipe"] for row in rows):
        own = [row for row in rows if row["recipe"] == name]
        first = min(own, key=lambda row: row["read_bytes"])
        last = max(own, key=lambda row: row["read_bytes"])
        if first is not last:
            time = last["streaming"]["median"] / first["streaming"]["median"]
            slopes[name] = math.log(time) / math.log(
                last["read_bytes"] / first["read_bytes"]
            )
    return slopes


def main(argv: list[str]) -> None:
    del argv
    data = Path(_DATA.value)
    chosen = recipes.select(_RECIPES.value)
    machine = bench.machine(data)
    programs.make_models(data, _SIZES.value)
    rows = []
    for size in _SIZES.value:
        for name, recipe in chosen.items():
            output = data / f"output-{os.getpid()}"
            runner = programs.Programs(data / size, output, fsync=_FSYNC.value)
            total = runner.size_bytes * len(recipe.inputs)
            cold = _COLD.value or total > machine["memory_bytes"] / 2
            runner = dataclasses.replace(runner, cold=cold)
            row = {"size": size, "recipe": name}
            rows.append(row | measure(runner, recipe, _ROUNDS.value))
            told = rows[-1]["wall"]["median"]
            print(f"{size:5} {name:28} {told:8.2f} s", file=sys.stderr)
    results = {
        "command": f"python benchmarks/scaling.py --sizes={','.join(_SIZES.value)} "
        f"--recipes={','.join(_RECIPES.value)} --rounds={_ROUNDS.value}"
        + " --cold" * _COLD.value
        + " --fsync" * _FSYNC.value,
        "rounds": _ROUNDS.value,
        "fsync": _FSYNC.value,
        "commit": bench.commit(),
        "machine": machine,
        "versions": {"m3jax": programs.m3jax_versions(), "mergekit": None},
        "growth": growth(rows),
        "rows": rows,
    }
    folder = Path(_RESULTS.value)
    bench.write_json(folder / "scaling.json", results)
    (folder / "scaling.md").write_text(markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    app.run(main)
