"""What charts are made of: marks, lines, labels, and what is told of a draw."""

from __future__ import annotations

import math
from collections.abc import Sequence

from m3jax.exploration.report.html.axes import Axis
from m3jax.exploration.report.html.svg import element, path, text
from m3jax.exploration.search.result import Exploration

SHOWN = 8  # words of an axis that have room
_LONGEST = 26  # characters of a name
_CORNERS = ((-1, -1), (1, -1), (1, 1), (-1, 1))


def picture(name: str, width: float, height: float, parts: Sequence[str]) -> str:
    box = f"0 0 {width:.0f} {height:.0f}"
    size = {"width": f"{width:.0f}", "height": f"{height:.0f}"}
    return element("svg", *parts, viewBox=box, role="img", aria_label=name, **size)


def mark(style: str, x: float, y: float, told: str = "") -> str:
    """A diamond for a parent, a square for a baseline, a triangle for another."""
    far = 5.5
    corners = [(x - far, y), (x, y - far), (x + far, y), (x, y + far)]
    if style.startswith("baseline"):
        far = 4.5
        corners = [(x + a * far, y + b * far) for a, b in _CORNERS]
    if style == "baseline1":
        corners = [(x, y - 6), (x + 6, y + 5), (x - 6, y + 5)]
    return element("path", told, class_=f"mark {style}", d=path(corners) + "Z")


def star(x: float, y: float) -> list[tuple[float, float]]:
    return [
        (
            x + (9 if i % 2 == 0 else 4) * math.sin(math.pi * i / 5),
            y - (9 if i % 2 == 0 else 4) * math.cos(math.pi * i / 5),
        )
        for i in range(10)
    ]


def key(style: str) -> str:
    """What stands for something in the legend."""
    if style == "winner":
        own = element("path", class_="winner", d=path(star(14.0, 10.0)) + "Z")
    elif style in ("draw", "draw marked"):
        own = element("circle", class_=style, cx=14, cy=10, r=4)
    else:
        own = line(f"row {style}", 0.0, 10.0, 28.0, 10.0)
        own += "" if style == "base" else mark(style, 14.0, 10.0)
    return element("svg", own, viewBox="0 0 28 20", class_="key", aria_hidden="true")


def line(
    style: str, x1: float, y1: float, x2: float, y2: float, *, told: str = ""
) -> str:
    return element("line", told, class_=style, x1=x1, y1=y1, x2=x2, y2=y2)


def label(own: str, x: float, y: float, anchor: str, style: str = "tick") -> str:
    return element("text", text(own), class_=style, x=x, y=y, text_anchor=anchor)


def short(name: str, longest: int = _LONGEST) -> str:
    """A long name's end, which tells it from others."""
    return name if len(name) <= longest else "…" + name[1 - longest :]


def told(found: Exploration, draw: int, axes: Sequence[Axis]) -> str:
    parts = [f"{axis.name} {axis.shown(draw)}" for axis in axes]
    return f"draw {found.draws[draw].index}: " + ", ".join(parts)


def winner_of(found: Exploration) -> int:
    """The winner's place among the draws."""
    return [draw.index for draw in found.draws].index(found.winner.index)
