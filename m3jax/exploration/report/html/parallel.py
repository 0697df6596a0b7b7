"""Parallel coordinates: all numbers of a draw on one line."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

from m3jax.exploration.report.html import marks
from m3jax.exploration.report.html.axes import Axis
from m3jax.exploration.report.html.svg import Scale, element, path, scale, text
from m3jax.exploration.search.result import Exploration

_STEP, _TALL, _SIDE = 120.0, 300.0, 70.0


def parallel(found: Exploration, axes: Sequence[Axis]) -> str:
    """A line for each draw through all its numbers; up is better for scores."""
    width = _STEP * (len(axes) - 1) + 2 * _SIDE
    top, bottom = 48.0, _TALL - 16
    scales = [
        scale(axis.numbers, axis.options, *_ends(axis, top, bottom)) for axis in axes
    ]
    winner = marks.winner_of(found)
    order = [i for i in range(len(found.draws)) if i != winner]
    ranks = _ranks(found)
    parts = []
    for i in [*sorted(order, key=lambda i: ranks[i]), winner]:
        points = [
            (_SIDE + _STEP * place, own(axis.numbers[i]))
            for place, (axis, own) in enumerate(zip(axes, scales, strict=True))
            if not math.isnan(axis.numbers[i])
        ]
        if points:
            parts.append(
                element(
                    "path",
                    element("title", text(marks.told(found, i, axes))),
                    class_="line best" if i == winner else f"line rank{ranks[i]}",
                    data_draw=found.draws[i].index,
                    d=path(points),
                )
            )
    for place, (axis, own) in enumerate(zip(axes, scales, strict=True)):
        parts.append(_upright(axis, own, _SIDE + _STEP * place, top, bottom, place % 2))
    return marks.picture("parallel coordinates of all draws", width, _TALL, parts)


def _upright(
    axis: Axis, own: Scale, x: float, top: float, bottom: float, odd: int
) -> str:
    parts = [marks.line("floor", x, top, x, bottom)]
    for number, label in own.ticks[:: -(-len(own.ticks) // marks.SHOWN)]:
        parts.append(
            marks.label(marks.short(label, 12), x + 5, own(number) + 4, "start")
        )
    less = " ↓" if axis.lower else ""
    name = marks.short(axis.name, 22) + less
    parts.append(marks.label(name, x, 16.0 + 16 * odd, "middle", "name"))
    return element("g", *parts, class_="upright")


def _ends(axis: Axis, top: float, bottom: float) -> tuple[float, float]:
    return (top, bottom) if axis.lower else (bottom, top)


def _ranks(found: Exploration) -> list[int]:
    """The quarter of each draw by objective, 0 to 3; 0 without one."""
    objectives = [draw.objective for draw in found.draws]
    finite = sorted(own for own in objectives if math.isfinite(own))
    return [
        4 * bisect.bisect_left(finite, own) // len(finite) if math.isfinite(own) else 0
        for own in objectives
    ]
