"""What is aimed at, and whether a run of end_to_end.py found it.

Whole processes, the output on the disk, on two cores. The first aim is how many times
faster than mergekit's counterpart a merge is, the second how many times as long as a
copy of the same bytes it streams.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import bench

_COPYING = (10.0, 1.3)
_GEOMETRY = (10.0, 2.5)
AIMS = {
    "average": _COPYING,
    "average + M3": _COPYING,
    "task arithmetic": _COPYING,
    "task arithmetic + M3": _COPYING,
    "TIES": (25.0, 4.0),
    "TIES + M3": (25.0, 4.0),
    "mergekit's linear": _COPYING,
    "mergekit's task_arithmetic": _COPYING,
    "mergekit's dare_linear": (15.0, 2.5),
    "mergekit's ties": (30.0, 4.0),
    "mergekit's dare_ties": (10.0, 4.0),
    "mergekit's slerp": _GEOMETRY,
    "mergekit's model_stock": _GEOMETRY,
    "mergekit's karcher": _GEOMETRY,
}
PEAK = 0.5e9  # bytes


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table: aim, found, met or missed."""
    lines = []
    for row in rows:
        faster, floor = AIMS.get(row["recipe"], (None, None))
        peak = row["m3jax"]["peak_bytes"]
        lines.append(
            [
                row["recipe"],
                *_at_least(faster, row["times_faster"]),
                *_at_most(floor, row["streaming_to_floor"], " ×"),
                *_at_most(PEAK / 1e9, peak / 1e9, " GB"),
            ]
        )
    header = ["recipe"]
    for what in ("times mergekit", "of the floor", "peak memory"):
        header += [f"{what}: aim", "found", ""]
    return bench.table(header, lines)


def _at_least(aim: float | None, found: float | None) -> list[str]:
    if aim is None or found is None:
        return ["–", bench.times(found, 1), ""]
    return [f"≥ {aim:g} ×", bench.times(found, 1), _verdict(found >= aim)]


def _at_most(aim: float | None, found: float, unit: str) -> list[str]:
    if aim is None:
        return ["–", f"{found:.2f}{unit}", ""]
    return [f"≤ {aim:g}{unit}", f"{found:.2f}{unit}", _verdict(found <= aim)]


def _verdict(met: bool) -> str:
    return "met" if met else "missed"
