"""What a search may change of a recipe, and in which range.

A point of the unit cube stands for the values of the fields that are searched; ratios
take K − 1 of its dimensions, uniform on the simplex.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from m3jax.methods import METHODS, TRANSFORMS
from m3jax.methods.fields import Number, Weights
from m3jax.recipe import Recipe, RecipeError

Values = Mapping[str, tuple[float, ...]]  # field -> its numbers

_USE = (
    "ratios, seed, or a number of the recipe such as scaling, trim_rate, drop_rate (of "
    "all models) or drop_rates (of each), with a range as in scaling=0.5:1.5"
)


class _Target(NamedTuple):
    """A number of a recipe: which step's, and whether each model has its own."""

    step: str
    field: str
    each: bool


@dataclasses.dataclass(frozen=True)
class Space:
    """The fields that are searched.

    Attributes:
      num_models: K.
      ranges: of each field, in the order of the dimensions.
      new_seeds: every trial has a seed of its own.
    """

    num_models: int
    ranges: Mapping[str, tuple[float, float]]
    new_seeds: bool = False

    @classmethod
    def parse(cls, fields: Sequence[str], recipe: Recipe, num_models: int) -> Space:
        """Reads fields such as ``ratios`` and ``scaling=0.5:1.5``.

        Raises:
          RecipeError: a field is unknown, has no effect, or its range is wrong.
        """
        ranges: dict[str, tuple[float, float]] = {}
        for field in fields:
            name, equals, text = (part.strip() for part in field.partition("="))
            target = None if name in ("ratios", "seed") else _target(name)
            known = target is not None or name in ("ratios", "seed")
            if not known or name in ranges:
                raise RecipeError(f"search={field!r} needs each once of {_USE}")
            ranges[name] = (0.0, 1.0) if target is None else _default_range(target)
            if equals:
                ranges[name] = _range(name, text, target is not None)
        new_seeds = ranges.pop("seed", None) is not None
        space = cls(num_models, ranges, new_seeds)
        space._check(recipe)
        return space

    @property
    def dimensions(self) -> int:
        return sum(map(self._width, self.ranges))

    def values(self, point: Sequence[float]) -> Values:
        """The values at a point of the unit cube."""
        found: dict[str, tuple[float, ...]] = {}
        numbers = iter(point)
        for name, (low, high) in self.ranges.items():
            own = tuple(itertools.islice(numbers, self._width(name)))
            if name == "ratios":
                found[name] = _on_simplex(own)
            else:
                found[name] = tuple(low + (high - low) * number for number in own)
        return found

    def grid(self, most: int) -> list[Values]:
        """The finest grid of at most so many points, the ends of ranges included.

        Raises:
          RecipeError: not even the ends are so few.
        """
        levels = 2
        while self.dimensions and self._grid_size(levels + 1) <= most:
            levels += 1
        if self._grid_size(levels) > most:
            raise RecipeError(
                f"draws={most} is too few for a grid over {', '.join(self.ranges)}; "
                f"needs {self._grid_size(levels)} or more"
            )
        axes = [
            _lattice(levels, self.num_models)
            if name == "ratios"
            else [
                tuple(low + (high - low) * i / (levels - 1) for i in places)
                for places in itertools.product(range(levels), repeat=self._width(name))
            ]
            for name, (low, high) in self.ranges.items()
        ]
        return [
            dict(zip(self.ranges, chosen, strict=True))
            for chosen in itertools.product(*axes)
        ]

    def apply(self, recipe: Recipe, values: Values) -> Recipe:
        """The recipe with these values in it."""
        if "ratios" in values:
            mixup = dataclasses.replace(recipe.mixup, ratios=values["ratios"])
            recipe = dataclasses.replace(recipe, mixup=mixup)
        for name, own in values.items():
            target = _target(name, recipe)
            if target is not None:
                value = own if target.each else own[0]
                recipe = recipe.with_number(target.step, target.field, value)
        return recipe

    def _width(self, name: str) -> int:
        if name == "ratios":
            return self.num_models - 1
        target = _target(name)
        return self.num_models if target is not None and target.each else 1

    def _grid_size(self, levels: int) -> int:
        size = 1
        for name in self.ranges:
            if name == "ratios":
                size *= math.comb(levels + self.num_models - 2, self.num_models - 1)
            else:
                size *= levels ** self._width(name)
        return size

    def _check(self, recipe: Recipe) -> None:
        problems = []
        if "ratios" in self.ranges and self.num_models < 2:
            problems.append("ratios need two models or more")
        targets: dict[tuple[str, str], str] = {}
        for name in self.ranges:
            target = _target(name, recipe)
            if name == "ratios":
                continue
            if target is None or target.step not in (
                recipe.method.name,
                *TRANSFORMS,
            ):
                method = recipe.method.name
                problems.append(f"{name} does nothing in method {method}")
                continue
            same = targets.setdefault(target[:2], name)
            if same != name:
                problems.append(f"{same} and {name} exclude each other")
        if not self.dimensions and not self.new_seeds:
            problems.append(f"it is empty; give some of {_USE}")
        if problems:
            raise RecipeError(f"search: {'; '.join(problems)}")
        for bound in (0, 1):  # the recipe's own checks of what is in range
            corner = {
                name: (ends[bound],) * self._width(name)
                for name, ends in self.ranges.items()
                if name != "ratios"
            }
            self.apply(recipe, corner)


def _target(name: str, recipe: Recipe | None = None) -> _Target | None:
    """What a field's name stands for: of a recipe's steps, or of any step.

    A number that may differ between the models has a plural, which gives each its own.
    """
    steps = {**TRANSFORMS, **METHODS}
    if recipe is not None:  # the method's own number goes before another's
        steps = {recipe.method.name: METHODS[recipe.method.name], **TRANSFORMS}
    home, _, field = name.rpartition(".")
    for step, cls in steps.items():
        if home not in ("", step):
            continue
        for own, described in cls.fields().items():
            if not isinstance(described, Number) or isinstance(described, Weights):
                continue
            if field == own:
                return _Target(step, own, False)
            if field == own + "s" and described.per_model:
                return _Target(step, own, True)
    return None


def _default_range(target: _Target) -> tuple[float, float]:
    field: Any = {**TRANSFORMS, **METHODS}[target.step].fields()[target.field]
    return field.search or (field.low, field.high)


def _range(name: str, text: str, ranged: bool) -> tuple[float, float]:
    low, colon, high = text.partition(":")
    try:
        ends = (float(low), float(high))
    except ValueError:
        ends = (math.nan, math.nan)
    fits = ranged and colon and ends[0] < ends[1] and math.isfinite(ends[1])
    if not (fits and math.isfinite(ends[0])):
        raise RecipeError(f"search={name}={text!r} needs {_USE}")
    return ends


def _on_simplex(numbers: Sequence[float]) -> tuple[float, ...]:
    """K ratios of K − 1 numbers from 0 to 1; uniform where the numbers are."""
    ratios, left = [], 1.0
    for i, number in enumerate(numbers):
        part = left * (1 - (1 - number) ** (1 / (len(numbers) - i)))
        ratios.append(part)
        left -= part
    return (*ratios, max(left, 0.0))


def _lattice(levels: int, num_models: int) -> list[tuple[float, ...]]:
    """All ratios that are multiples of 1 / (levels − 1)."""
    steps = levels - 1
    return [
        tuple(place / steps for place in places)
        for places in itertools.product(range(levels), repeat=num_models)
        if sum(places) == steps
    ]
