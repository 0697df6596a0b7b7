"""Sizes of files as people write them."""

from __future__ import annotations

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "B": 1}


def parse_size(size: int | str) -> int:
    """Bytes of a size such as ``5GB``, ``200 MB`` or ``1000000`` (decimal units).

    Raises:
      ValueError: if it is not a positive size.
    """
    text = str(size).strip().upper()
    unit = next((u for u in _UNITS if text.endswith(u)), "")
    value = float(text.removesuffix(unit)) * _UNITS.get(unit, 1)
    if isinstance(size, bool) or not 1 <= value < 2**62:
        raise ValueError(f"not a size: {size!r}")
    return int(value)
