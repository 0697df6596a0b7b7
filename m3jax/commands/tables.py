"""Lines of facts and tables, as plain text."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterable, Sequence

_LABEL = 14  # columns of a fact's label


def fact(label: str, values: str | Iterable[str]) -> list[str]:
    """A label and its values, one a line."""
    values = [values] if isinstance(values, str) else values
    return [
        f"{label if i == 0 else '':{_LABEL}}{value}".rstrip()
        for i, value in enumerate(values)
    ]


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], align: str
) -> list[str]:
    """Rows in columns.

    Args:
      header: of each column.
      rows: the cells; a row without cells is an empty line.
      align: ``<`` or ``>`` for each column.
    """
    rows = list(rows)
    widths = [
        max(len(row[i]) for row in (header, *rows) if row) for i in range(len(header))
    ]
    return [
        "  ".join(
            f"{cell:{side}{width}}"
            for cell, side, width in zip(row, align, widths, strict=False)
        ).rstrip()
        for row in (header, *rows)
    ]


def clean(text: str) -> str:
    """Text of an untrusted file with what could upset a terminal replaced."""
    return "".join(c if c.isprintable() else "?" for c in text)


def percent(part: int, whole: int) -> str:
    """A share; 0 and 100 % are said of exactly none and all alone."""
    if whole == 0:
        return "—"
    share = 100 * part / whole
    return f"{share if part in (0, whole) else min(max(share, 0.01), 99.99):.2f} %"


def number(value: float, form: str = ".4f", before: str = "") -> str:
    """A number as text; NaN is undefined."""
    return "—" if math.isnan(value) else f"{before}{value:{form}}"


def shape(sizes: tuple[int, ...]) -> str:
    """``2048 × 5632``, or ``scalar``."""
    return " × ".join(map(str, sizes)) or "scalar"


def say(line: str) -> None:
    """Tells the user how far it is, on standard error."""
    print(f"m3jax: {clean(line)}", file=sys.stderr, flush=True)


class _Said(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def say_logged(name: str) -> None:
    """Has `say` tell what a logger of this name is told."""
    logger = logging.getLogger(name)
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(_Said())
        logger.propagate = False
