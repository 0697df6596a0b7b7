"""float8 weights with the scales that stand beside them, dequantised on reading.

A float8 tensor holds codes; the weight is code · scale. Both names of the scale mean
a factor, `_inv` too (it is the inverse of what the quantiser multiplied by):

    NAME_scale      compressed-tensors, which llm-compressor and vLLM write: its
                    `_dequantize` returns ``x_q * scale``; and transformers' fbgemm_fp8
    NAME_scale_inv  DeepSeek-V3 (README_WEIGHTS.md: "(128x128 weight block) *
                    weight_scale_inv") and transformers' finegrained_fp8
    STEM.scale      of STEM.weight: DeepSeek's own inference code, which renames so

Scales are floating-point numbers, or powers of two in a byte (F8_E8M0). A scale has one
number for the tensor, or one per row, or one per block of rows and columns; of three
dimensions (experts), one per matrix, row, column or block of each. The edges of a block
are taken from config.json's quantization_config, never guessed from the shapes:
``weight_block_size`` (DeepSeek), or ``block_structure`` or ``group_size`` of the
weights in ``config_groups`` (compressed-tensors). The last block of a row or column may
be cut off.

Codes without such a scale, with one of another shape, or with zero points, are
refused: merging raw codes gives nonsense. The scales of activations and of the
key-value cache go with the quantisation and are dropped. The dequantised weights are
merged in float32; `dtype: input` writes them as bfloat16, without scales and without
config.json's quantization_config.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from m3jax.checkpoints.errors import CheckpointError, few, shown
from m3jax.checkpoints.source import Decoded, Source, read

_PART = 1 << 18  # elements dequantised at a time
_MAX_EDGE = 1 << 16  # of a block; in use are 32 to 512
_POWERS = "F8_E8M0"  # a dtype of scales alone
_NOT_UNDERSTOOD = ("_zero_point", "_global_scale", "_scale_2", "_g_idx")
_OF_ACTIVATIONS = re.compile(
    r"(.*\.)?((input|output|activation|[qkv]|kv|prob)_scale|input_scale_ub)"
)

Block = tuple[int, int]  # rows and columns that share a scale


@dataclasses.dataclass(frozen=True, slots=True)
class Dequantised(Decoded):
    """Float8 codes times their scales, one scale per block of rows × columns.

    Of a tensor of more than two dimensions, all but the last are rows.

    Attributes:
      codes, scales: as they are stored.
      block: rows and columns that share a scale.
      matrix: rows after which the blocks begin anew; 0: they do not.
    """

    codes: Source
    scales: Source
    block: Block
    matrix: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def read_into(self, out: np.ndarray, start: int) -> None:
        every_byte = np.arange(256, dtype=np.uint8)
        weights = every_byte.view(self.codes.dtype.numpy).astype(np.float32)
        columns = self.shape[-1]
        done = 0
        while done < len(out):
            first = start + done
            count = min(_PART, len(out) - done)
            if columns > _PART:  # then a part stays within a row, to bound its scales
                count = min(count, columns - first % columns)
            codes = read(self.codes, first, count)
            part = out[done : done + count]
            np.take(weights, codes.view(np.uint8), out=part)
            # NaN and infinity are for the check for non-finite values to report.
            with np.errstate(over="ignore", invalid="ignore"):
                part *= self._scales_of(first, count)
            done += count

    def _scales_of(self, start: int, count: int) -> np.ndarray:
        """The float32 scale of each of `count` elements."""
        block_columns = self.block[1]
        columns = self.shape[-1]
        grid = -(-columns // block_columns)  # scales in a row of scales
        first, low = divmod(start, columns)
        last, high = divmod(start + count - 1, columns)
        skip = 0
        if last > first:
            skip, low, high = low, 0, columns - 1
        # Only the scales of rows first to last and columns low to high are read.
        left, right = low // block_columns, high // block_columns + 1
        rows = self._scale_rows(np.arange(first, last + 1))
        top, bottom = int(rows[0]), int(rows[-1])
        held = (bottom - top) * grid + right - left
        scales = read(self.scales, top * grid + left, held)
        by_row = scales.astype(np.float32).reshape(-1, right - left)[rows - top]
        if right - left == 1:  # one scale for the row, however wide its block is
            return np.repeat(by_row[:, 0], high + 1 - low)[skip : skip + count]
        by_element = np.repeat(by_row, block_columns, axis=1)
        shift = low - left * block_columns
        by_element = by_element[:, shift : shift + high + 1 - low].reshape(-1)
        return by_element[skip : skip + count]

    def _scale_rows(self, rows: np.ndarray) -> np.ndarray:
        """The row of scales for each row of codes."""
        height = self.block[0]
        if not self.matrix:
            return rows // height
        matrices, rows = np.divmod(rows, self.matrix)
        return matrices * -(-self.matrix // height) + rows // height


def holds(tensors: Mapping[str, Source]) -> bool:
    """Whether any tensor is float8."""
    return any(source.dtype.kind == "float8" for source in tensors.values())


def dequantise(
    tensors: Mapping[str, Source], config: Mapping[str, Any] | None
) -> dict[str, Source]:
    """Replaces float8 tensors and their scales by dequantised tensors.

    Args:
      tensors: as they are stored.
      config: config.json.

    Raises:
      CheckpointError: naming the first float8 tensors whose scales are not understood.
    """
    if not holds(tensors):
        return dict(tensors)
    float8 = [
        name
        for name, source in tensors.items()
        if source.dtype.kind == "float8" and source.dtype.code != _POWERS
    ]
    blocks = _blocks(config)
    result = {n: s for n, s in tensors.items() if not _OF_ACTIVATIONS.fullmatch(n)}
    problems = []
    for name in float8:
        codes = tensors[name]
        try:
            scale_name = _scale_name(name, tensors)
            block, matrix = _block(codes.shape, tensors[scale_name], blocks)
        except CheckpointError as problem:
            what = f"{codes.dtype.code}, shape {list(codes.shape)}"
            problems.append(f"{shown(name)} ({what}) {problem}")
            continue
        result.pop(scale_name, None)
        result[name] = Dequantised(codes, tensors[scale_name], block, matrix)
    problems += [
        f"{shown(name)} ({_POWERS}) is the scale of no float8 tensor"
        for name, source in result.items()
        if source.dtype.code == _POWERS
    ]
    if problems:
        raise CheckpointError(
            f"float8 tensors whose scales are not understood: {few(problems)}; "
            "dequantise the checkpoint to bfloat16 first"
        )
    return result


def _scale_name(name: str, tensors: Mapping[str, Source]) -> str:
    """The name of the one tensor of scales."""
    strange = [name + suffix for suffix in _NOT_UNDERSTOOD if name + suffix in tensors]
    if strange:
        raise CheckpointError(f"has {', '.join(map(shown, strange))}")
    possible = [f"{name}_scale", f"{name}_scale_inv"]
    if name.endswith(".weight"):
        possible.append(f"{name.removesuffix('.weight')}.scale")
    found = [scale for scale in possible if scale in tensors]
    if len(found) != 1:
        said = ", ".join(map(shown, found)) or "no scale tensor"
        raise CheckpointError(f"has {said}, needs one of NAME_scale and NAME_scale_inv")
    return found[0]


def _block(
    shape: tuple[int, ...], scales: Source, blocks: set[Block]
) -> tuple[Block, int]:
    """Rows and columns that share a scale, and the rows of a matrix if that matters."""
    has = f"has a scale of {scales.dtype.code}, shape {list(scales.shape)}"
    if scales.dtype.kind != "float" and scales.dtype.code != _POWERS:
        raise CheckpointError(f"{has}, needs a floating-point dtype")
    if not shape or 0 in shape:
        raise CheckpointError(f"{has}, needs to hold elements and have a dimension")
    rows, columns = math.prod(shape[:-1]), shape[-1]
    if math.prod(scales.shape) == 1:
        return (rows, columns), 0
    if len(shape) == 2 and scales.shape in ((rows,), (rows, 1)):
        return (1, columns), 0
    if len(shape) == 3:
        experts, height = shape[:2]
        for form, block in (
            ((experts, height, 1), (1, columns)),
            ((experts, 1, columns), (height, 1)),
            ((experts, 1, 1), (height, columns)),
            ((experts,), (height, columns)),
        ):
            if scales.shape == form:
                return block, height
    fitting = {
        block
        for block in blocks
        if len(shape) in (2, 3)
        and scales.shape
        == (*shape[:-2], -(-shape[-2] // block[0]), -(-columns // block[1]))
    }
    if len(fitting) != 1:
        known = ", ".join(f"{r} x {c}" for r, c in sorted(blocks)) or "none"
        raise CheckpointError(
            f"{has}, needs one number, one per row, or one per block of config.json's "
            f"quantization_config (blocks known: {known})"
        )
    return fitting.pop(), shape[-2] if len(shape) == 3 else 0


def quantization(config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """config.json's quantization_config, where it stands; empty without one."""
    for place in (config or {}, (config or {}).get("text_config")):
        for field in ("quantization_config", "compression_config"):
            found = place.get(field) if isinstance(place, dict) else None
            if isinstance(found, dict):
                return found
    return {}


def _blocks(config: Mapping[str, Any] | None) -> set[Block]:
    """The blocks that config.json speaks of."""
    fields = quantization(config)
    said = [fields.get("weight_block_size")]
    groups = fields.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            said += [weights.get("block_structure"), [1, weights.get("group_size")]]
    return {
        (size[0], size[1])
        for size in said
        if isinstance(size, list)
        and len(size) == 2
        and all(type(edge) is int and 0 < edge <= _MAX_EDGE for edge in size)
    }
