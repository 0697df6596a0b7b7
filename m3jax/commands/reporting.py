"""What a merge prints: its plan, its progress and its result."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from m3jax.engine.progress import Progress

if TYPE_CHECKING:
    from m3jax.engine.merge import MergeResult
    from m3jax.engine.prepare import Prepared

_SECONDS_BETWEEN_LINES = 10.0
_FEW_GROUPS = 8


def size(count: float) -> str:
    """Bytes as text, in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def plan(prepared: Prepared) -> str:
    """The plan that --dry_run prints."""
    merged = prepared.merged
    passes = prepared.passes
    elements = sum(item.size for item in prepared.items)
    read = prepared.read_bytes(range(len(prepared.items)))
    lines = [
        "method     " + " after ".join(
            step.name for step in reversed(prepared.recipe.steps)
        ),
        f"tensors    {len(prepared.items)} ({len(merged)} merged, "
        f"{len(prepared.items) - len(merged)} copied), {elements:,} elements",
        f"passes     {len(passes)}: {'; '.join(passes)}",
        f"read       {size(read)} "
        + (
            f"in the last pass, {size(prepared.read_bytes(merged))} in each pass before"
            if prepared.execution.executor == "streamed"
            else "once; all passes are over device memory"
        ),
        f"written    {size(prepared.written_bytes)} in {len(prepared.shards)} file"
        + ("s" if len(prepared.shards) > 1 else ""),
        "memory     " + _memory(prepared),
        "ratios     " + ratios(prepared.ratios),
    ]
    lines += [f"note       {note}" for note in prepared.inputs.notes]
    return "\n".join(lines)


def _memory(prepared: Prepared) -> str:
    if prepared.execution.executor == "streamed":
        return (
            f"{size(prepared.buffer_bytes)} of buffers: "
            f"{prepared.execution.num_threads} threads, chunks of "
            f"{prepared.tiles * 1024:,} elements, {len(prepared.devices)} device(s)"
        )
    from m3jax.engine.sharded import device_memory, mesh_of

    mesh, needed = mesh_of(prepared), device_memory(prepared)
    return (
        f"{size(needed.inputs + needed.working)} on each of {mesh.size} device(s) "
        f"({', '.join(f'{name}={count}' for name, count in mesh.shape.items())}): "
        f"{size(needed.inputs)} of the models' shards, {size(needed.working)} to work"
    )


def ratios(drawn: Mapping[str, tuple[float, ...]] | None) -> str:
    """The drawn ratios on a few lines."""
    if drawn is None:
        return "M3 is off"
    parts = [
        (f"{group}: " if group else "") + ", ".join(f"{ratio:.6f}" for ratio in values)
        for group, values in list(drawn.items())[:_FEW_GROUPS]
    ]
    more = len(drawn) - len(parts)
    return "\n           ".join(parts + ([f"and {more} more groups"] if more else []))


def summary(result: MergeResult, *, profile: bool) -> str:
    """What the merge ends with."""
    lines = []
    if profile:
        lines += [
            f"{name:11}{seconds:8.2f} s, all threads"
            for name, seconds in result.seconds.items()
        ]
        wall = ", ".join(f"{name} {spent:.2f} s" for name, spent in result.wall.items())
        lines.append(f"wall       {wall}")
    if result.resumed:
        lines.append(f"resumed    {result.resumed} tensors had been written before")
    lines.append("ratios     " + ratios(result.ratios))
    lines.append(f"output     {result.output}")
    return "\n".join(lines)


@contextlib.contextmanager
def progress() -> Iterator[Progress]:
    """A bar on a terminal, lines otherwise; both on standard error."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import (
        Progress as Bars,
    )

    with Bars(
        TextColumn("{task.description:>20}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bars:
        yield _Bars(bars)


class _Bars(Progress):
    def __init__(self, bars) -> None:  # type: ignore[no-untyped-def]
        self._bars = bars
        self._task = None

    def stage(self, label: str, total: int) -> None:
        self._task = self._bars.add_task(label, total=total)

    def advance(self, count: int) -> None:
        if self._task is not None:
            self._bars.advance(self._task, count)

    def note(self, line: str) -> None:
        self._bars.console.print(f"note: {line}", markup=False, highlight=False)


class _Lines(Progress):
    def __init__(self) -> None:
        self._label, self._total, self._done = "", 0, 0
        self._start = self._last = time.monotonic()

    def stage(self, label: str, total: int) -> None:
        self._label, self._total, self._done = label, total, 0
        self._start = self._last = time.monotonic()
        self._print(f"{label}: {size(total)}")

    def advance(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._last >= _SECONDS_BETWEEN_LINES and self._total:
            self._last = now
            rate = self._done / (now - self._start)
            left = (self._total - self._done) / rate
            self._print(
                f"{self._label}: {self._done / self._total:.0%}, "
                f"{size(rate)}/s, {left:.0f} s left"
            )

    def note(self, line: str) -> None:
        self._print(f"note: {line}")

    def _print(self, line: str) -> None:
        print(f"m3jax: {line}", file=sys.stderr, flush=True)
