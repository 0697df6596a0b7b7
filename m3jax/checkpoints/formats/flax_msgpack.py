"""Reads Flax's msgpack files, which `flax.serialization` restores.

It writes a pytree as nested msgpack maps. An array is an extension of type 1 whose
content is again msgpack: the array's shape, the name of its dtype and its bytes.
Arrays of more than 1 GiB are a map that holds flat parts of them.

Flax trusts what it reads. So msgpack's own parser, with limits, first walks through
the file, one leaf at a time, and lets only maps, numbers and arrays of known dtypes
pass: no list whose header could claim room for more than there is, no dtype that NumPy
would have to make sense of, nothing that could run code.

Memory: opening a file holds its bytes, the arrays made of them, one array more, and
1 GiB at most (`memory`); once it is open, the arrays alone, as much as the file has.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.formats.dtypes import DTYPES, Dtype
from m3jax.checkpoints.formats.tree import KeyPath, name_of
from m3jax.checkpoints.places.files import InputFile
from m3jax.checkpoints.source import Array

_ARRAYS = (1, 3)  # types of Flax's extensions: array, scalar; 2 is a complex number
_CHUNKED = "__msgpack_chunked_array__"
_MAPS = (*range(0x80, 0x90), 0xDE, 0xDF)  # the first byte of a map, in msgpack
# What real trees stay below by far; they bound what a file becomes in memory.
_MAX_DEPTH = 64
_MAX_TEXT = 4096  # characters of a key
_MAX_VALUES = 1_000_000  # maps and what is in them
_MAX_DIMENSIONS = 64
_MAX_PART = 2**30 + 4096  # bytes of an array; Flax cuts longer ones, at 1 GiB
_DTYPES = {dtype.numpy.name: dtype for dtype in DTYPES.values()}


def memory(file: InputFile) -> int:
    """Bytes that `read_tensors` takes, at most."""
    return 3 * file.size + min(file.size, _MAX_PART)


def read_tensors(file: InputFile) -> dict[str, Array]:
    """The arrays of a file by name: the keys on the way to them, joined by ".".

    Raises:
      CheckpointError: naming the file, the place and what is wrong there.
    """
    # Imported here: most merges read no file of Flax.
    from flax import serialization

    content = file.read(0, file.size)
    leaves: dict[str, Array] = {}
    try:
        _Walk(content).check()
        try:
            tree = serialization.msgpack_restore(content)
        except (TypeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"has parts that make no array ({shown(str(error))})"
            ) from None
        for path, value in _flattened(tree, ()):
            name = name_of(path)
            if not name or not name.isprintable() or len(name) > _MAX_TEXT:
                raise CheckpointError(f"has a tensor named {shown(name)}, rename it")
            if name in leaves:
                raise CheckpointError(f"has two tensors named {shown(name)}")
            leaves[name] = Array(value, file.path.name)
    except CheckpointError as error:
        raise CheckpointError(
            f"{file.path}: {error}; needs to be a file of flax.serialization: fetch "
            "it again, or convert it"
        ) from None
    return leaves


def _flattened(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, np.ndarray]]:
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _flattened(child, (*path, key))
    elif value is not None:
        yield path, np.asarray(value)


class _Walk:
    """Walks through a file's bytes, and lets pass what Flax restores without harm."""

    def __init__(self, content: bytes):
        import msgpack

        self._content = content
        self._left = _MAX_VALUES
        self._unpacker = msgpack.Unpacker(
            io.BytesIO(content),
            ext_hook=_check_array,
            max_buffer_size=len(content) + 1,
            max_ext_len=min(len(content), _MAX_PART),
            max_str_len=_MAX_TEXT,
            **dict.fromkeys(("max_bin_len", "max_array_len", "max_map_len"), 0),
        )

    def check(self) -> None:
        """Raises CheckpointError, saying where, unless all of it is as Flax writes."""
        self._value(())
        extra = len(self._content) - self._unpacker.tell()
        if extra:
            raise CheckpointError(f"has {extra} bytes behind its end")

    def _value(self, path: KeyPath) -> Any:
        """What begins here: maps as dicts, arrays as their dtypes, numbers, None."""
        where, at = shown(name_of(path)), self._unpacker.tell()
        self._left -= 1
        if self._left < 0 or len(path) > _MAX_DEPTH:
            flaw = "holds too many values" if self._left < 0 else "is nested too deeply"
            raise CheckpointError(f"{flaw} at {where}")
        if at < len(self._content) and self._content[at] in _MAPS:
            return self._map(path, where)
        leaf = self._unpack(where)
        if not isinstance(leaf, Dtype | int | float | None):
            raise CheckpointError(f"at {where} has what is no array")
        return leaf

    def _map(self, path: KeyPath, where: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(self._unpack(where, self._unpacker.read_map_header)):
            key = self._unpack(where)
            if not isinstance(key, str) or key in found:
                flaw = "twice" if isinstance(key, str) else "which is no text"
                raise CheckpointError(f"at {where} has the key {shown(key)} {flaw}")
            found[key] = self._value((*path, key))
        shape, parts = found.get("shape"), found.get("chunks")
        if _CHUNKED in found and (
            not (isinstance(shape, dict) and isinstance(parts, dict))
            or any(type(size) is not int or size < 0 for size in shape.values())
            or any(not isinstance(part, Dtype) for part in parts.values())
            or len(set(parts.values())) != 1
        ):
            raise CheckpointError(f"at {where} has parts that make no array")
        return found

    def _unpack(self, where: str, take: Callable[[], Any] | None = None) -> Any:
        import msgpack

        try:
            return take() if take else self._unpacker.unpack()
        except msgpack.OutOfData:
            raise CheckpointError(
                f"ends at byte {len(self._content)} in the middle of {where}"
            ) from None
        except CheckpointError as error:  # of `_check_array`
            raise CheckpointError(f"at {where} {error}") from None
        except (ValueError, msgpack.UnpackException) as error:
            why = f"{type(error).__name__}: {shown(str(error))}"
            raise CheckpointError(f"at {where} has what is no array ({why})") from None


def _check_array(kind: int, content: bytes) -> Dtype:
    """The dtype of an array, once its fields are known to fit together."""
    import msgpack

    if kind not in _ARRAYS:
        raise CheckpointError(f"has an extension of type {kind}, which is no array")
    fields = msgpack.unpackb(
        content, raw=True, max_array_len=_MAX_DIMENSIONS, max_map_len=0
    )
    match fields:
        case [list(shape), bytes(name), bytes(data)]:
            pass
        case _:
            raise CheckpointError("has an array without shape, dtype and bytes")
    dtype = _DTYPES.get(name.decode(errors="replace"))
    if dtype is None:
        raise CheckpointError(f"has dtype {shown(name)}; known: {', '.join(_DTYPES)}")
    if any(type(size) is not int or size < 0 for size in shape) or (
        len(data) != math.prod(shape) * dtype.itemsize
    ):
        raise CheckpointError(
            f"has {len(data)} bytes for {dtype.numpy.name} of shape {shown(shape)}"
        )
    return dtype
