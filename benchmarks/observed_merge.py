"""`m3jax merge`, observed from within: the command, then one line of JSON.

    python benchmarks/observed_merge.py --base=/tmp/trio/base \
        --models=/tmp/trio/maths,/tmp/trio/code --output=/tmp/merged

Takes the command's own flags and runs the command itself. The line holds what a
process cannot be asked from outside: the seconds of each part of the merge
(`MergeResult.wall`, and `.seconds`, which are summed over threads), the programs that
XLA compiled, the seconds in which the passes waited for that, and how the merge was
run.
"""

from __future__ import annotations

import collections
import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

from m3jax import __main__ as command
from m3jax.commands import process
from m3jax.engine import merge as engine
from m3jax.engine.plan import TILE

_COMPILING = "/jax/core/compile/"  # tracing, lowering and XLA's part
_COMPILED = _COMPILING + "backend_compile_duration"


def observe(arguments: list[str]) -> tuple[int, dict[str, Any]]:
    """Runs `m3jax merge` with these arguments; its exit code and what was seen."""
    seen: dict[str, Any] = {}
    compiled: collections.Counter[str] = collections.Counter()
    spans: list[tuple[float, float]] = []
    merge, prepare = engine.merge, engine.prepare

    def observed_merge(*args: Any, **kwargs: Any) -> engine.MergeResult:
        result = merge(*args, **kwargs)
        seen.update(wall=result.wall, seconds=result.seconds)
        return result

    @contextlib.contextmanager
    def observed_prepare(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with prepare(*args, **kwargs) as prepared:
            seen.update(
                threads=prepared.execution.num_threads,
                chunk_elements=prepared.tiles * TILE,
                backend=jax.default_backend(),
                devices=[device.device_kind for device in prepared.devices],
            )
            yield prepared

    def listen(event: str, duration_secs: float, **details: str | int) -> None:
        if event == _COMPILED:
            compiled[str(details.get("fun_name"))] += 1
        # Where a thread of a pass compiles, at its first chunk, the others wait.
        in_pass = threading.current_thread().name.startswith("m3jax-")
        if event.startswith(_COMPILING) and in_pass:
            now = time.perf_counter()
            spans.append((now - duration_secs, now))

    jax.monitoring.register_event_duration_secs_listener(listen)
    engine.merge, engine.prepare = observed_merge, observed_prepare
    try:
        code = command.main(["merge", *arguments])
    finally:
        engine.merge, engine.prepare = merge, prepare
    before_passes = seen.get("seconds", {}).get("compiling", 0.0)
    seen |= {"compiling": before_passes + covered(spans), "compiled": dict(compiled)}
    return code, seen


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals, which nest and overlap."""
    total, reached = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


if __name__ == "__main__":
    process.begin()
    exit_code, report = observe(sys.argv[1:])
    print(json.dumps(report))
    sys.exit(process.end(exit_code))
