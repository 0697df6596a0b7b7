"""float8 weights with the scales that stand beside them, dequantised on reading.

A float8 tensor holds codes; the weight is code · scale. Understood are

    NAME_scale      one scale for the tensor, or one per row (compressed-tensors)
    NAME_scale_inv  one scale per block of rows and columns (DeepSeek), block sizes
                    from config.json: quantization_config.weight_block_size

Codes without such a scale, or with one of another shape, are refused: merging raw
codes gives nonsense. Activation scales (`input_scale`) go with the quantisation and
are dropped. The dequantised weights are merged in float32; `dtype: input` writes
them as bfloat16, without scales and without config.json's quantization_config.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from m3jax.checkpoints.dtypes import BFLOAT16, FLOAT32, Dtype
from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.sources import Source, read_whole

_BLOCK = 1 << 18  # elements dequantised at a time


@dataclasses.dataclass(frozen=True)
class Dequantised:
    """Float8 codes times their scales, one scale per block of rows × columns."""

    codes: Source
    scales: Source
    block: tuple[int, int]

    @property
    def dtype(self) -> Dtype:
        return FLOAT32

    @property
    def output_dtype(self) -> Dtype:
        return BFLOAT16

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def read_into(self, out: np.ndarray, start: int) -> None:
        columns = self.shape[-1]
        grid = -(-columns // self.block[1])
        scales = read_whole(self.scales).astype(np.float32).reshape(-1, grid)
        for first in range(0, len(out), _BLOCK):
            part = out[first : first + _BLOCK]
            codes = np.empty(len(part), self.codes.dtype.numpy)
            self.codes.read_into(codes, start + first)
            where = np.arange(start + first, start + first + len(part))
            row, column = where // columns, where % columns
            scale = scales[row // self.block[0], column // self.block[1]]
            np.multiply(codes.astype(np.float32), scale, out=part)


def dequantise(
    tensors: dict[str, Source], config: dict[str, Any] | None
) -> dict[str, Source]:
    """Replaces float8 tensors and their scales by dequantised tensors.

    Raises:
      CheckpointError: naming every float8 tensor whose scale is not understood.
    """
    result = dict(tensors)
    problems = []
    for name, codes in tensors.items():
        if codes.dtype.kind != "float8":
            continue
        for suffix in ("_scale", "_scale_inv"):
            if name + suffix in tensors:
                scales = result.pop(name + suffix)
                block = _block(codes.shape, scales, suffix, config)
                break
        else:
            problems.append(f"{shown(name)} ({codes.dtype.code}) has no scale tensor")
            continue
        if block is None:
            problems.append(
                f"{shown(name)} ({codes.dtype.code}, shape {list(codes.shape)}) has a "
                f"scale of {scales.dtype.code}, shape {list(scales.shape)}"
            )
            continue
        result.pop(name.removesuffix("weight") + "input_scale", None)
        result[name] = Dequantised(codes, scales, block)
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"float8 tensors without understood scales: {'; '.join(problems[:3])}{more}"
            "; dequantise the checkpoint to bfloat16 first"
        )
    return result


def _block(
    shape: tuple[int, ...], scales: Source, suffix: str, config: dict[str, Any] | None
) -> tuple[int, int] | None:
    """Rows and columns that share a scale, or None where the shapes do not fit."""
    if scales.dtype.kind != "float" or not shape or 0 in shape:
        return None
    rows, columns = math.prod(shape[:-1]), shape[-1]
    count = math.prod(scales.shape)
    if suffix == "_scale":
        if count == 1:
            return rows, columns
        if scales.shape in ((rows,), (rows, 1)) and len(shape) == 2:
            return 1, columns
        return None
    quantization = (config or {}).get("quantization_config")
    size = quantization.get("weight_block_size") if isinstance(quantization, dict) else 0
    if not (
        isinstance(size, list)
        and len(size) == 2
        and all(type(edge) is int and edge > 0 for edge in size)
        and len(shape) == 2
        and scales.shape == (-(-rows // size[0]), -(-columns // size[1]))
    ):
        return None
    return size[0], size[1]
