"""Sources of tensor elements: a byte range of a file, or something derived from one.

A source delivers any run of a tensor's elements, in row-major order, into a buffer
that the caller owns. Nothing is cached and nothing whole is held in memory, so the
streaming engine treats a plain tensor, a dequantised one and one with added
vocabulary rows alike.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
import xxhash

from m3jax.checkpoints.formats.dtypes import BFLOAT16, FLOAT32, Dtype, of_numpy
from m3jax.checkpoints.formats.safetensors import TensorEntry
from m3jax.checkpoints.places.files import InputFile

_BLOCK = 1 << 18  # elements that a derived source holds at a time
_HASHED = 1 << 20  # elements that are read at a time for a checksum


class Source(Protocol):
    """One tensor to read from.

    Attributes:
      dtype: of the elements that `read_into` delivers.
      shape: of the whole tensor.
      output_dtype: what `dtype: input` means for this tensor.
    """

    @property
    def dtype(self) -> Dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def output_dtype(self) -> Dtype: ...

    def read_into(self, out: np.ndarray, start: int) -> None:
        """Fills 1-D `out` (of `dtype`) with elements [start, start + len(out))."""
        ...


class Stored(Source, Protocol):
    """A tensor as it is stored.

    Attributes:
      place: the name of the file or folder that holds it.
    """

    @property
    def place(self) -> str: ...


@dataclasses.dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor as it stands in a file."""

    file: InputFile
    entry: TensorEntry

    @property
    def dtype(self) -> Dtype:
        return self.entry.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def output_dtype(self) -> Dtype:
        return self.entry.dtype

    @property
    def place(self) -> str:
        return self.file.path.name

    def read_into(self, out: np.ndarray, start: int) -> None:
        offset = self.entry.start + start * self.dtype.itemsize
        self.file.read_into(memoryview(out.view(np.uint8)), offset)


@dataclasses.dataclass(frozen=True)
class Array:
    """A tensor in memory."""

    value: np.ndarray
    place: str = ""

    @property
    def dtype(self) -> Dtype:
        return of_numpy(self.value.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def output_dtype(self) -> Dtype:
        return self.dtype

    def read_into(self, out: np.ndarray, start: int) -> None:
        out[:] = self.value.reshape(-1)[start : start + len(out)]


@dataclasses.dataclass(frozen=True)
class Derived:
    """What is made of another source; like it, where a subclass says nothing else."""

    source: Source

    @property
    def dtype(self) -> Dtype:
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def output_dtype(self) -> Dtype:
        return self.source.output_dtype

    def read_into(self, out: np.ndarray, start: int) -> None:
        self.source.read_into(out, start)


class Decoded:
    """What is made of codes: float32, which `dtype: input` writes as bfloat16."""

    __slots__ = ()

    @property
    def dtype(self) -> Dtype:
        return FLOAT32

    @property
    def output_dtype(self) -> Dtype:
        return BFLOAT16


@dataclasses.dataclass(frozen=True)
class _Rows(Derived):
    """A tensor of another number of rows."""

    rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, *self.source.shape[1:])


class FirstRows(_Rows):
    """The first `rows` rows of a tensor."""


class WithMeanRows(_Rows):
    """A tensor with rows appended, each the mean of the rows that were there.

    The mean is summed in float64 over fixed blocks of rows, in order, and rounded to
    the tensor's dtype. There is at least one row.
    """

    @functools.cached_property
    def mean(self) -> np.ndarray:
        rows, width = self.source.shape[0], math.prod(self.source.shape[1:])
        total = np.zeros(width, np.float64)
        step = max(1, _BLOCK // max(width, 1))
        for row in range(0, rows, step):
            count = min(step, rows - row)
            block = read(self.source, row * width, count * width)
            # NaN and infinity are for the check for non-finite values to report.
            with np.errstate(over="ignore", invalid="ignore"):
                total += block.reshape(count, width).astype(np.float64).sum(axis=0)
        return (total / rows).astype(self.dtype.numpy)

    def read_into(self, out: np.ndarray, start: int) -> None:
        own = math.prod(self.source.shape)
        head = min(max(own - start, 0), len(out))
        if head:
            self.source.read_into(out[:head], start)
        if head < len(out):
            first = (start + head - own) % len(self.mean)
            out[head:] = np.resize(np.roll(self.mean, -first), len(out) - head)


@dataclasses.dataclass(frozen=True)
class Repeated(Derived):
    """A tensor repeated along the axes in which it has one element."""

    repeated: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.repeated

    @functools.cached_property
    def _values(self) -> np.ndarray:
        return np.broadcast_to(read_whole(self.source), self.repeated)

    def read_into(self, out: np.ndarray, start: int) -> None:
        out[:] = self._values.flat[start : start + len(out)]


@dataclasses.dataclass(frozen=True)
class Converted(Derived):
    """A tensor in another float dtype than its own: that in which it is merged."""

    into: Dtype

    @property
    def dtype(self) -> Dtype:
        return self.into

    def read_into(self, out: np.ndarray, start: int) -> None:
        for first in range(0, len(out), _BLOCK):
            part = out[first : first + _BLOCK]
            block = read(self.source, start + first, len(part))
            # What the dtype cannot hold becomes inf; NaN stays NaN. The check for
            # non-finite values reports both.
            with np.errstate(over="ignore", invalid="ignore"):
                part[:] = block


def read_whole(source: Source) -> np.ndarray:
    """The whole tensor as a NumPy array of the source's dtype."""
    return read(source, 0, math.prod(source.shape)).reshape(source.shape)


def read(source: Source, start: int, count: int) -> np.ndarray:
    """Elements [start, start + count), as a new (count,) array."""
    out = np.empty(count, source.dtype.numpy)
    source.read_into(out, start)
    return out


def byte_size(source: Source) -> int:
    """Bytes of all elements."""
    return math.prod(source.shape) * source.dtype.itemsize


def checksum(
    source: Source, advance: Callable[[int], None] = lambda count: None
) -> str:
    """xxh3_128 of the tensor's bytes, as m3jax.json has it.

    Args:
      source: is read from the first element to the last.
      advance: is told the bytes read.
    """
    running = xxhash.xxh3_128()
    size = math.prod(source.shape)
    for start in range(0, size, _HASHED):
        values = read(source, start, min(_HASHED, size - start))
        running.update(values.view(np.uint8))
        advance(values.nbytes)
    return running.hexdigest()
