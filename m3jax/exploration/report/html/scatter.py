"""Scores of draws against their parameters, or against each other."""

from __future__ import annotations

import math
from collections.abc import Sequence

from m3jax.exploration.report.html import marks
from m3jax.exploration.report.html.axes import Axis, score_of
from m3jax.exploration.report.html.svg import Scale, element, path, scale, text
from m3jax.exploration.search.result import Exploration, Row

COLORS = 6  # of parents; see style.css
_WIDTH, _HEIGHT = 360.0, 260.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 12.0, 12.0, 40.0


def scatter(
    found: Exploration,
    x: Axis,
    y: Axis,
    marked: Sequence[int] = (),
    joined: bool = False,
) -> str:
    """Draws by two of their numbers, with parents, baselines and the winner.

    Args:
      found: whose draws they are.
      x: a parameter or a score.
      y: a score.
      marked: draws that are told from the others: the Pareto front.
      joined: by a line.
    """
    plane = _plane(found, x, y)
    right, down = plane
    parts = [_frame(plane, x, y)]
    points = {
        i: (right(a), down(b))
        for i, (a, b) in enumerate(zip(x.numbers, y.numbers, strict=True))
        if not (math.isnan(a) or math.isnan(b))
    }
    if joined:
        front = sorted(points[i] for i in marked if i in points)
        parts.append(element("path", class_="front", d=path(front)) if front else "")
    winner = marks.winner_of(found)
    for i, (a, b) in points.items():
        if i != winner:
            parts.append(
                element(
                    "circle",
                    element("title", text(marks.told(found, i, (x, y)))),
                    class_="draw marked" if i in marked else "draw",
                    data_draw=found.draws[i].index,
                    cx=a,
                    cy=b,
                    r=4,
                )
            )
    for place, row in enumerate(found.rows[:-1]):
        parts.append(_reference(found, row, place, plane, x, y))
    if winner in points:
        told = element("title", text(f"winner: {marks.told(found, winner, (x, y))}"))
        star = path(marks.star(*points[winner])) + "Z"
        index = found.draws[winner].index
        parts.append(element("path", told, class_="winner", data_draw=index, d=star))
    name = f"{y.name} against {x.name}"
    return marks.picture(name, _WIDTH, _HEIGHT, parts)


def _plane(found: Exploration, x: Axis, y: Axis) -> tuple[Scale, Scale]:
    """Scales that have room for the draws and what they are compared with."""
    rows = found.rows[:-1]
    down = [*y.numbers, *(score_of(found, row, y.name) for row in rows)]
    if x.model is not None:
        numbers: Sequence[float] = (0.0, 1.0)
    elif x.name in found.winner.scores:
        numbers = [*x.numbers, *(score_of(found, row, x.name) for row in rows)]
    else:
        numbers = x.numbers
    return (
        scale(numbers, x.options, _LEFT, _WIDTH - _RIGHT),
        scale(down, (), _HEIGHT - _BOTTOM, _TOP),
    )


def _frame(plane: tuple[Scale, Scale], x: Axis, y: Axis) -> str:
    right, down = plane
    floor, middle = _HEIGHT - _BOTTOM, (_LEFT + _WIDTH - _RIGHT) / 2
    parts = []
    for number, label in down.ticks:
        parts.append(
            marks.line("grid", _LEFT, down(number), _WIDTH - _RIGHT, down(number))
        )
        parts.append(marks.label(label, _LEFT - 6, down(number) + 4, "end"))
    ticks = right.ticks[:: -(-len(right.ticks) // marks.SHOWN)]
    room = max(7, 54 // len(ticks))  # characters
    for number, label in ticks:
        parts.append(
            marks.label(marks.short(label, room), right(number), floor + 15, "middle")
        )
    parts.append(marks.line("floor", _LEFT, floor, _WIDTH - _RIGHT, floor))
    less = " (less is better)" if x.lower else ""
    parts.append(
        marks.label(marks.short(x.name) + less, middle, _HEIGHT - 6, "middle", "name")
    )
    return element("g", *parts)


def _reference(
    found: Exploration,
    row: Row,
    place: int,
    plane: tuple[Scale, Scale],
    x: Axis,
    y: Axis,
) -> str:
    """Where a row's ratios are, or its score on both axes; elsewhere a line."""
    right, down = plane
    score = score_of(found, row, y.name)
    if math.isnan(score):
        return ""
    style = style_of(found, place)
    told = element("title", text(f"{row.name}: {y.name} {score:.4g}"))
    across = math.nan
    if x.name in found.winner.scores:
        across = score_of(found, row, x.name)
    elif x.model is not None:
        across = _ratio(found, place, x.model)
    if math.isnan(across):
        ends = (_LEFT, down(score), _WIDTH - _RIGHT, down(score))
        return marks.line(f"row {style}", *ends, told=told)
    return marks.mark(style, right(across), down(score), told)


def style_of(found: Exploration, place: int) -> str:
    """The class of a row: ``base``, ``parent0`` and on, ``baseline0`` and on."""
    row = found.rows[place]
    number = sum(other.kind == row.kind for other in found.rows[:place])
    if row.kind == "baseline":
        return f"baseline{number}"
    number -= _bases(found)
    return "base" if number < 0 else f"parent{number % COLORS}"


def _bases(found: Exploration) -> int:
    """1 where there is a base among the parents."""
    return sum(row.kind == "parent" for row in found.rows) - len(found.models)


def _ratio(found: Exploration, place: int, model: int) -> float:
    """The ratio of a model in a row; NaN where it has none."""
    row, own = found.rows[place], place - _bases(found)
    if row.kind == "parent":
        return float(own == model) if own >= 0 else math.nan
    return 1 / len(found.models) if row.name == "equal ratios" else math.nan
