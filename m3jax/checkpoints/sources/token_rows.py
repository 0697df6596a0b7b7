"""Rows of several tensors, put together by a table of row numbers."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from m3jax.checkpoints.formats.dtypes import FLOAT32, FLOAT64, Dtype
from m3jax.checkpoints.source import Source, read_whole

_BLOCK = 1 << 18  # elements that are gathered at a time
_SMALL = 1 << 20  # elements of a tensor that is read whole rather than row by row


@dataclasses.dataclass(frozen=True)
class TokenRows:
    """A tensor whose every row is the mean of rows of `sources`.

    Row r is that of source d at ``table[d, r]``; the mean of them in float64 where
    several have one; 0 where none has; where `filled` says so, the mean of all rows
    that are not filled. Nothing whole is held, and runs of rows that follow each other
    are read at once.

    Attributes:
      sources: D tensors that differ in their number of rows alone.
      table: (D, R) row numbers, −1 for none.
      filled: (R,) bools.
      output_dtype: what `dtype: input` means for it.
    """

    sources: tuple[Source, ...]
    table: np.ndarray
    filled: np.ndarray
    output_dtype: Dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.table.shape[1], *self.sources[0].shape[1:])

    @functools.cached_property
    def dtype(self) -> Dtype:
        """Of the rows where nothing is averaged, float32 (or float64) otherwise."""
        present = self.table >= 0
        used = {
            source.dtype.code: source.dtype
            for source, own in zip(self.sources, present, strict=True)
            if own.any()
        }
        means = self.filled.any() or present.sum(axis=0).max(initial=0) > 1
        if len(used) == 1 and not means:
            return next(iter(used.values()))
        return FLOAT64 if "F64" in used else FLOAT32

    @functools.cached_property
    def mean(self) -> np.ndarray:
        """Of the rows that are not filled, summed in float64, in order."""
        total = np.zeros(self._width, np.float64)
        step = max(1, _BLOCK // max(self._width, 1))
        for row in range(0, self.shape[0], step):
            stop = min(row + step, self.shape[0])
            rows = self._gathered(row, stop)[~self.filled[row:stop]]
            with np.errstate(over="ignore", invalid="ignore"):
                total += rows.astype(np.float64).sum(axis=0)
        return total / max(1, int((~self.filled).sum()))

    def read_into(self, out: np.ndarray, start: int) -> None:
        width = self._width
        step = max(1, _BLOCK // max(width, 1))
        done = 0
        while done < len(out):
            row, skipped = divmod(start + done, width)
            stop = min(row + step, -(-(start + len(out)) // width))
            rows = self._gathered(row, stop)
            filled = self.filled[row:stop]
            if filled.any():
                rows[filled] = self.mean.astype(rows.dtype)
            values = rows.reshape(-1)[skipped : skipped + len(out) - done]
            out[done : done + len(values)] = values
            done += len(values)

    @property
    def _width(self) -> int:
        return math.prod(self.shape[1:])

    def _gathered(self, first: int, stop: int) -> np.ndarray:
        """Rows [first, stop), (rows, width); 0 where none of the sources has one."""
        table = self.table[:, first:stop]
        count = (table >= 0).sum(axis=0)
        rows = np.zeros((stop - first, self._width), self.dtype.numpy)
        if count.max(initial=0) <= 1:
            for source, own in zip(self.sources, table, strict=True):
                _copy_rows(source, own, rows)
            return rows
        total = np.zeros(rows.shape, np.float64)
        for source, own in zip(self.sources, table, strict=True):
            part = np.zeros(rows.shape, source.dtype.numpy)
            _copy_rows(source, own, part)
            with np.errstate(over="ignore", invalid="ignore"):
                total += part
        with np.errstate(over="ignore", invalid="ignore"):
            rows[:] = total / np.maximum(count, 1)[:, None]
        return rows


def _copy_rows(source: Source, numbers: np.ndarray, out: np.ndarray) -> None:
    """out[i] = row numbers[i] of the source, where that is not negative."""
    places = np.flatnonzero(numbers >= 0)
    if not places.size:
        return
    width = out.shape[1]
    wanted = numbers[places]
    if math.prod(source.shape) <= _SMALL and (np.diff(wanted) != 1).any():
        out[places] = read_whole(source).reshape(-1, width)[wanted]
        return
    follows = (np.diff(wanted) == 1) & (np.diff(places) == 1)
    starts = np.flatnonzero(np.concatenate([[True], ~follows]))
    same = source.dtype.numpy == out.dtype
    for begin, end in zip(starts, [*starts[1:], len(places)], strict=True):
        part = out[places[begin] : places[begin] + end - begin].reshape(-1)
        into = part if same else np.empty(part.size, source.dtype.numpy)
        source.read_into(into, int(wanted[begin]) * width)
        if not same:
            part[:] = into
