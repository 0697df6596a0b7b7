"""What a merge prints: its plan, its progress and its result."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from textwrap import indent
from typing import TYPE_CHECKING, Any

from m3jax.engine.progress import Progress, size

if TYPE_CHECKING:
    from m3jax.engine.jobs import Job
    from m3jax.engine.merge import MergeResult
    from m3jax.engine.prepared import Prepared
    from m3jax.recipe.documents import Document

_SECONDS_BETWEEN_LINES = 10.0
_FEW_GROUPS = 8


def plan(prepared: Prepared, output: str | None = None) -> str:
    """The plan that --dry_run prints, for an output of that name."""
    streamed = prepared.execution.executor == "streamed"
    merged = prepared.merged
    elements = sum(item.size for item in prepared.items)
    read = size(prepared.read_bytes(range(len(prepared.items))))
    before = [i for job in prepared.measured for i in job.places]
    files = len(prepared.shards)
    facts = {
        "method": "; ".join(_method(job) for job in prepared.jobs),
        "tensors": f"{len(prepared.items)} ({len(merged)} merged, "
        f"{len(prepared.items) - len(merged)} copied), {elements:,} elements",
        # What a step measures may take several readings, which it finds out by reading.
        "passes": f"{'at least ' * (len(prepared.passes) > 1)}{len(prepared.passes)}: "
        + "; ".join(prepared.passes),
        "read": f"{read} in the last pass"
        + f", {size(prepared.read_bytes(before))} in each pass before"
        * (len(prepared.passes) > 1)
        if streamed
        else f"{read} once; all passes are over device memory",
        "written": f"{size(prepared.written_bytes)} in {files} file"
        + "s" * (files > 1),
        "dtype": _dtype(prepared),
        "output": _place(prepared, output),
        "memory": _memory(prepared) if streamed else _device_memory(prepared),
        "ratios": ratios(prepared.ratios),
    }
    notes = [("note", note) for note in prepared.inputs.notes]
    return "\n".join(f"{name:11}{fact}" for name, fact in [*facts.items(), *notes])


def notes(lines: Sequence[str]) -> None:
    """Says on standard error what the user should know."""
    for line in lines:
        print(f"m3jax: note: {line}", file=sys.stderr)


def document_plan(
    document: Document, prepared: Prepared, output: str | None = None
) -> str:
    """What --dry_run prints of one of several documents."""
    name = "the output" if document.name is None else document.name
    inputs = f"{document.recipe.method.name} of {', '.join(document.inputs)}"
    return f"{name}: {inputs}\n{indent(plan(prepared, output), '  ')}\n"


def _method(job: Job) -> str:
    """The steps of a job, the last one first; and of how many tensors, by a rule."""
    own = job.recipe
    after = [step.name for step in own.transforms if step.after]
    before = [step.name for step in own.transforms if not step.after]
    steps = " after ".join([*reversed(after), own.method.name, *reversed(before)])
    return f"{job.label}{steps} ({len(job.places)} tensors)" if job.label else steps


def _dtype(prepared: Prepared) -> str:
    merged = [prepared.inputs.tensors[i].dtype.numpy.name for i in prepared.merged]
    return ", ".join(sorted(set(merged))) or "that of each tensor"


def _place(prepared: Prepared, output: str | None) -> str:
    """The output's name, and whether it may be taken."""
    from m3jax.checkpoints.errors import CheckpointError
    from m3jax.checkpoints.output import destination
    from m3jax.checkpoints.places import store
    from m3jax.checkpoints.places.files import exists
    from m3jax.engine.prepare import check_apart

    if output is None:
        return "not given"
    execution, final = prepared.execution, store.parse(output)
    try:
        destination.check_free(
            final, overwrite=execution.overwrite, resume=execution.resume
        )
        check_apart(final, prepared.checkpoints)
    except CheckpointError as error:
        return f"taken: {error}"
    return f"{output}, " + ("which will be replaced" if exists(final) else "free")


def _memory(prepared: Prepared) -> str:
    return (
        f"{size(prepared.buffer_bytes)} of buffers: "
        f"{prepared.execution.num_threads} threads, chunks of "
        f"{prepared.tiles * 1024:,} elements, {len(prepared.devices)} device(s)"
    )


def _device_memory(prepared: Prepared) -> str:
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
    facts: list[tuple[str, str]] = []
    if profile:
        facts += [(n, f"{s:8.2f} s, all threads") for n, s in result.seconds.items()]
        wall = ", ".join(f"{name} {spent:.2f} s" for name, spent in result.wall.items())
        facts.append(("wall", wall))
    if result.resumed:
        facts.append(("resumed", f"{result.resumed} tensors had been written before"))
    facts += [("ratios", ratios(result.ratios)), ("output", str(result.output))]
    return "\n".join(f"{name:11}{fact}" for name, fact in facts)


@contextlib.contextmanager
def progress(unit: str = "") -> Iterator[Progress]:
    """A bar on a terminal, lines otherwise; both on standard error.

    Args:
      unit: of what is counted, in the plural; "": bytes.
    """
    if not sys.stderr.isatty():
        yield _Lines(unit)
        return
    from rich import progress as rich
    from rich.console import Console

    with rich.Progress(
        rich.TextColumn("{task.description:>20}"),
        rich.BarColumn(),
        *(
            (rich.MofNCompleteColumn(), rich.TextColumn(unit))
            if unit
            else (rich.DownloadColumn(), rich.TransferSpeedColumn())
        ),
        rich.TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bars:
        yield _Bars(bars)


class _Bars(Progress):
    def __init__(self, bars: Any) -> None:
        self._bars = bars

        self._task: Any = None

    def stage(self, label: str, total: int) -> None:
        self._task = self._bars.add_task(label, total=total)

    def advance(self, count: int) -> None:
        if self._task is not None:
            self._bars.advance(self._task, count)

    def note(self, line: str) -> None:
        self._bars.console.print(f"note: {line}", markup=False, highlight=False)


class _Lines(Progress):
    _label, _total, _done, _last = "", 0, 0, 0.0

    def __init__(self, unit: str) -> None:
        self._unit = unit

    def _amount(self, count: float) -> str:
        return f"{count:,.0f} {self._unit}" if self._unit else size(count)

    def stage(self, label: str, total: int) -> None:
        self._label, self._total, self._done = label, total, 0
        self._start = self._last = time.monotonic()
        self._print(f"{label}: {self._amount(total)}")

    def advance(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._last >= _SECONDS_BETWEEN_LINES and self._total:
            self._last = now
            rate = self._done / (now - self._start)
            self._print(
                f"{self._label}: {self._done / self._total:.0%}, "
                f"{self._amount(rate)}/s, "
                f"{(self._total - self._done) / rate:.0f} s left"
            )

    def note(self, line: str) -> None:
        self._print(f"note: {line}")

    def _print(self, line: str) -> None:
        print(f"m3jax: {line}", file=sys.stderr, flush=True)
