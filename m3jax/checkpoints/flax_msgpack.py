"""Reads Flax's msgpack files: finds the bytes of every array, and reads nothing else.

`flax.serialization` writes a pytree as nested msgpack maps. An array is an extension
of type 1 whose content is again msgpack: the array's shape, the name of its dtype and
its bytes. Arrays of more than 1 GiB are a map that holds flat parts of them.

The file is walked through from its first byte to its last, past the arrays' bytes, so
the streamed merge reads it as it reads safetensors. Nothing is unpickled, and nothing
is allocated on a header's word: every length must fit into what holds it.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from m3jax.checkpoints.dtypes import DTYPES, Dtype, of_numpy
from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.files import InputFile
from m3jax.checkpoints.safetensors import TensorEntry
from m3jax.checkpoints.sources import FileTensor
from m3jax.checkpoints.tree import KeyPath, name_of

_ARRAY, _SCALAR = 1, 3  # types of Flax's extensions; 2 is a complex number
_CHUNKED = "__msgpack_chunked_array__"
# What real trees stay below by far; they bound what a file becomes in memory.
_MAX_DEPTH = 64
_MAX_TEXT = 4096  # bytes of a key, or of an array's shape and dtype
_MAX_VALUES = 1_000_000  # maps and what is in them
_MAX_DIMENSIONS = 64
_WINDOW = 1 << 16  # bytes that are read at a time
_DTYPES = {dtype.numpy.name: dtype for dtype in DTYPES.values()}


@dataclasses.dataclass(frozen=True)
class Parts:
    """A tensor that stands in a file in several pieces, one behind the other.

    Attributes:
      parts: 1-D, of one dtype, none empty.
      shape: of the whole tensor.
    """

    parts: tuple[FileTensor, ...]
    shape: tuple[int, ...]

    @property
    def file(self) -> InputFile:
        return self.parts[0].file

    @property
    def dtype(self) -> Dtype:
        return self.parts[0].dtype

    @property
    def output_dtype(self) -> Dtype:
        return self.dtype

    @property
    def place(self) -> str:
        return self.parts[0].place

    def read_into(self, out: np.ndarray, start: int) -> None:
        first = 0  # element of the part
        for part in self.parts:
            stop = first + part.entry.size
            begin, end = max(start, first), min(start + len(out), stop)
            if begin < end:
                part.read_into(out[begin - start : end - start], begin - first)
            first = stop


@dataclasses.dataclass(frozen=True)
class Number:
    """A number of the tree, which is a tensor without axes."""

    value: np.ndarray
    place: str

    @property
    def dtype(self) -> Dtype:
        return of_numpy(self.value.dtype)

    @property
    def output_dtype(self) -> Dtype:
        return self.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return ()

    def read_into(self, out: np.ndarray, start: int) -> None:
        out[:] = self.value


Leaf = FileTensor | Parts | Number


def read_tensors(file: InputFile) -> dict[str, Leaf]:
    """The arrays of a file by name: the keys on the way to them, joined by ".".

    Raises:
      CheckpointError: naming the file, the place and what is wrong there.
    """
    walk = _Walk(file)
    try:
        found = walk.value((), 0, file.size)
        if walk.at != file.size:
            raise CheckpointError(f"has {file.size - walk.at} bytes behind its end")
        leaves: dict[str, Leaf] = {}
        for path, leaf in _flattened(found, ()):
            name = name_of(path)
            if not name or not name.isprintable() or len(name) > _MAX_TEXT:
                raise CheckpointError(f"has a tensor named {shown(name)}, rename it")
            if name in leaves:
                raise CheckpointError(f"has two tensors named {shown(name)}")
            leaves[name] = leaf
    except CheckpointError as error:
        raise CheckpointError(
            f"{file.path}: {error}; needs to be a file of flax.serialization: fetch "
            "it again, or convert it"
        ) from None
    return leaves


def _flattened(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Leaf]]:
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _flattened(child, (*path, key))
    elif value is not None:
        yield path, value


class _Walk:
    """Walks through the bytes of a file.

    Attributes:
      at: the next byte.
    """

    def __init__(self, file: InputFile):
        self.at = 0
        self._file = file
        self._window = b""
        self._begin = 0  # of the window
        self._values = 0

    def value(self, path: KeyPath, depth: int, end: int) -> Any:
        """The value that begins here: a dict, a leaf, or None.

        Args:
          path: of the value.
          depth: of the maps around it.
          end: byte at which what holds it ends.
        """
        where = shown(name_of(path))
        if depth > _MAX_DEPTH:
            raise CheckpointError(f"is nested too deeply at {where}")
        self._values += 1
        if self._values > _MAX_VALUES:
            raise CheckpointError(f"holds more than {_MAX_VALUES} values")
        start, code = self.at, self._byte(end)
        if code >> 4 == 0x8 or code in (0xDE, 0xDF):
            return self._map(path, depth, self._count(code, 0x8, 0xDE, end), end)
        if code == 0xC0:
            return None
        if code in _EXTENSIONS or code in _SHORT_EXTENSIONS:
            if code in _EXTENSIONS:
                size, kind = self._unpack(_EXTENSIONS[code], end)
            else:
                size, kind = _SHORT_EXTENSIONS[code], self._byte(end)
            if self.at + size > end:
                raise CheckpointError(
                    f"claims {size} bytes for {where}, {end - self.at} are left"
                )
            if kind in (_ARRAY, _SCALAR):
                return self._array(where, self.at + size)
        self.at = start
        number = self._number(end)
        if number is None:
            raise CheckpointError(f"holds something at {where} that is no array")
        return Number(number, self._file.path.name)

    def _map(self, path: KeyPath, depth: int, count: int, end: int) -> Any:
        found: dict[str, Any] = {}
        for _ in range(count):  # each takes two bytes, so a false count ends soon
            key = self._text(end)
            if key in found:
                raise CheckpointError(f"has {shown(name_of((*path, key)))} twice")
            if key == _CHUNKED:
                self._byte(end)  # True
                found[key] = None
                continue
            found[key] = self.value((*path, key), depth + 1, end)
        return self._joined(path, found) if _CHUNKED in found else found

    def _joined(self, path: KeyPath, found: dict[str, Any]) -> Leaf:
        """The array that stands there in parts."""
        where = shown(name_of(path))
        shape, parts = found.get("shape"), found.get("chunks")
        if not (isinstance(shape, dict) and isinstance(parts, dict)):
            raise CheckpointError(f"has parts of {where} without shape or chunks")
        sizes = [shape.get(str(i)) for i in range(len(shape))]
        arrays = [parts.get(str(i)) for i in range(len(parts))]
        if (
            not all(isinstance(s, Number) and s.value.dtype == np.int64 for s in sizes)
            or not arrays
            or not all(isinstance(a, FileTensor) and a.entry.size for a in arrays)
            or len({a.dtype for a in arrays if isinstance(a, FileTensor)}) != 1
        ):
            raise CheckpointError(f"has parts of {where} that make no array")
        tensors = tuple(a for a in arrays if isinstance(a, FileTensor))
        whole = tuple(int(s.value) for s in sizes if isinstance(s, Number))
        count = sum(tensor.entry.size for tensor in tensors)
        if min(whole, default=0) < 0 or math.prod(whole) != count:
            raise CheckpointError(
                f"has {count} elements for {where} of shape {shown(list(whole))}"
            )
        return Parts(tensors, whole)

    def _array(self, where: str, end: int) -> FileTensor:
        """The content of an extension: shape, dtype and bytes."""
        if self._byte(end) != 0x93:
            raise CheckpointError(f"holds an array at {where} without three fields")
        code = self._byte(end)
        if code >> 4 != 0x9 and code not in (0xDC, 0xDD):
            raise CheckpointError(f"holds an array at {where} without a shape")
        dimensions = self._count(code, 0x9, 0xDC, end)
        if dimensions > _MAX_DIMENSIONS:
            raise CheckpointError(f"has an array of {dimensions} axes at {where}")
        sizes = [self._number(end) for _ in range(dimensions)]
        # A float could be NaN, which no integer is.
        shape = tuple(
            int(size) if size is not None and size.dtype.kind in "iu" else -1
            for size in sizes
        )
        name = self._text(end)
        dtype = _DTYPES.get(name)
        if dtype is None:
            raise CheckpointError(
                f"has dtype {shown(name)} at {where}; known: {', '.join(_DTYPES)}"
            )
        size = self._length(end)
        needed = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or size != needed or self.at + size != end:
            raise CheckpointError(
                f"has {size} bytes at {where}, {dtype.numpy.name} of shape "
                f"{shown(list(shape))} needs {needed}"
            )
        entry = TensorEntry(dtype, shape, self.at, end)
        self.at = end
        return FileTensor(self._file, entry)

    def _number(self, end: int) -> np.ndarray | None:
        """An integer, a float or a bool; None if there is something else."""
        code = self._byte(end)
        if code < 0x80 or code >= 0xE0:
            return np.array(code if code < 0x80 else code - 0x100, np.int64)
        if code in (0xC2, 0xC3):
            return np.array(code == 0xC3)
        if code not in _NUMBERS:
            return None
        (value,) = self._unpack(_NUMBERS[code], end)
        if isinstance(value, int) and value >= 2**63:
            return np.array(value, np.uint64)
        return np.array(value, np.float64 if isinstance(value, float) else np.int64)

    def _text(self, end: int) -> str:
        size = self._length(end)
        if size > _MAX_TEXT:
            raise CheckpointError(f"has a text of {size} bytes at byte {self.at}")
        try:
            return self._bytes(size, end).decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"has a key that is no text at {self.at}") from None

    def _length(self, end: int) -> int:
        """Of the text or the bytes that begin here."""
        code = self._byte(end)
        if code >> 5 == 0b101:
            return code & 0x1F
        if code not in _LENGTHS:
            raise CheckpointError(f"has no text or bytes at byte {self.at - 1}")
        return self._unpack(_LENGTHS[code], end)[0]

    def _count(self, code: int, short: int, long: int, end: int) -> int:
        """Of the entries of a map or an array."""
        if code >> 4 == short:
            return code & 0x0F
        return self._unpack(">H" if code == long else ">I", end)[0]

    def _unpack(self, fields: str, end: int) -> tuple[Any, ...]:
        return struct.unpack(fields, self._bytes(struct.calcsize(fields), end))

    def _byte(self, end: int) -> int:
        return self._bytes(1, end)[0]

    def _bytes(self, count: int, end: int) -> bytes:
        if self.at + count > end:
            raise CheckpointError(f"ends at byte {end} in the middle of a value")
        first = self.at - self._begin
        if not 0 <= first <= len(self._window) - count:
            self._begin, first = self.at, 0
            size = min(max(count, _WINDOW), self._file.size - self.at)
            self._window = self._file.read(self.at, size)
        self.at += count
        return self._window[first : first + count]


# Codes of msgpack's specification, and the fields behind them.
_LENGTHS = {
    0xC4: ">B",
    0xC5: ">H",
    0xC6: ">I",  # bytes
    0xD9: ">B",
    0xDA: ">H",
    0xDB: ">I",  # text
}
_NUMBERS = {
    0xCA: ">f",
    0xCB: ">d",
    0xCC: ">B",
    0xCD: ">H",
    0xCE: ">I",
    0xCF: ">Q",
    0xD0: ">b",
    0xD1: ">h",
    0xD2: ">i",
    0xD3: ">q",
}
_EXTENSIONS = {0xC7: ">Bb", 0xC8: ">Hb", 0xC9: ">Ib"}
_SHORT_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}  # their sizes
