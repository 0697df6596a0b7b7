"""Elements of a page, scales and ticks; whatever is not an element is escaped."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Sequence


def text(content: object) -> str:
    """Text of anybody as text of a page; what cannot be seen becomes `?`."""
    own = "".join(c if c.isprintable() else "?" for c in str(content))
    return html.escape(own)


def element(tag: str, *children: str, **attributes: object) -> str:
    """An element of a page.

    Args:
      tag: its name.
      children: elements, or what `text` returned.
      attributes: `_` stands for `-`; of ``class_`` it is left out. None: not there.
    """
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{text(_short(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    return f"<{tag}{given}>{''.join(children)}</{tag}>"


def path(points: Sequence[tuple[float, float]]) -> str:
    """Straight lines through points, for the attribute ``d``."""
    return "M" + "L".join(f"{_short(x)} {_short(y)}" for x, y in points)


@dataclasses.dataclass(frozen=True)
class Scale:
    """Places numbers on a line.

    Attributes:
      low, high: the numbers at its ends.
      start, end: the pixels at its ends.
      ticks: number and label.
    """

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[tuple[float, str], ...]

    def __call__(self, number: float) -> float:
        part = (number - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)


def scale(
    numbers: Sequence[float], options: Sequence[str], start: float, end: float
) -> Scale:
    """A scale that has room for all numbers; for words, with each of them as a tick."""
    if options:
        ticks = tuple((float(i), name) for i, name in enumerate(options))
        return Scale(-0.5, len(options) - 0.5, start, end, ticks)
    finite = [number for number in numbers if math.isfinite(number)] or [0.0]
    low, high = min(finite), max(finite)
    margin = (high - low) * 0.08 or abs(low) * 0.1 or 1.0
    return Scale(low - margin, high + margin, start, end, ticks_of(low, high))


def ticks_of(low: float, high: float, most: int = 5) -> tuple[tuple[float, str], ...]:
    """Multiples of 1, 2 or 5 times a power of ten, from low to high."""
    if not high - low > 1e-300:
        return ((low, f"{low:.4g}"),)
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(s * step for s in (1, 2, 5, 10, 20) if (high - low) / step / s <= most)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    places = range(first, last + 1)
    style = "e" if digits > 6 or abs(high) >= 1e6 or abs(low) >= 1e6 else "f"
    digits = 2 if style == "e" else digits
    return tuple((i * step, f"{i * step or 0.0:.{digits}{style}}") for i in places)


def _short(value: object) -> str:
    """A number of pixels, or a word."""
    return str(round(value, 2)) if isinstance(value, float) else str(value)
