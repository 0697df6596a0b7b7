"""What a search may change of a recipe, and in which range.

A point of the unit cube stands for the values of the fields that are searched; ratios
take K − 1 of its dimensions, uniform on the simplex.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

from m3jax.recipe import Recipe, RecipeError

Values = Mapping[str, tuple[float, ...]]  # field -> its numbers

# Ranges of fields where none is given.
RANGES = {
    "scaling": (0.5, 1.5),
    "trim_rate": (0.2, 0.9),
    "drop_rate": (0.0, 0.9),
    "drop_rates": (0.0, 0.9),
}
FIELDS = ("ratios", *RANGES, "seed")
_USE = (
    "ratios, seed, or scaling, trim_rate, drop_rate (of all models), drop_rates (of "
    "each), with a range as in scaling=0.5:1.5"
)


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
            if name not in FIELDS or name in ranges:
                raise RecipeError(f"search={field!r} needs each once of {_USE}")
            ranges[name] = RANGES.get(name, (0.0, 1.0))
            if equals:
                ranges[name] = _range(name, text)
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
        mixup, dare = recipe.mixup, recipe.dare
        if "ratios" in values:
            mixup = dataclasses.replace(mixup, ratios=values["ratios"])
        if "drop_rate" in values:
            dare = dataclasses.replace(dare, drop_rate=values["drop_rate"][0])
        if "drop_rates" in values:
            dare = dataclasses.replace(dare, drop_rate=values["drop_rates"])
        return dataclasses.replace(
            recipe,
            mixup=mixup,
            dare=dare,
            scaling=values.get("scaling", (recipe.scaling,))[0],
            trim_rate=values.get("trim_rate", (recipe.trim_rate,))[0],
        )

    def _width(self, name: str) -> int:
        return {"ratios": self.num_models - 1, "drop_rates": self.num_models}.get(
            name, 1
        )

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
        if "scaling" in self.ranges and recipe.method == "average":
            problems.append("scaling does nothing in method average")
        if "trim_rate" in self.ranges and recipe.method != "ties":
            problems.append(f"trim_rate does nothing in method {recipe.method}")
        if {"drop_rate", "drop_rates"} <= set(self.ranges):
            problems.append("drop_rate and drop_rates exclude each other")
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


def _range(name: str, text: str) -> tuple[float, float]:
    low, colon, high = text.partition(":")
    try:
        ends = (float(low), float(high))
    except ValueError:
        ends = (math.nan, math.nan)
    fits = name in RANGES and colon and ends[0] < ends[1] and math.isfinite(ends[1])
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
