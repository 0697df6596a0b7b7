"""Quantised checkpoints: those that are dequantised, and those refused by name.

Codes and scales that are merged as if they were weights give nonsense without a sign of
it. So before anything is read a checkpoint's names, dtypes and `quantization_config`
are looked at: float8 with its scales and GPT-OSS's MXFP4 become weights, anything else
is refused with the name of its method and the way out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.source import Source
from m3jax.checkpoints.sources import float8, mxfp4
from m3jax.checkpoints.sources.float8 import quantization

# What each method leaves in the names of tensors, as its own loader looks for it.
_MARKS = {
    "bitsandbytes": r"absmax|nested_absmax|quant_map|nested_quant_map|SCB|weight_format"
    r"|quant_state\.bitsandbytes__\w+",
    "GPTQ or AWQ": r"qweight|qzeros|g_idx",
    "compressed-tensors": r"weight_packed|weight_shape|weight_zero_point"
    r"|weight_global_scale",
    "NVFP4": r"weight_scale_2",
    "HQQ": r"W_q",
    "QuIP#": r"Qidxs",
    "quanto": r"weight\._data",
}
_MARK = {name: re.compile(rf"(?:.*\.)?(?:{marks})") for name, marks in _MARKS.items()}
_CODES = ("I8", "U8", "I16", "U16", "I32", "U32")  # dtypes that codes come in
_SCALES = ("_scale", "_scale_inv", "_scales", "_absmax", ".scale", ".scales")
_WAY_OUT = (
    "give the model that it was quantised from, in float32, float16 or bfloat16 "
    "(its model card names it)"
)


class Weights(NamedTuple):
    """What there is to merge.

    Attributes:
      tensors: by name.
      kinds: what was dequantised: ``float8``, ``MXFP4``.
      memory: bytes that reading them keeps.
    """

    tensors: dict[str, Source]
    kinds: tuple[str, ...]
    memory: int


def weights_of(
    tensors: Mapping[str, Source], config: Mapping[str, Any] | None
) -> Weights:
    """The tensors with codes and scales replaced by the weights they stand for.

    Args:
      tensors: as they are stored.
      config: config.json.

    Raises:
      CheckpointError: naming the quantisation that is not read, and the way out.
    """
    _refuse_marked(tensors, config)
    found, memory = mxfp4.dequantise(tensors)
    kinds = ("MXFP4",) if len(found) < len(tensors) else ()
    if float8.holds(found):
        found, kinds = float8.dequantise(found, config), (*kinds, "float8")
    _refuse_codes(found, config)
    return Weights(found, kinds, memory)


def _refuse_marked(
    tensors: Mapping[str, Source], config: Mapping[str, Any] | None
) -> None:
    for method, mark in _MARK.items():
        name = next((name for name in tensors if mark.fullmatch(name)), None)
        if name is not None:
            _refuse(_method(method, tensors, config), name, tensors[name])


def _refuse_codes(
    tensors: Mapping[str, Source], config: Mapping[str, Any] | None
) -> None:
    """Refuses matrices of integers that have scales, or that config.json speaks of."""
    said = quantization(config).get("quant_method")
    for name, source in tensors.items():
        if source.dtype.code not in _CODES or len(source.shape) < 2:
            continue
        stem = name.removesuffix(".weight")
        scaled = any(own + end in tensors for own in (name, stem) for end in _SCALES)
        if scaled or isinstance(said, str):
            _refuse(said if isinstance(said, str) else "integers", name, source)


def _method(
    method: str, tensors: Mapping[str, Source], config: Mapping[str, Any] | None
) -> str:
    if method != "GPTQ or AWQ":
        return method
    said = str(quantization(config).get("quant_method")).upper()
    if said in ("GPTQ", "AWQ"):
        return said
    ordered = any(name.endswith("g_idx") for name in tensors)
    return "GPTQ" if ordered else method


def _refuse(method: str, name: str, source: Source) -> None:
    raise CheckpointError(
        f"is quantised by {shown(method, 40).strip(chr(39))}: {shown(name)} "
        f"({source.dtype.code}) and its like are codes and scales, which cannot be "
        f"merged; {_WAY_OUT}"
    )
