"""The dtypes of the safetensors format, and what m3jax does with each."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np


@dataclasses.dataclass(frozen=True)
class Dtype:
    """One dtype of the format.

    Attributes:
      code: its name in a safetensors header.
      numpy: the NumPy dtype of one element.
      order: its place in a file: `safetensors` writes larger orders first.
      kind: ``float`` (merged), ``float8`` (dequantised, then merged; F8_E8M0 as a
        scale alone), ``exact`` (copied, must be equal in all models).
    """

    code: str
    numpy: np.dtype
    order: int
    kind: str

    @property
    def itemsize(self) -> int:
        return self.numpy.itemsize


# From the first written to the last. Checked against safetensors 0.8, which also
# knows F4, F6, the FNUZ types and C64: those are refused by name.
_TABLE = (
    ("U64", np.uint64, "exact"),
    ("I64", np.int64, "exact"),
    ("F64", np.float64, "float"),
    ("F32", np.float32, "float"),
    ("U32", np.uint32, "exact"),
    ("I32", np.int32, "exact"),
    ("BF16", ml_dtypes.bfloat16, "float"),
    ("F16", np.float16, "float"),
    ("U16", np.uint16, "exact"),
    ("I16", np.int16, "exact"),
    ("F8_E8M0", ml_dtypes.float8_e8m0fnu, "float8"),
    ("F8_E4M3", ml_dtypes.float8_e4m3fn, "float8"),
    ("F8_E5M2", ml_dtypes.float8_e5m2, "float8"),
    ("I8", np.int8, "exact"),
    ("U8", np.uint8, "exact"),
    ("BOOL", np.bool_, "exact"),
)
DTYPES = {
    code: Dtype(code, np.dtype(dtype), len(_TABLE) - place, kind)
    for place, (code, dtype, kind) in enumerate(_TABLE)
}
_BY_NUMPY = {dtype.numpy: dtype for dtype in DTYPES.values()}


def of_numpy(dtype: np.dtype | str) -> Dtype:
    """The format's dtype of a NumPy dtype or its name.

    Raises:
      ValueError: if the format has none that m3jax writes.
    """
    found = _BY_NUMPY.get(np.dtype(dtype))
    if found is None:
        raise ValueError(f"dtype {dtype} cannot be written; known: {', '.join(DTYPES)}")
    return found


BFLOAT16 = DTYPES["BF16"]
FLOAT32 = DTYPES["F32"]
FLOAT64 = DTYPES["F64"]
