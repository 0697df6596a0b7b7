"""GPT-OSS's experts in MXFP4, dequantised on reading.

NAME_blocks holds two 4-bit codes (E2M1) a byte, the low half first, NAME_scales the
exponent of each run of 32 of them (E8M0, bias 127):

    weight = value(code) · 2^(scale − 127)        OCP Microscaling Formats (MX) v1.0

The codes stand as (experts, rows, groups, 16) and make a matrix (rows, 32 · groups) for
each expert; the model multiplies by its transpose, and so NAME, as transformers names
it in bfloat16, has shape (experts, 32 · groups, rows). Agrees with transformers'
`convert_moe_packed_tensors` to the bit. `dtype: input` writes bfloat16, which holds
every such weight.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import numpy as np

from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.formats.dtypes import DTYPES
from m3jax.checkpoints.source import Decoded, Source, read

_GROUP = 32  # elements that share a scale
_PART = 1 << 20  # elements dequantised at a time
_RECENT = 8  # experts whose codes are kept, since threads read them slice by slice
_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_TABLE = np.concatenate([_VALUES, -_VALUES])
_BLOCKS, _SCALES = "_blocks", "_scales"

Packed = tuple[np.ndarray, np.ndarray]  # (R, C / 2) codes and (R, C / 32) exponents


@dataclasses.dataclass(frozen=True)
class Experts(Decoded):
    """The matrices of all experts: codes times powers of two, transposed.

    Attributes:
      shape: (E, C, R).
      packed: codes and exponents of an expert.
    """

    shape: tuple[int, ...]
    packed: Callable[[int], Packed]

    def read_into(self, out: np.ndarray, start: int) -> None:
        _, columns, rows = self.shape
        step = max(1, _PART // rows) * rows
        done = 0
        while done < len(out):
            expert, first = divmod(start + done, columns * rows)
            count = min(step, columns * rows - first, len(out) - done)
            column, skip = divmod(first, rows)
            last = (first + count - 1) // rows
            values = _columns(self.packed(expert), column, last + 1).reshape(-1)
            out[done : done + count] = values[skip : skip + count]
            done += count


def _columns(packed: Packed, start: int, stop: int) -> np.ndarray:
    """Columns [start, stop) of an expert's matrix, as rows."""
    codes, exponents = packed
    left = start // 2
    part = codes[:, left : -(-stop // 2)]
    values = np.stack([_TABLE[part & 15], _TABLE[part >> 4]], axis=-1)
    values = values.reshape(len(codes), -1)[:, start - 2 * left : stop - 2 * left]
    groups = np.arange(start, stop) // _GROUP
    # The largest scale makes infinity, which the check for it reports.
    with np.errstate(over="ignore"):
        scaled = np.ldexp(values, exponents[:, groups].astype(np.int32) - 127)
    return np.ascontiguousarray(scaled.T)


def dequantise(tensors: Mapping[str, Source]) -> tuple[dict[str, Source], int]:
    """Replaces blocks and scales by the experts' matrices.

    Returns:
      The tensors, and the bytes that reading them keeps.

    Raises:
      CheckpointError: naming the first blocks that do not fit their scales.
    """
    result = dict(tensors)
    kept = 0
    byte = DTYPES["U8"]

    @functools.lru_cache(maxsize=_RECENT)
    def packed(name: str, expert: int) -> Packed:
        blocks, scales = tensors[name + _BLOCKS], tensors[name + _SCALES]
        _, rows, groups, half = blocks.shape
        count = rows * groups
        codes = read(blocks, expert * count * half, count * half)
        exponents = read(scales, expert * count, count)
        return codes.reshape(rows, -1), exponents.reshape(rows, -1)

    for blocks_name, blocks in tensors.items():
        name = blocks_name.removesuffix(_BLOCKS)
        scales = tensors.get(name + _SCALES)
        if name == blocks_name or scales is None or blocks.dtype != byte:
            continue
        fits = len(blocks.shape) == 4 and blocks.shape[3] * 2 == _GROUP
        if (
            not fits
            or (scales.dtype, scales.shape) != (byte, blocks.shape[:3])
            or not math.prod(blocks.shape)
            or name in tensors
        ):
            raise CheckpointError(
                f"MXFP4 blocks {shown(blocks_name)}, {blocks.dtype.code} of shape "
                f"{list(blocks.shape)}, with scales {scales.dtype.code} of shape "
                f"{list(scales.shape)}; need (experts, rows, groups, 16) and (experts, "
                "rows, groups) in U8: give the model in bfloat16"
            )
        experts, rows, groups, _ = blocks.shape
        del result[blocks_name], result[name + _SCALES]
        shape = (experts, groups * _GROUP, rows)
        result[name] = Experts(shape, functools.partial(packed, name))
        kept = max(kept, _RECENT * rows * groups * 17)
    return result, kept
