"""A reading pass over chunks: what it asks for, and what it has found so far."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from m3jax.engine.kernel import At
from m3jax.engine.measure import Groups, int64_rows, put_together, stacked
from m3jax.engine.plan import Chunk, Run
from m3jax.methods.selection import count_codes_on_host
from m3jax.methods.step import Reduction


class Pass:
    """One pass for some groups of tensors.

    Attributes:
      at: as for `measure.Bench.reduce`.
      first: one of the reductions, which differ in their arguments alone.
      arguments: of all of them, (G,) and (J, G) tables.
      slots: (N,), the group of each tensor, -1 for one that is in none.
    """

    def __init__(
        self,
        at: At,
        groups: Groups,
        reductions: Sequence[Reduction],
        count: int,
        stride: int = 1,
    ):
        """`count`: N, of the tensors; `stride`: of so many tiles look at one."""
        self.at, self.stride = at, stride
        self.first = reductions[0]
        self.arguments = stacked(reductions)
        self.slots = np.full(count, -1, np.int64)
        for g, places in enumerate(groups):
            self.slots[places] = g
        self._found: list[list[Any]] = [[None] * len(self.combine) for _ in groups]
        self._lock = threading.Lock()

    @property
    def combine(self) -> tuple[str, ...]:
        return self.first.combine

    def asks(self, chunk: Chunk) -> bool:
        """Whether a tensor of the chunk is in a group."""
        return any(self.slots[run.item] >= 0 for run in chunk.runs)

    def add(self, parts: Sequence[dict[int, Any]]) -> None:
        """Takes what a chunk has given, by group, of each number; from any thread."""
        with self._lock:
            for j, (how, own) in enumerate(zip(self.combine, parts, strict=True)):
                for g, value in own.items():
                    before = self._found[g][j]
                    self._found[g][j] = (
                        value if before is None else put_together(how, before, value)
                    )

    def answers(self) -> list[tuple[Any, ...] | None]:
        """What was found of each group; None where nothing was read."""
        return [tuple(own) if own[0] is not None else None for own in self._found]


def by_group(
    how: str,
    part: np.ndarray,
    chunk: Chunk,
    slots: np.ndarray,
    *,
    counted: bool,
    stride: int,
) -> dict[int, Any]:
    """What a chunk gives to each group of which it holds elements.

    Args:
      how: numbers are put together.
      part: what `kernel.reduce` gives.
      chunk: of which it is.
      slots: of `Pass`.
      counted: histograms were made on the device, of a chunk of one group.
      stride: of so many tiles count one; histograms alone.
    """
    runs = [(int(slots[run.item]), run) for run in chunk.runs]
    runs = [(g, run) for g, run in runs if g >= 0]
    if how == "histogram" and counted:
        return {runs[0][0]: int64_rows(how, part)}
    values: list[tuple[int, Any]]
    if how == "values":
        flat = part[0].reshape(len(part[0]), -1)
        values = [(g, flat[:, run.elements]) for g, run in runs]
    elif how == "histogram":
        rows = _joined([(g, _rows(run, chunk)) for g, run in runs])
        codes = part[0]
        values = [
            (g, count_codes_on_host(codes[:, own.start : own.stop : stride]))
            for g, own in rows
        ]
    else:
        rows = _joined([(g, _rows(run, chunk)) for g, run in runs])
        values = [(g, int64_rows(how, part[own])) for g, own in rows]
    found: dict[int, Any] = {}
    for g, value in values:
        found[g] = value if g not in found else put_together(how, found[g], value)
    return found


def _rows(run: Run, chunk: Chunk) -> slice:
    """The rows of what a reduction gives that are of a run."""
    return slice(run.row, run.row + run.rows) if chunk.block is None else slice(None)


def _joined(pieces: Sequence[tuple[int, slice]]) -> list[tuple[int, slice]]:
    """Neighbouring rows of one group as one piece."""
    found: list[tuple[int, slice]] = []
    for g, rows in pieces:
        if found and found[-1][0] == g and found[-1][1].stop == rows.start:
            found[-1] = (g, slice(found[-1][1].start, rows.stop))
        else:
            found.append((g, rows))
    return found
