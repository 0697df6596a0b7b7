"""Times whole merges: the floor, m3jax and mergekit in turn, several rounds.

    python benchmarks/end_to_end.py --size=1.1b --mergekit=install

Every merge is a process of its own. Inputs are in the page cache, and nothing of an
earlier run is left to write when one starts. Writes results.json, table.md, targets.md
(what was aimed at), profile.md (where m3jax's time goes) and picture.png. With `--cold`
they are read from the disk instead. `--mergekit=PYTHON` names the Python of an
environment that has mergekit; `install` makes one; without the flag and the environment
its column stays empty.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench
import programs
import recipes
import targets
from absl import app, flags

_SIZE = flags.DEFINE_string("size", "1.1b", "Of the models; see make_checkpoints.py.")
_RECIPES = flags.DEFINE_list("recipes", ["all"], "Which; see recipes.py.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Times that everything is run.", 1)
_MERGEKIT_ROUNDS = flags.DEFINE_integer(
    "mergekit_rounds", None, "The first rounds that mergekit takes part in. [all]"
)
_DATA = flags.DEFINE_string("data", "/tmp/m3jax-benchmarks", "For models and outputs.")
_RESULTS = flags.DEFINE_string(
    "results", str(bench.BENCHMARKS / "results"), "Where results go."
)
_MERGEKIT = flags.DEFINE_string("mergekit", "", "A Python with mergekit, or install.")
_MERGEKIT_FLAGS = flags.DEFINE_list(
    "mergekit_flags", list(programs.MERGEKIT_FLAGS), "How mergekit is run."
)
_COLD = flags.DEFINE_bool("cold", False, "Read every input from the disk.")
_FSYNC = flags.DEFINE_bool(
    "fsync", False, "The floor and m3jax wait for the disk; mergekit cannot."
)

Runs = dict[tuple[str, str], list[bench.Run]]  # by program and what it merges

_WARM_UP = "10m"  # loads every program and library from the disk once
_CACHED = 0.05  # a share of the input that may come from the disk after all


def measure(
    runner: programs.Programs,
    chosen: dict[str, recipes.BenchmarkRecipe],
    rounds: int,
    mergekit_rounds: int,
) -> Runs:
    """Runs everything, interleaved."""
    runs: Runs = defaultdict(list)

    def keep(program: str, name: str, run: bench.Run) -> bench.Run:
        runs[program, name].append(run)
        late = not runner.cold and run.disk_bytes > _CACHED * runner.size_bytes
        print(
            f"{program:8} {name:28} {run.wall:8.2f} s {run.peak_bytes / 1e9:6.2f} GB"
            + (f", {run.disk_bytes / 1e9:.2f} GB from the disk" if late else ""),
            file=sys.stderr,
        )
        return run

    for round_ in range(rounds):
        waiting = {recipe.mergekit for recipe in chosen.values()}
        if runner.mergekit is None or round_ >= mergekit_rounds:
            waiting = set()
        for name, recipe in chosen.items():
            merged = keep("m3jax", name, runner.m3jax(recipe))
            keep("floor", name, runner.floor(recipe, merged.report))
            if recipe.mergekit in waiting:
                waiting.remove(recipe.mergekit)
                keep("mergekit", recipe.mergekit, runner.run_mergekit(recipe))
    return runs


def summarise(
    runs: Runs, chosen: dict[str, recipes.BenchmarkRecipe]
) -> list[dict[str, Any]]:
    """One row per recipe: spreads of each program, and ratios within the rounds.

    A machine that other systems share changes its speed from minute to minute: what
    is compared ran in the same round, and the median over rounds is taken last.
    """
    rows = []
    for name, recipe in chosen.items():
        merged, floor = runs["m3jax", name], runs["floor", name]
        mergekit = runs.get(("mergekit", recipe.mergekit))
        rows.append(
            {
                "recipe": name,
                "mergekit_method": recipe.mergekit,
                "m3jax": _summary(merged),
                "floor": _summary(floor),
                "mergekit": mergekit and _summary(mergekit),
                "times_faster": mergekit and _ratio(mergekit, merged, _wall),
                "times_less_cpu": mergekit and _ratio(mergekit, merged, _cpu),
                "streaming_to_floor": _ratio(merged, floor, programs.streaming),
            }
        )
    return rows


def _summary(runs: list[bench.Run]) -> dict[str, Any]:
    summary = {
        "wall": bench.spread([run.wall for run in runs]),
        "cpu": bench.spread([_cpu(run) for run in runs]),
        "system": bench.spread([run.system for run in runs]),
        "peak_bytes": max(run.peak_bytes for run in runs),
        "peak_anonymous_bytes": max(run.peak_anonymous_bytes for run in runs),
    }
    if runs[0].report:
        summary["streaming"] = bench.spread([*map(programs.streaming, runs)])
    return summary


def _ratio(
    over: list[bench.Run],
    under: list[bench.Run],
    seconds: Callable[[bench.Run], float],
) -> float:
    pairs = zip(over, under, strict=False)  # mergekit may have fewer rounds
    return statistics.median(seconds(one) / seconds(other) for one, other in pairs)


def _wall(run: bench.Run) -> float:
    return run.wall


def _cpu(run: bench.Run) -> float:
    return run.user + run.system


def markdown(results: dict[str, Any]) -> str:
    """The table, and what one has to know to read it."""
    header = [
        "recipe",
        "m3jax, s",
        "mergekit, s",
        "times faster",
        "CPU m3jax, s",
        "of it system",
        "CPU mergekit, s",
        "times less CPU",
        "streaming, s",
        "floor, s",
        "of the floor",
        "peak m3jax, GB",
        "peak mergekit, GB",
    ]
    rows = []
    for row in results["rows"]:
        merged, floor, mergekit = row["m3jax"], row["floor"], row["mergekit"]
        rows.append(
            [
                row["recipe"],
                bench.seconds(merged["wall"]),
                bench.seconds(mergekit and mergekit["wall"]),
                bench.times(row["times_faster"], 1),
                bench.seconds(merged["cpu"]),
                f"{merged['system']['median']:.2f}",
                bench.seconds(mergekit and mergekit["cpu"]),
                bench.times(row["times_less_cpu"], 1),
                bench.seconds(merged["streaming"]),
                bench.seconds(floor["streaming"]),
                bench.times(row["streaming_to_floor"]),
                bench.peak(merged),
                bench.peak(mergekit) if mergekit else "–",
            ]
        )
    waits = "wait" if results["fsync"] else "do not wait"
    mergekit_part = (
        f", of {results['mergekit_rounds']} of them for mergekit"
        if results["mergekit_rounds"]
        else "; mergekit was not measured"
    )
    caption = [
        f"A base and two models of {results['parameters'] / 1e9:.2f} G parameters, "
        f"bfloat16, {bench.gigabytes(results['model_bytes'])} GB each. Median "
        f"(least–greatest) of {results['rounds']} interleaved rounds{mergekit_part}. "
        f"Whole processes, inputs {'on the disk' if results['cold'] else ''}"
        f"{'' if results['cold'] else 'in the page cache'}; programs {waits} for the "
        "disk. CPU seconds are user and system. "
        "“Streaming” is the time from m3jax's first read to its last write, less "
        "compilation; the floor is the same time of one pass without any arithmetic. "
        "Ratios are those within a round, and their median. "
        "Peak memory: resident, mapped files included (of which memory that no file "
        "backs).",
        bench.environment(results),
        f"`{results['command']}`",
    ]
    return bench.table(header, rows) + "\n" + "\n\n".join(caption) + "\n"


def profile(results: dict[str, Any]) -> str:
    """Where m3jax's seconds go; those of its threads, divided by their number."""
    stages = ["reading", "computing", "checking", "hashing", "writing", "waiting"]
    rows = []
    for row in results["rows"]:
        runs = [
            run
            for run in results["runs"]
            if (run["program"], run["recipe"]) == ("m3jax", row["recipe"])
        ]
        reports = [run["report"] for run in runs]
        starts = [run["wall"] - run["report"]["wall"]["passes"] for run in runs]
        compiling = [report["compiling"] for report in reports]
        spent = [
            [
                report["seconds"].get(stage, 0.0) / report["threads"]
                for report in reports
            ]
            for stage in stages
        ]
        columns = [[run["wall"] for run in runs], starts, compiling, *spent]
        medians = [f"{statistics.median(column):.2f}" for column in columns]
        rows.append([row["recipe"], *medians])
    return bench.table(["recipe, s", "whole", "start", "compiling", *stages], rows)


def main(argv: list[str]) -> None:
    del argv
    data, folder = Path(_DATA.value), Path(_RESULTS.value)
    chosen = recipes.select(_RECIPES.value)
    mergekit = programs.find_mergekit(_MERGEKIT.value, data)
    if mergekit is None:
        print("no mergekit (see --mergekit): its column is skipped", file=sys.stderr)
    programs.make_models(data, [_WARM_UP, _SIZE.value])
    output = data / f"output-{os.getpid()}"
    runner = programs.Programs(
        data / _WARM_UP, output, mergekit, _MERGEKIT_FLAGS.value, _FSYNC.value
    )
    measure(runner, chosen, 1, 1)
    runner = dataclasses.replace(runner, data=data / _SIZE.value, cold=_COLD.value)
    rounds = _ROUNDS.value
    mergekit_rounds = min(rounds, _MERGEKIT_ROUNDS.value or rounds) if mergekit else 0
    runs = measure(runner, chosen, rounds, mergekit_rounds)
    results = {
        "command": f"python benchmarks/end_to_end.py --size={_SIZE.value} "
        f"--recipes={','.join(_RECIPES.value)} --rounds={rounds}"
        + f" --mergekit_rounds={mergekit_rounds} --mergekit=install" * bool(mergekit)
        + " --cold" * _COLD.value
        + " --fsync" * _FSYNC.value,
        "cold": _COLD.value,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": bench.commit(),
        "size": _SIZE.value,
        "model_bytes": runner.size_bytes,
        "parameters": runner.size_bytes // 2,  # the header is lost in them
        "rounds": rounds,
        "mergekit_rounds": mergekit_rounds,
        "mergekit_flags": runner.mergekit_flags,
        "fsync": _FSYNC.value,
        "machine": bench.machine(data),
        "versions": {
            "m3jax": programs.m3jax_versions(),
            "mergekit": mergekit and programs.mergekit_versions(mergekit),
        },
        "rows": summarise(runs, chosen),
        "runs": [
            {"program": program, "recipe": name, **dataclasses.asdict(run)}
            for (program, name), own in runs.items()
            for run in own
        ],
    }
    bench.write_json(folder / "results.json", results)
    (folder / "table.md").write_text(markdown(results))
    (folder / "targets.md").write_text(targets.markdown(results["rows"]))
    (folder / "profile.md").write_text(profile(results))
    import picture  # only now matplotlib: see bench.py

    picture.draw(results, folder / "picture.png")
    tables = markdown(results), profile(results), targets.markdown(results["rows"])
    print(*tables, sep="\n")


if __name__ == "__main__":
    app.run(main)
