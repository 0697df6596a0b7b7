"""The safetensors format: its header, read with suspicion and written exactly.

A file is eight bytes (the header's length N, little-endian), N bytes of JSON, and
the data. A file that breaks a rule of the format is refused:

- N is at most 100 MB and the header ends within the file, so nothing is allocated
  on a header's word.
- The header is one JSON object in UTF-8. `__metadata__`, if present, maps text to
  text; every other value has a dtype, a shape and a pair of data offsets, which are
  integers from 0 to 2**64 - 1.
- The offsets cover the data without holes, overlaps or a tail, and each pair has the
  size that dtype and shape demand. The product of the shape stays below 2**64 at
  every step.

So far the safetensors library (0.8) does the same. What it lets pass, and no writer
makes, is refused, too:

- space before the '{' (the format's text forbids it);
- a name that stands there twice, in the header or in `__metadata__`;
- a tensor's entry that is an array, has more fields than the three, or more than
  4096 characters; a shape of more than 64 dimensions, which NumPy has not;
- `__metadata__` that is null or has more than 65536 entries;
- names that are longer than 4096 characters or hold control characters;
- dtypes that m3jax does not know (F4, F6, FNUZ, C64).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.formats.dtypes import DTYPES, Dtype
from m3jax.checkpoints.formats.json_text import JsonCursor
from m3jax.checkpoints.places.files import InputFile, Location, open_file

METADATA = "__metadata__"
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
# The next limits keep what a header becomes in memory to a small multiple of its
# size. No real checkpoint comes near them.
_MAX_ENTRY = 4096  # characters of one tensor's entry
_MAX_NAME = 4096  # characters
_MAX_METADATA = 65536  # entries
_MAX_DIMENSIONS = 64  # NumPy's limit
_UINT64 = 2**64
_FIELDS = {"dtype", "shape", "data_offsets"}
_NAME_RULE = f"names are unique, printable, and at most {_MAX_NAME} characters long"


@dataclasses.dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file: its dtype, shape and byte range [start, stop)."""

    dtype: Dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says of itself; byte ranges count from the start of the file."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    file_size: int


def read_header(path: Location) -> Header:
    """Reads and checks the header of a safetensors file.

    Raises:
      CheckpointError: naming the file, the tensor and the rule that is broken.
      OSError: if the file cannot be opened or read.
    """
    with open_file(path) as file:
        return header_of(file)


def header_of(file: InputFile) -> Header:
    """Reads and checks the header of an opened file; see `read_header`."""
    path = file.path
    if file.size < 8:
        raise CheckpointError(
            f"{path}: {file.size} bytes is too short for a safetensors file; "
            "it was cut off, or is no checkpoint"
        )
    length = int.from_bytes(file.read(0, 8), "little")
    if length > MAX_HEADER:
        raise CheckpointError(
            f"{path}: the header claims {length} bytes, the format's limit is "
            f"{MAX_HEADER}; this is no safetensors file, or it is damaged"
        )
    if 8 + length > file.size:
        raise CheckpointError(
            f"{path}: the header claims to end at byte {8 + length}, the file has "
            f"{file.size}; it was cut off: fetch it again"
        )
    try:
        tensors, metadata = parse_header(
            file.read(8, length), file.size - 8 - length, 8 + length
        )
    except CheckpointError as error:
        raise CheckpointError(
            f"{path}: {error}; fetch the file again, or convert it"
        ) from None
    return Header(tensors, metadata, file.size)


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
        raise CheckpointError(
            f"the header starts with {shown(text[:8])}, not with '{{'; this is no "
            "safetensors file"
        )
    entries: dict[str, TensorEntry] = {}
    metadata: dict[str, str] | None = None
    cursor = JsonCursor(text, "the header")
    for name in cursor.members():
        if name in entries or (name == METADATA and metadata is not None):
            raise CheckpointError(f"the header has {shown(name)} twice")
        if name == METADATA:
            metadata = _read_metadata(cursor)
            continue
        value = cursor.value(_MAX_ENTRY)
        try:
            entries[name] = _parse_entry(name, value, data_start)
        except CheckpointError as error:
            raise CheckpointError(f"tensor {shown(name)} {error}") from None
    cursor.end()
    return _in_file_order(entries, data_start, data_start + data_size), metadata or {}


def layout(
    tensors: Iterable[tuple[str, Dtype, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
) -> tuple[bytes, dict[str, TensorEntry]]:
    """The first bytes of a file and the place of each tensor, as `safetensors` writes.

    Tensors are ordered by dtype (see `Dtype.order`), then by name; the header is
    padded with spaces to a multiple of eight bytes. The library writes metadata of
    more than one key in an order that changes from run to run; here it is the
    mapping's.

    Returns:
      Length field and header, and the entries with offsets from the file's start.

    Raises:
      CheckpointError: what it would write, it would not read again.
    """
    header: dict[str, Any] = {} if metadata is None else {METADATA: dict(metadata)}
    entries: dict[str, TensorEntry] = {}
    stop = 0
    ordered = sorted(
        tensors, key=lambda t: (-t[1].order, t[0].encode("utf-8", "replace"))
    )
    for name, dtype, shape in ordered:
        if not _is_name(name) or name in entries:
            raise CheckpointError(
                f"tensor {shown(name)} cannot be written: {_NAME_RULE}; rename it"
            )
        start, stop = stop, stop + math.prod(shape) * dtype.itemsize
        entries[name] = TensorEntry(dtype, tuple(shape), start, stop)
        header[name] = {
            "dtype": dtype.code,
            "shape": list(shape),
            "data_offsets": [start, stop],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise CheckpointError(
            f"the header would have {len(text)} bytes, the format's limit is "
            f"{MAX_HEADER}; write several files (max_shard_size)"
        )
    data_start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {
        name: dataclasses.replace(
            entry, start=entry.start + data_start, stop=entry.stop + data_start
        )
        for name, entry in entries.items()
    }


def _read_metadata(cursor: JsonCursor) -> dict[str, str]:
    metadata: dict[str, str] = {}
    for key in cursor.members():
        if key in metadata or len(metadata) == _MAX_METADATA:
            flaw = f"has {shown(key)} twice" if key in metadata else "is too long"
            raise CheckpointError(f"{METADATA} of the header {flaw}")
        metadata[key] = cursor.string()
    return metadata


def _parse_entry(name: str, value: Any, data_start: int) -> TensorEntry:
    if not _is_name(name):
        raise CheckpointError(f"has a name that is not allowed: {_NAME_RULE}")
    if not isinstance(value, dict) or set(value) != _FIELDS:
        raise CheckpointError("needs dtype, shape and data_offsets, no more")
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(
            f"has dtype {shown(value['dtype'])}; known: {', '.join(DTYPES)}"
        )
    shape, offsets = value["shape"], value["data_offsets"]
    if not _naturals(shape) or len(shape) > _MAX_DIMENSIONS:
        raise CheckpointError(
            f"has shape {shown(shape)}; needs a list of up to {_MAX_DIMENSIONS} sizes"
        )
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"has offsets {shown(offsets)}; needs [start, stop]")
    size = 1
    for dimension in shape:  # as the format does: an overflow on the way counts too
        size *= dimension
        if size >= _UINT64:
            raise CheckpointError(f"has shape {shown(shape)}, which overflows")
    start, stop = offsets
    if size * dtype.itemsize != stop - start:
        raise CheckpointError(
            f"({dtype.code} of shape {shown(shape)}) needs {size * dtype.itemsize} "
            f"bytes, its offsets give {stop - start}"
        )
    return TensorEntry(dtype, tuple(shape), data_start + start, data_start + stop)


def _in_file_order(
    entries: dict[str, TensorEntry], data_start: int, file_size: int
) -> dict[str, TensorEntry]:
    """The entries by offset, once they are known to cover the data exactly."""
    names = sorted(entries, key=lambda name: (entries[name].start, entries[name].stop))
    end = data_start
    for name in names:
        start = entries[name].start
        if start != end:
            flaw = "they overlap" if start < end else "there is a hole"
            raise CheckpointError(
                f"tensor {shown(name)} starts at byte {start}, the tensors before it "
                f"end at {end}: {flaw}"
            )
        end = entries[name].stop
    if end != file_size:
        what = "was cut off" if end > file_size else "has bytes that are no tensor's"
        raise CheckpointError(
            f"declares data through byte {end}, the file has {file_size}; it {what}"
        )
    return {name: entries[name] for name in names}


def _is_name(name: str) -> bool:
    return len(name) <= _MAX_NAME and name.isprintable() and name != METADATA


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < _UINT64 for value in values
    )
