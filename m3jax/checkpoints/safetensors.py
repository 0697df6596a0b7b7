"""The safetensors format: its header, read with suspicion and written exactly.

A file is eight bytes (the header's length N, little-endian), N bytes of JSON, and
the data. The rules below are the format's; a file that breaks one is refused.

- N is at most 100 MB and the header ends within the file, so nothing is allocated
  on a header's word.
- The header is one JSON object without duplicate keys; `__metadata__`, if present,
  maps text to text; every other value has exactly a dtype, a shape and a pair of
  data offsets.
- The offsets cover the data without holes, overlaps or a tail, and each pair has the
  size that dtype and shape demand. Python's integers cannot overflow.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from m3jax.checkpoints.dtypes import DTYPES, Dtype
from m3jax.checkpoints.errors import CheckpointError, shown

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_MAX_NAME = 4096  # characters; no real tensor's name comes near it
_UINT64 = 2**64


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: its dtype, shape and byte range [start, stop)."""

    dtype: Dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says of itself; byte ranges count from the start of the file."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    file_size: int


def open_regular(path: Path) -> int:
    """Opens a regular file for reading and returns its descriptor.

    A FIFO or a device is refused before it can block or never end.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointError(f"{path}: not a regular file")
    return fd


def read_header(path: Path) -> Header:
    """Reads and checks the header of a safetensors file.

    Raises:
      CheckpointError: naming the file, the tensor and the rule that is broken.
      OSError: if the file cannot be opened or read.
    """
    fd = open_regular(path)
    try:
        file_size = os.fstat(fd).st_size
        if file_size < 8:
            raise CheckpointError(
                f"{path}: {file_size} bytes is too short for a safetensors file; "
                "it was cut off, or is no checkpoint"
            )
        length = int.from_bytes(_read(fd, 8), "little")
        if length > MAX_HEADER:
            raise CheckpointError(
                f"{path}: the header claims {length} bytes, the format's limit is "
                f"{MAX_HEADER}; this is no safetensors file, or it is damaged"
            )
        if 8 + length > file_size:
            raise CheckpointError(
                f"{path}: the header claims to end at byte {8 + length}, the file has "
                f"{file_size}; it was cut off: fetch it again"
            )
        text = _read(fd, length)
    finally:
        os.close(fd)
    if len(text) != length:
        raise CheckpointError(f"{path}: the file became shorter while it was read")
    try:
        tensors, metadata = parse_header(text, file_size - 8 - length, 8 + length)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return Header(tensors, metadata, file_size)


def parse_header(
    text: bytes, data_size: int, data_start: int = 0
) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Checks the JSON of a header against the size of the data behind it.

    Args:
      text: the header's bytes.
      data_size: the number of bytes behind the header.
      data_start: added to the offsets, to make them count from the file's start.

    Returns:
      The tensors in order of their offsets, and the metadata.

    Raises:
      CheckpointError: naming the tensor and the rule that is broken.
    """
    if not text.startswith(b"{"):
        raise CheckpointError("the header does not start with '{'")
    header = load_json(text, "the header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise CheckpointError("__metadata__ must map text to text")
    entries = {name: _parse_entry(name, value) for name, value in header.items()}
    tensors: dict[str, TensorEntry] = {}
    stop = 0
    for name, entry in sorted(
        entries.items(), key=lambda item: (item[1].start, item[1].stop)
    ):
        if entry.start != stop:
            flaw = "overlaps the tensor before it" if entry.start < stop else "a hole"
            raise CheckpointError(
                f"tensor {shown(name)} starts at data byte {entry.start}, the tensors "
                f"before it end at {stop}: {flaw}"
            )
        stop = entry.stop
        tensors[name] = dataclasses.replace(
            entry, start=entry.start + data_start, stop=entry.stop + data_start
        )
    if stop != data_size:
        what = "it was cut off: fetch it again" if stop > data_size else "damaged"
        raise CheckpointError(
            f"declares data through byte {data_start + stop}, the file has "
            f"{data_start + data_size}; {what}"
        )
    return tensors, metadata


def load_json(text: bytes, what: str) -> dict[str, Any]:
    """Parses an untrusted JSON object; duplicate keys and deep nesting are refused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore
            raise CheckpointError(f"{what} has the key {shown(twice)} twice")
        return found

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(
            text.decode(), object_pairs_hook=unique, parse_constant=no_constant
        )
    except CheckpointError:
        raise
    except RecursionError:
        raise CheckpointError(f"{what} is nested too deeply") from None
    except ValueError as error:  # bad UTF-8, bad JSON, an integer of 5000 digits
        raise CheckpointError(
            f"{what} is not valid JSON ({shown(str(error))})"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is not a JSON object")
    return value


def layout(
    tensors: Iterable[tuple[str, Dtype, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
) -> tuple[bytes, dict[str, TensorEntry]]:
    """The first bytes of a file and the place of each tensor, as `safetensors` writes.

    Tensors are ordered by dtype (see `Dtype.order`), then by name; the header is
    padded with spaces to a multiple of eight bytes.

    Returns:
      Length field and header, and the entries with offsets from the file's start.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    entries: dict[str, TensorEntry] = {}
    stop = 0
    ordered = sorted(tensors, key=lambda t: (-t[1].order, t[0].encode()))
    for name, dtype, shape in ordered:
        start, stop = stop, stop + math.prod(shape) * dtype.itemsize
        entries[name] = TensorEntry(dtype, tuple(shape), start, stop)
        header[name] = {
            "dtype": dtype.code,
            "shape": list(shape),
            "data_offsets": [start, stop],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    data_start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {
        name: dataclasses.replace(
            entry, start=entry.start + data_start, stop=entry.stop + data_start
        )
        for name, entry in entries.items()
    }


def _parse_entry(name: str, value: Any) -> TensorEntry:
    who = f"tensor {shown(name)}"
    if len(name) > _MAX_NAME or not name.isprintable():
        raise CheckpointError(f"{who}: a name must be printable and not too long")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{who} needs dtype, shape and data_offsets, no more")
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(
            f"{who} has dtype {shown(value['dtype'])}; known: {', '.join(DTYPES)}"
        )
    shape, offsets = value["shape"], value["data_offsets"]
    if not _naturals(shape):
        raise CheckpointError(f"{who} has shape {shown(shape)}; needs a list of sizes")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{who} has data_offsets {shown(offsets)}; needs [start, stop]"
        )
    entry = TensorEntry(dtype, tuple(shape), *offsets)
    needed = dtype.itemsize
    for dimension in shape:  # as the format does: an overflow on the way counts too
        needed *= dimension
        if needed >= _UINT64:
            raise CheckpointError(f"{who} has shape {shown(shape)}, which overflows")
    if needed != entry.stop - entry.start:
        raise CheckpointError(
            f"{who}: {dtype.code} of shape {shown(shape)} needs {needed} bytes, its "
            f"offsets give {entry.stop - entry.start}"
        )
    return entry


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < _UINT64 for value in values
    )


def _read(fd: int, count: int) -> bytes:
    parts = []
    while count and (part := os.read(fd, count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
