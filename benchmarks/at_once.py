"""Times draws of `m3jax explore` that are merged and evaluated one, two, ... at once.

    python benchmarks/at_once.py --at_once=1,2

Explores the models that come with m3jax, as `m3jax demo` does, all settings in turn,
in one process. Programs are compiled in a first round that does not count. What is
found must be the same in all runs: the exit code is 1 if it is not. Writes
at_once-cpu.json and .md, or those of another backend.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import bench
import jax
import programs
from absl import app, flags

import m3jax

_AT_ONCE = flags.DEFINE_list("at_once", ["1", "2"], "Numbers of draws.")
_DRAWS = flags.DEFINE_integer("draws", 32, "Of an exploration.", 1)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "That count.", 1)
_RESULTS = flags.DEFINE_string(
    "results", str(bench.BENCHMARKS / "results"), "Where results go."
)

DATA = Path(m3jax.__file__).parent / "demo_data"
RECIPE = m3jax.Recipe(
    method="task_arithmetic", scaling=1.5, mixup=m3jax.Mixup(alpha=2.0)
)


def explored(evaluator: m3jax.TaskEvaluator, at_once: int) -> tuple[float, Any]:
    """Seconds of all draws, from the last baseline on, and the trials."""
    spoken: list[float] = []
    found = m3jax.explore(
        str(DATA / "base"),
        [str(DATA / name) for name in ("maths", "code", "words")],
        RECIPE,
        evaluator=evaluator,
        draws=_DRAWS.value,
        at_once=at_once,
        say=lambda line: spoken.append(time.perf_counter()),
    )
    draws = spoken[-1 - _DRAWS.value - 1 : -1]  # the winner's line comes last
    return draws[-1] - draws[0], found.trials


def main(argv: list[str]) -> int:
    del argv
    settings = [int(number) for number in _AT_ONCE.value]
    tasks = [DATA / "tasks" / "validation.json"]
    evaluator = m3jax.TaskEvaluator.of_checkpoint(str(DATA / "base"), tasks)
    _, expected = explored(evaluator, max(settings))
    times: dict[int, list[float]] = {setting: [] for setting in settings}
    same = True
    for _ in range(_ROUNDS.value):
        for setting in settings:
            spent, trials = explored(evaluator, setting)
            times[setting].append(spent / _DRAWS.value)
            same &= trials == expected
    first = times[settings[0]]
    results = {
        "command": f"python benchmarks/at_once.py --at_once={','.join(_AT_ONCE.value)} "
        f"--draws={_DRAWS.value} --rounds={_ROUNDS.value}",
        "commit": bench.commit(),
        "machine": bench.machine(DATA),
        "versions": {"m3jax": programs.m3jax_versions()},
        "devices": [device.device_kind for device in jax.local_devices()],
        "same": same,
        "rows": [
            {
                "at_once": setting,
                "draw_ms": bench.spread([1e3 * own for own in times[setting]]),
                "faster": bench.spread(
                    [a / b for a, b in zip(first, times[setting], strict=True)]
                ),
            }
            for setting in settings
        ],
    }
    name, folder = f"at_once-{jax.default_backend()}", Path(_RESULTS.value)
    bench.write_json(folder / f"{name}.json", results)
    (folder / f"{name}.md").write_text(markdown(results))
    print(markdown(results))
    return 0 if same else 1


def markdown(results: dict[str, Any]) -> str:
    """The table, and what one has to know to read it."""
    rows = [
        [
            str(row["at_once"]),
            bench.seconds(row["draw_ms"]),
            bench.seconds(row["faster"]),
        ]
        for row in results["rows"]
    ]
    header = ["draws at once", "a draw, ms", "times faster"]
    found = "the same" if results["same"] else "NOT the same"
    return (
        bench.table(header, rows)
        + f"\nOn {', '.join(results['devices'])}; what was found is {found} in all "
        "runs. Median (least–greatest) over rounds, ratios within them. "
        + bench.environment(results)
        + f"\n\n`{results['command']}`\n"
    )


if __name__ == "__main__":
    app.run(lambda argv: sys.exit(main(argv)))
