"""The fields of a search: a number, a word or the ratios, and what each may be."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from m3jax.methods import METHODS, TRANSFORMS
from m3jax.methods.fields import Choice, Field, Number, Weights
from m3jax.recipe import Recipe, RecipeError

USE = (
    "ratios, seed, method=ties|average, or a field of the recipe such as scaling, "
    "trim_rate, dare.strategy, drop_rate (of all models) or drop_rates (of each), with "
    "a range as in scaling=0.5:1.5 or words as in strategy=random|magnitude"
)


class Target(NamedTuple):
    """A field of a recipe: which step's, and whether each model has its own."""

    step: str
    field: str
    each: bool


@dataclasses.dataclass(frozen=True)
class Searched:
    """A field that is searched.

    Attributes:
      name: as it was given.
      width: how many numbers of the unit interval stand for it.
      low, high: of its numbers.
      integer: they are whole.
      options: words, in the place of numbers.
    """

    name: str
    width: int = 1
    low: float = 0.0
    high: float = 1.0
    integer: bool = False
    options: tuple[Any, ...] = ()

    def target(self, recipe: Recipe) -> Target | None:
        """What it is of a recipe's steps, or of transforms it could have."""
        if self.name in ("ratios", "method"):
            return None
        return find(self.name, (recipe.method.name, *TRANSFORMS))

    def active(self, method: str | None) -> bool:
        """Whether it does anything in a method; None: the recipe's own."""
        if method is None or self.name in ("ratios", "method"):
            return True
        return find(self.name, (method, *TRANSFORMS)) is not None

    def values(self, numbers: Sequence[float]) -> tuple[Any, ...]:
        """Its values at numbers from 0 to 1."""
        if self.name == "ratios":
            return on_simplex(numbers)
        if self.options:
            last = len(self.options) - 1
            return tuple(
                self.options[min(int(number * len(self.options)), last)]
                for number in numbers
            )
        if self.integer:
            count = math.floor(self.high) - math.ceil(self.low) + 1
            return tuple(
                math.ceil(self.low) + min(int(number * count), count - 1)
                for number in numbers
            )
        return tuple(self.low + (self.high - self.low) * x for x in numbers)

    def grid(self, levels: int) -> list[tuple[Any, ...]]:
        """All its values on so many levels; of words, all."""
        if self.options:
            return list(itertools.product(self.options, repeat=self.width))
        step = (self.high - self.low) / (levels - 1)
        ends = [self.low + step * i for i in range(levels)]
        ends = sorted({float(round(x)) for x in ends}) if self.integer else ends
        return list(itertools.product(ends, repeat=self.width))


def parse(
    fields: Sequence[str], recipe: Recipe, num_models: int
) -> tuple[dict[str, Searched], bool]:
    """The fields by name, the method first; and whether each trial has its own seed.

    Raises:
      RecipeError: a field is unknown or comes twice, or its range is wrong.
    """
    texts: dict[str, str] = {}
    for given in fields:
        name, _, text = (part.strip() for part in given.partition("="))
        if name in texts:
            raise RecipeError(f"search={given!r} needs each once of {USE}")
        texts[name] = text
    new_seeds = texts.pop("seed", None) is not None
    found: dict[str, Searched] = {}
    if "method" in texts:
        words = tuple(texts.pop("method").split("|"))
        unknown = [word for word in words if word not in METHODS]
        if unknown or len(words) < 2:
            raise RecipeError(
                f"search=method={'|'.join(words)!r} needs two methods or more of "
                f"{', '.join(METHODS)}"
            )
        found["method"] = Searched("method", options=words)
    methods = found["method"].options if found else (recipe.method.name,)
    for name, text in texts.items():
        if name == "ratios" and not text:
            found[name] = Searched("ratios", width=num_models - 1)
            continue
        target = find(name, (*methods, *TRANSFORMS, *METHODS))
        if target is None:
            raise RecipeError(f"search={name!r} needs each once of {USE}")
        field = {**TRANSFORMS, **METHODS}[target.step].fields()[target.field]
        width = num_models if target.each else 1
        found[name] = _described(name, text, field, width)
    return found, new_seeds


def find(name: str, steps: Sequence[str]) -> Target | None:
    """What a field's name stands for: of the first step that has it.

    A number that may differ between the models has a plural, which gives each its own.
    """
    home, _, field = name.rpartition(".")
    for step in dict.fromkeys(steps):
        if home not in ("", step):
            continue
        for own, described in {**TRANSFORMS, **METHODS}[step].fields().items():
            if isinstance(described, Weights):
                continue
            if field == own:
                return Target(step, own, False)
            per_model = isinstance(described, Number) and described.per_model
            if field == own + "s" and per_model:
                return Target(step, own, True)
    return None


def _described(name: str, text: str, field: Field, width: int) -> Searched:
    if isinstance(field, Choice):
        words = {str(option): option for option in field.options}
        chosen = text.split("|") if text else list(words)
        if len(chosen) < 2 or not set(chosen) <= set(words):
            raise RecipeError(
                f"search={name}={text!r} needs two or more of {'|'.join(words)}"
            )
        return Searched(name, width, options=tuple(words[word] for word in chosen))
    assert isinstance(field, Number)
    low, high = field.search or (field.low, field.high)
    if text:
        low, high = _range(name, text)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise RecipeError(f"search={name!r} needs a range, as in {name}=0:1")
    return Searched(name, width, low, high, field.integer)


def _range(name: str, text: str) -> tuple[float, float]:
    low, colon, high = text.partition(":")
    try:
        ends = (float(low), float(high))
    except ValueError:
        ends = (math.nan, math.nan)
    finite = math.isfinite(ends[0]) and math.isfinite(ends[1])
    if not (colon and finite and ends[0] < ends[1]):
        raise RecipeError(f"search={name}={text!r} needs {USE}")
    return ends


def on_simplex(numbers: Sequence[float]) -> tuple[float, ...]:
    """K ratios of K − 1 numbers from 0 to 1; uniform where the numbers are."""
    ratios, left = [], 1.0
    for i, number in enumerate(numbers):
        part = left * (1 - (1 - number) ** (1 / (len(numbers) - i)))
        ratios.append(part)
        left -= part
    return (*ratios, max(left, 0.0))


def lattice(levels: int, num_models: int) -> list[tuple[float, ...]]:
    """All ratios that are multiples of 1 / (levels − 1)."""
    steps = levels - 1
    return [
        tuple(place / steps for place in places)
        for places in itertools.product(range(levels), repeat=num_models)
        if sum(places) == steps
    ]
