"""Reads GGUF, llama.cpp's format, as a checkpoint of transformers' names.

A file is a header (the architecture, numbers, the tokenizer; then name, shape, type and
place of each tensor) and the data. float32, float16 and bfloat16 are read as they are,
quantised types through the package `gguf` (llama.cpp's own, which is optional), a run
of blocks at a time, as float32. What the quantisation has rounded away stays lost,
which is said in a note.

llama.cpp renames tensors, and puts the rows of Llama's query and key projections into
another order (the halves that rotary embeddings turn become pairs); both are undone.
Architectures whose names or values it changes in other ways are refused by name.

The header is untrusted: texts and counts are bounded, values are skipped where they
stand, and every tensor has to lie within the file.
"""

from __future__ import annotations

import dataclasses
import math
import re
import struct
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.formats.dtypes import DTYPES
from m3jax.checkpoints.formats.gguf_config import Metadata
from m3jax.checkpoints.formats.safetensors import TensorEntry
from m3jax.checkpoints.places.files import InputFile
from m3jax.checkpoints.source import Decoded, Derived, FileTensor, Stored, read

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_HEADER = 200_000_000  # bytes; the largest tokenizers take a tenth of it
_MAX_COUNT = 1_000_000  # of tensors or of fields
_MAX_NAME = 4096  # bytes
_WINDOW = 1 << 20  # bytes of the header that are read at a time
_PART = 1 << 18  # elements dequantised at a time
_ALIGNMENT = "general.alignment"
_ARCHITECTURE = "general.architecture"
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"} | {
    10: "Q",
    11: "q",
    12: "d",
}
_TEXT, _ARRAY = 8, 9
_PLAIN = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"} | {
    30: "BF16"
}
_ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Mistral is a llama, too
_DERIVED = "rope_freqs.weight"  # follows from config.json
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output": "lm_head",
    "output_norm": "model.norm",
}
_OF_LAYERS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_HOW_TO_CONVERT = (
    "convert it with transformers: AutoModelForCausalLM.from_pretrained(FOLDER, "
    "gguf_file=NAME).save_pretrained(NEW_FOLDER)"
)

_CUT_OFF = "ends in the middle of its header; fetch it again, or"


@dataclasses.dataclass(frozen=True)
class Quantised(Decoded):
    """A tensor in blocks of one of GGML's types, dequantised by the package `gguf`.

    Attributes:
      blocks: the file's bytes, one block of `size` elements a row.
      kind: the type, as `gguf` names it.
      shape: of the tensor; its last axis holds whole blocks.
    """

    blocks: FileTensor
    kind: Any
    size: int
    shape: tuple[int, ...]

    @property
    def place(self) -> str:
        return self.blocks.place

    def read_into(self, out: np.ndarray, start: int) -> None:
        from gguf import quants

        width = self.blocks.shape[1]
        step = max(1, _PART // self.size) * self.size
        done = 0
        while done < len(out):
            first, skip = divmod(start + done, self.size)
            count = min(step - skip, len(out) - done)
            blocks = -(-(skip + count) // self.size)
            codes = read(self.blocks, first * width, blocks * width)
            values = quants.dequantize(codes.reshape(-1, width), self.kind)
            out[done : done + count] = values.reshape(-1)[skip : skip + count]
            done += count


@dataclasses.dataclass(frozen=True)
class HalvesTogether(Derived):
    """Rows whose pairs 2j and 2j + 1 of each head are j and j + d/2 of the result.

    Attributes:
      source: rows as llama.cpp orders them, h·d + 2j + i.
      heads: number of heads; row h·d + i·d/2 + j is asked for.
    """

    source: Stored
    heads: int

    @property
    def place(self) -> str:
        return self.source.place

    def read_into(self, out: np.ndarray, start: int) -> None:
        width = math.prod(self.shape[1:])
        size = self.shape[0] // self.heads
        done = 0
        while done < len(out):
            row, column = divmod(start + done, width)
            count = min(width - column, len(out) - done)
            head, place = divmod(row, size)
            half, j = divmod(place, size // 2)
            stored = head * size + 2 * j + half
            self.source.read_into(out[done : done + count], stored * width + column)
            done += count


def read_tensors(
    file: InputFile, parts: Sequence[InputFile] = (), count: int = 1
) -> tuple[dict[str, Stored], list[str], int]:
    """The tensors of a file by transformers' names, and what is said of them.

    Args:
      file: whole, or one part of a split file.
      parts: those before it; the first of them has what is said of the model.
      count: of all parts.

    Returns:
      The tensors; notes; bytes that reading them holds.

    Raises:
      CheckpointError: naming the file, the flaw, and the way out.
    """
    try:
        fields, entries, start = _header(_Cursor(file))
        place = fields.get("split.no") or 0, fields.get("split.count") or 1
        if place != (len(parts), count):
            raise CheckpointError(
                f"says that before it come {shown(place[0])} of {shown(place[1])} "
                f"parts, and here {len(parts)} of {count} do; give the folder of all "
                "parts, under their own names, or"
            )
        if parts:
            fields = {**_header(_Cursor(parts[0]))[0], **fields}
        architecture = fields.get(_ARCHITECTURE)
        if architecture not in _ARCHITECTURES:
            raise CheckpointError(
                f"has architecture {shown(architecture)}, read are "
                f"{', '.join(_ARCHITECTURES)};"
            )
        tensors: dict[str, Stored] = {}
        for name, (shape, kind, offset) in entries.items():
            if name == _DERIVED:
                continue
            stored = _stored(file, name, shape, kind, start + offset)
            ours = _checkpoint_name(name)
            if architecture == "llama":
                stored = _unpaired(ours, stored, fields)
            tensors[ours] = stored
    except CheckpointError as error:
        raise CheckpointError(f"{file.path}: {error} {_HOW_TO_CONVERT}") from None
    kinds = Counter(
        tensor.kind.name
        for stored in tensors.values()
        for tensor in [stored.source if isinstance(stored, HalvesTogether) else stored]
        if isinstance(tensor, Quantised)
    )
    said = ", ".join(f"{count} in {kind}" for kind, count in kinds.most_common())
    notes = [
        f"{file.path}: {said} of {len(tensors)} tensors are dequantised; what the "
        "quantisation has rounded away stays lost"
    ] * bool(kinds)
    return tensors, notes, 0


def read_metadata(file: InputFile) -> Metadata:
    """What a file, or the first part of one, says of its model."""
    fields, entries, _ = _header(_Cursor(file))
    return Metadata(str(fields.get(_ARCHITECTURE)), fields, frozenset(entries))


class _Cursor:
    """Reads the header from its start on, a window at a time."""

    def __init__(self, file: InputFile):
        self._file = file
        self._window = b""
        self._start = 0
        self.at = 0

    def take(self, count: int) -> bytes:
        stop = self.at + count
        if stop > min(self._file.size, _MAX_HEADER):
            raise CheckpointError(_CUT_OFF)
        if stop > self._start + len(self._window):
            self._start = self.at
            length = min(max(count, _WINDOW), self._file.size - self.at)
            self._window = self._file.read(self.at, length)
        part = self._window[self.at - self._start : stop - self._start]
        self.at = stop
        return part

    def skip(self, count: int) -> None:
        if self.at + count > min(self._file.size, _MAX_HEADER):
            raise CheckpointError(_CUT_OFF)
        self.at += count
        if self.at > self._start + len(self._window):
            self._start, self._window = self.at, b""

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def text(self) -> str:
        size = self.number("Q")
        if size > _MAX_NAME:
            raise CheckpointError(f"has a name of {size} bytes; fetch it again, or")
        return self.take(size).decode(errors="replace")


_Entry = tuple[tuple[int, ...], int, int]  # shape, type, offset in the data


def _header(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, _Entry], int]:
    """Fields, tensors, and where the data begin."""
    if cursor.take(4) != MAGIC:
        raise CheckpointError("does not start as a GGUF file does; fetch it again, or")
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise CheckpointError(f"has version {version} of GGUF, read are 2 and 3;")
    num_tensors, num_fields = cursor.number("Q"), cursor.number("Q")
    if max(num_tensors, num_fields) > _MAX_COUNT:
        raise CheckpointError("counts too many tensors or fields; fetch it again, or")
    fields: dict[str, Any] = {}
    for _ in range(num_fields):
        key = cursor.text()
        value = _value(cursor, cursor.number("I"))
        if key in fields:
            raise CheckpointError(f"has the field {shown(key)} twice;")
        fields[key] = value
    entries: dict[str, _Entry] = {}
    for _ in range(num_tensors):
        name = cursor.text()
        axes = cursor.number("I")
        if axes > 8 or name in entries:
            raise CheckpointError(f"has tensor {shown(name)} twice, or of {axes} axes;")
        sizes = [cursor.number("Q") for _ in range(axes)]
        entries[name] = tuple(reversed(sizes)), cursor.number("I"), cursor.number("Q")
    alignment = fields.get(_ALIGNMENT, 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20:
        raise CheckpointError(f"has alignment {shown(alignment)};")
    return fields, entries, cursor.at + -cursor.at % alignment


def _value(cursor: _Cursor, kind: int) -> Any:
    """A field's number or short text; None for others, which are skipped."""
    if kind in _NUMBERS:
        return cursor.number(_NUMBERS[kind])
    if kind == _TEXT:
        return _short(cursor)
    if kind != _ARRAY:
        raise CheckpointError(f"has a field of type {kind};")
    inner, count = cursor.number("I"), cursor.number("Q")
    if inner in _NUMBERS:
        cursor.skip(count * struct.calcsize(_NUMBERS[inner]))
    elif inner == _TEXT:
        for _ in range(count):
            cursor.skip(cursor.number("Q"))
    else:
        raise CheckpointError(f"has a list of type {inner};")
    return None


def _short(cursor: _Cursor) -> str | None:
    size = cursor.number("Q")
    if size > _MAX_NAME:
        cursor.skip(size)
        return None
    return cursor.take(size).decode(errors="replace")


def _stored(
    file: InputFile, name: str, shape: tuple[int, ...], kind: int, start: int
) -> Stored:
    """The tensor where it lies, once it is known to lie in the file."""
    size = math.prod(shape)
    if kind in _PLAIN:
        dtype = DTYPES[_PLAIN[kind]]
        entry = TensorEntry(dtype, shape, start, start + size * dtype.itemsize)
        stored: Stored = FileTensor(file, entry)
    else:
        quantised, per_block, width = _type(name, kind)
        if not shape or shape[-1] % per_block:
            raise CheckpointError(f"has {shown(name)} in blocks that are not whole;")
        rows = size // per_block
        entry = TensorEntry(DTYPES["U8"], (rows, width), start, start + rows * width)
        stored = Quantised(FileTensor(file, entry), quantised, per_block, shape)
    if entry.stop > file.size:
        raise CheckpointError(
            f"says that {shown(name)} ends at byte {entry.stop}, the file has "
            f"{file.size}; it was cut off: fetch it again, or"
        )
    return stored


def _type(name: str, kind: int) -> tuple[Any, int, int]:
    """A quantised type: as `gguf` names it, elements and bytes of a block."""
    try:
        import gguf
    except ImportError:
        raise CheckpointError(
            "is quantised, which the package gguf reads: pip install gguf; or"
        ) from None
    try:
        found = gguf.GGMLQuantizationType(kind)
        per_block, width = gguf.GGML_QUANT_SIZES[found]
        gguf.quants.dequantize(np.zeros((1, width), np.uint8), found)
    except (ValueError, KeyError, NotImplementedError):
        raise CheckpointError(
            f"has {shown(name)} of type {kind}, which the package gguf cannot "
            "dequantise;"
        ) from None
    return found, per_block, width


def _checkpoint_name(name: str) -> str:
    """Transformers' name of a tensor."""
    stem, _, end = name.rpartition(".")
    if stem in _NAMES and end in ("weight", "bias"):
        return f"{_NAMES[stem]}.{end}"
    layer = _LAYER.fullmatch(name)
    if layer is None or layer[2] not in _OF_LAYERS:
        raise CheckpointError(f"has a tensor {shown(name)} of unknown meaning;")
    return f"model.layers.{layer[1]}.{_OF_LAYERS[layer[2]]}.{layer[3]}"


def _unpaired(name: str, stored: Stored, fields: dict[str, Any]) -> Stored:
    """Query and key projections with their rows in transformers' order."""
    for part, field in (("q_proj", "head_count"), ("k_proj", "head_count_kv")):
        if f".{part}." in name:
            heads = fields.get(f"llama.attention.{field}")
            if heads is None:
                heads = fields.get("llama.attention.head_count")
            if type(heads) is not int or heads < 1 or stored.shape[0] % (2 * heads):
                raise CheckpointError(f"has {shown(heads)} heads for {shown(name)};")
            return HalvesTogether(stored, heads)
    return stored
