"""What must hold of the readers whatever bytes they are given.

Each function takes any bytes, and raises AssertionError where a reader fails in
another way than with one clear line, accepts what the safetensors library (or
Python's own json) refuses, or reads something else than they do. The tests give them
bytes that hypothesis thinks up, `run.py` bytes that reach new branches.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import safetensors

from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.formats import gguf, torch_file
from m3jax.checkpoints.formats.flax_msgpack import read_tensors
from m3jax.checkpoints.formats.index import parse_index
from m3jax.checkpoints.formats.json_text import BOM, load_json
from m3jax.checkpoints.formats.safetensors import Header, read_header
from m3jax.checkpoints.places.files import InputFile
from m3jax.checkpoints.source import read_whole

LONGEST_MESSAGE = 1000  # characters; a screenful
T = TypeVar("T")


def check_safetensors(content: bytes) -> Header | None:
    """A whole safetensors file; returns its header, or None where it is refused."""
    fd = os.memfd_create("safetensors")
    try:
        os.pwrite(fd, content, 0)
        ours = _outcome(lambda: read_header(Path(f"/proc/self/fd/{fd}")))
    finally:
        os.close(fd)
    theirs = _library(content)
    if ours is None:
        return None
    assert theirs is not None, "the safetensors library refuses it"
    start = len(content) - sum(len(entry["data"]) for entry in theirs.values())
    assert ours.tensors.keys() == theirs.keys()
    for name, tensor in ours.tensors.items():
        their = theirs[name]
        assert tensor.dtype.code == their["dtype"]
        assert list(tensor.shape) == their["shape"]
        assert content[tensor.start : tensor.stop] == bytes(their["data"])
        assert tensor.stop - tensor.start == (
            math.prod(tensor.shape) * tensor.dtype.itemsize
        )
        assert start <= tensor.start <= tensor.stop <= len(content) == ours.file_size
    return ours


def check_header(content: bytes) -> Header | None:
    """The header's text, behind two bytes that say how much data there is."""
    text, size = content[2:], int.from_bytes(content[:2], "little")
    return check_safetensors(framed(text, bytes(size)))


def check_index(text: bytes) -> dict[str, str] | None:
    """The text of an index of shards."""
    ours = _outcome(lambda: parse_index(text, "index"))
    if ours is None:
        return None
    theirs = json.loads(text)["weight_map"]
    assert ours == theirs
    for name in ours.values():
        assert (Path("folder") / name).parts == ("folder", name)
        assert name != ".."
        assert name.isprintable()
    return ours


def check_config(text: bytes) -> dict[str, Any] | None:
    """The text of config.json."""
    ours = _outcome(lambda: load_json(text, "config.json", constants=True))
    if ours is not None:  # as text, in which NaN equals NaN
        theirs = json.loads(text.removeprefix(BOM).decode())
        assert json.dumps(ours) == json.dumps(theirs)
        assert isinstance(ours, dict)
    return ours


def check_msgpack(content: bytes) -> dict[str, Any] | None:
    """A whole file of Flax's msgpack; returns its tensors, or None if it is refused."""
    fd = os.memfd_create("msgpack")
    try:
        os.pwrite(fd, content, 0)
        with InputFile(Path(f"/proc/self/fd/{fd}")) as file:
            leaves = _outcome(lambda: read_tensors(file))
            if leaves is None:
                return None
            tensors = {name: read_whole(leaf) for name, leaf in leaves.items()}
    finally:
        os.close(fd)
    # Numbers of one byte take the most: eight bytes as a tensor.
    assert sum(tensor.nbytes for tensor in tensors.values()) <= 8 * len(content)
    return tensors


def check_torch(content: bytes) -> dict[str, Any] | None:
    """A whole file of torch.save; returns its tensors, or None if it is refused."""
    return _whole(content, torch_file.read_tensors)


def check_gguf(content: bytes) -> dict[str, Any] | None:
    """A whole file of GGUF; returns its tensors, or None if it is refused."""
    return _whole(content, gguf.read_tensors)


def _whole(content: bytes, read: Callable[[InputFile], Any]) -> dict[str, Any] | None:
    fd = os.memfd_create("whole")
    try:
        os.pwrite(fd, content, 0)
        with InputFile(Path(f"/proc/self/fd/{fd}")) as file:
            found = _outcome(lambda: read(file))
            if found is None:
                return None
            tensors = {name: read_whole(source) for name, source in found[0].items()}
    finally:
        os.close(fd)
    assert all(tensor.nbytes <= 8 * len(content) for tensor in tensors.values())
    return tensors


def framed(text: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file: the header's length (true or claimed), the header, data."""
    length = len(text) if length is None else length
    return length.to_bytes(8, "little") + text + data


def _outcome(read: Callable[[], T]) -> T | None:
    try:
        return read()
    except CheckpointError as error:
        message = str(error)
        assert message and len(message) <= LONGEST_MESSAGE, message
        assert message.isprintable(), message
        return None


def _library(content: bytes) -> dict[str, Any] | None:
    try:
        return dict(safetensors.deserialize(content))
    except safetensors.SafetensorError:
        return None
