"""What is wrong with a recipe: collected, and raised once."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from typing import Any

from m3jax.methods.fields import Number
from m3jax.traced import is_traced


class RecipeError(ValueError):
    """A field of the recipe is unknown, out of range, or does not fit the run."""


class Problems:
    """Collects what is wrong with a recipe, to raise it once."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def __bool__(self) -> bool:
        return bool(self._lines)

    def add(self, field: str, value: object, allowed: str) -> None:
        """Notes that `field` holds `value`, and what it needs instead."""
        self.line(f"{field}={value!r} needs {allowed}")

    def line(self, text: str) -> None:
        """Notes what is wrong in words of the caller's."""
        self._lines.append(text)

    def choice(self, field: str, value: object, allowed: tuple[str, ...]) -> None:
        if value not in allowed:
            self.add(field, value, "one of " + ", ".join(allowed))

    def number(self, field: str, value: object, low: float = -math.inf) -> None:
        described = Number("", None, low=low)
        if not described.fits(value):
            self.add(field, value, described.allowed)

    def numbers(self, field: str, values: object) -> None:
        if is_traced(values):
            return
        if not isinstance(values, tuple) or not values:
            self.add(field, values, "a tuple of numbers, one per model")
            return
        for i, value in enumerate(values):
            self.number(f"{field}[{i}]", value)

    def patterns(self, field: str, values: object) -> None:
        if not isinstance(values, tuple):
            self.add(field, values, "a tuple of regular expressions, as ('lm_head.*',)")
            return
        for i, value in enumerate(values):
            try:
                re.compile(value)
            except (re.error, TypeError):
                self.add(f"{field}[{i}]", value, "a regular expression")

    def renaming(self, field: str, values: object) -> None:
        """Notes what is no REGEX=REPLACEMENT; a "=" in the expression is none."""
        if not isinstance(values, tuple):
            self.add(field, values, "a tuple of rules, as (r'^model\\.=',)")
            return
        for i, value in enumerate(values):
            pattern, equals, new = str(value).rpartition("=")
            try:
                re.sub(pattern, new, "")
                valid = bool(equals and pattern) and isinstance(value, str)
            except (re.error, IndexError):
                valid = False
            if not valid:
                self.add(f"{field}[{i}]", value, "REGEX=REPLACEMENT, as for re.sub")

    def raise_if_any(self) -> None:
        if self._lines:
            raise RecipeError("; ".join(self._lines))


def plain(value: Any) -> Any:
    """Lists as tuples, and arrays of NumPy and JAX as Python's numbers.

    What a transformation of JAX goes through stays as it is.
    """
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return tuple(map(plain, value))
    if is_traced(value) or not hasattr(value, "tolist"):
        return value
    return plain(value.tolist())


def nearest(word: Any, known: Iterable[str]) -> str:
    """For the end of an error: the right word that is meant, or all there are."""
    near = difflib.get_close_matches(str(word), known, 1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(sorted(known))}"
