"""What a search may change of a recipe, and in which range.

A point of the unit cube stands for the values of the fields that are searched; ratios
take K − 1 of its dimensions, uniform on the simplex, and a word takes one, cut into
equal parts. With several groups of layers every field is searched for each of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from m3jax.exploration.fields import USE, Searched, lattice, parse
from m3jax.exploration.groups import Group
from m3jax.methods import METHODS
from m3jax.methods.fields import Weights
from m3jax.methods.step import Spec
from m3jax.recipe import Mixup, Recipe, RecipeError

Values = Mapping[str, tuple[Any, ...]]  # label -> numbers or words; see `Space.label`

WHOLE = (Group("", "", ""),)


class Dimension(NamedTuple):
    """One axis of the unit cube: the `place`-th number of a field in a group."""

    group: int
    field: str
    place: int


@dataclasses.dataclass(frozen=True)
class Space:
    """The fields that are searched.

    Attributes:
      num_models: K.
      fields: by name, in the order of the dimensions; a method before its numbers.
      new_seeds: every trial has a seed of its own.
      groups: of tensors, each with values of its own.
    """

    num_models: int
    fields: Mapping[str, Searched]
    new_seeds: bool = False
    groups: tuple[Group, ...] = WHOLE

    @classmethod
    def parse(
        cls,
        fields: Sequence[str],
        recipe: Recipe,
        num_models: int,
        groups: tuple[Group, ...] = WHOLE,
    ) -> Space:
        """Reads fields such as ``ratios``, ``scaling=0.5:1.5``, ``method=ties|slerp``.

        Raises:
          RecipeError: a field is unknown, has no effect, or its range is wrong.
        """
        found, new_seeds = parse(fields, recipe, num_models)
        space = cls(num_models, found, new_seeds, groups)
        space._check(recipe)
        return space

    @property
    def axes(self) -> list[Dimension]:
        """The dimensions, in order."""
        return [
            Dimension(g, name, place)
            for g in range(len(self.groups))
            for name, field in self.fields.items()
            for place in range(field.width)
        ]

    @property
    def dimensions(self) -> int:
        return len(self.axes)

    def label(self, group: int, name: str) -> str:
        """The name of a field's values: its own, behind that of its group."""
        own = self.groups[group].name
        return f"{own}:{name}" if own else name

    def values(self, point: Sequence[float]) -> Values:
        """The values at a point of the unit cube."""
        numbers = dict(zip(self.axes, point, strict=True))
        return self.picked(lambda axis, field: numbers[axis])

    def picked(self, pick: Callable[[Dimension, Searched], float]) -> Values:
        """The values at numbers from 0 to 1 that are asked for one after the other.

        Args:
          pick: gives the number of a dimension. It is not asked for numbers of a
            method that another one was chosen before.
        """
        found: dict[str, tuple[Any, ...]] = {}
        for g in range(len(self.groups)):
            method = None
            for name, field in self.fields.items():
                if not field.active(method):
                    continue
                own = [pick(Dimension(g, name, i), field) for i in range(field.width)]
                values = field.values(own)
                found[self.label(g, name)] = values
                method = values[0] if name == "method" else method
        return found

    def grid(self, most: int) -> list[Values]:
        """The finest grid of at most so many points, the ends of ranges included.

        Raises:
          RecipeError: not even the ends are so few.
        """
        levels = 2
        finer = any(not field.options for field in self.fields.values())
        while finer and self.dimensions and self._grid_size(levels + 1) <= most:
            levels += 1
        if self._grid_size(levels) > most:
            raise RecipeError(
                f"draws={most} is too few for a grid over {', '.join(self.fields)}; "
                f"needs {self._grid_size(levels)} or more"
            )
        labels = [
            self.label(g, name) for g in range(len(self.groups)) for name in self.fields
        ]
        axes = [
            lattice(levels, self.num_models) if name == "ratios" else field.grid(levels)
            for _ in self.groups
            for name, field in self.fields.items()
        ]
        points = [
            dict(zip(labels, own, strict=True)) for own in itertools.product(*axes)
        ]
        unique = {tuple(self._effective(point).items()): point for point in points}
        return [dict(point) for point in unique]

    def _effective(self, values: Values) -> Values:
        """Without the numbers of methods that another one was chosen before."""
        found = {}
        for g in range(len(self.groups)):
            method = values.get(self.label(g, "method"), (None,))[0]
            for name, field in self.fields.items():
                if field.active(method):
                    found[self.label(g, name)] = values[self.label(g, name)]
        return found

    def apply(self, recipe: Recipe, values: Values) -> Recipe:
        """The recipe with these values in it."""
        if len(self.groups) == 1:
            own = {name: values[name] for name in self.fields if name in values}
            return self._applied(recipe, own)
        plain = dataclasses.replace(recipe, mixup=Mixup(alpha=None), rules=())
        made = []
        for g, group in enumerate(self.groups):
            own = {
                name: values[self.label(g, name)]
                for name in self.fields
                if self.label(g, name) in values
            }
            ratios = own.pop("ratios", None)
            merged = self._applied(plain, own)
            if ratios is not None:
                merged = merged.with_number(merged.method.name, "weights", ratios)
            made.append((group, merged))
        (_, last) = made[-1]
        rules = tuple((group.pattern, merged.steps) for group, merged in made[:-1])
        return dataclasses.replace(last, rules=rules)

    def reading(self, recipe: Recipe) -> Recipe:
        """The recipe, with a method that reads the base if one in the space does."""
        methods = self.fields["method"].options if "method" in self.fields else ()
        readers = [name for name in methods if METHODS[name]().needs_base]
        if not readers:
            return recipe
        return dataclasses.replace(
            recipe, method=readers[0], mixup=Mixup(alpha=None), rules=()
        )

    def _applied(self, recipe: Recipe, values: Values) -> Recipe:
        if "method" in values and values["method"][0] != recipe.method.name:
            recipe = dataclasses.replace(recipe, method=values["method"][0])
        if "ratios" in values:
            mixup = dataclasses.replace(recipe.mixup, ratios=values["ratios"])
            recipe = dataclasses.replace(recipe, mixup=mixup)
        if "method" in values and not _weighs(recipe.method.name):
            recipe = dataclasses.replace(recipe, mixup=Mixup(alpha=None))
        for name, own in values.items():
            target = self.fields[name].target(recipe)
            if target is not None:
                value = own if target.each else own[0]
                recipe = recipe.with_number(target.step, target.field, value)
        return recipe

    def _grid_size(self, levels: int) -> int:
        size = 1
        for name, field in self.fields.items():
            if name == "ratios":
                size *= math.comb(levels + self.num_models - 2, self.num_models - 1)
            else:
                size *= (len(field.options) or levels) ** field.width
        return size ** len(self.groups)

    def _check(self, recipe: Recipe) -> None:
        problems = []
        for method in self.fields["method"].options if "method" in self.fields else ():
            if list(METHODS[method]().outputs(Spec((1,)), 2)) != [""]:
                problems.append(f"method {method} makes more than a model")
            if METHODS[method].beside:
                problems.append(f"method {method} reads statistics beside the models")
        if "ratios" in self.fields and self.num_models < 2:
            problems.append("ratios need two models or more")
        methods = self.fields["method"].options if "method" in self.fields else None
        chosen = methods or (recipe.method.name,)
        targets: dict[tuple[str, str], str] = {}
        for name, field in self.fields.items():
            if name in ("ratios", "method"):
                continue
            own = [
                field.target(dataclasses.replace(recipe, method=method))
                for method in chosen
            ]
            found = {target[:2] for target in own if target is not None}
            if not found:
                problems.append(f"{name} does nothing in method {' or '.join(chosen)}")
            for place in found:
                same = targets.setdefault(place, name)
                if same != name:
                    problems.append(f"{same} and {name} exclude each other")
        if not self.dimensions and not self.new_seeds:
            problems.append("it is empty; give some of " + USE)
        if "ratios" in self.fields and len(self.groups) > 1:
            for method in chosen:
                if not _weighs(method):
                    problems.append(f"method {method} has no ratios to search by group")
        if problems:
            raise RecipeError(f"search: {'; '.join(problems)}")
        for bound in (0.0, 1.0):  # the recipe's own checks of what is in range
            corner = self.picked(
                lambda axis, field: bound if field.name != "ratios" else 0.5  # noqa: B023
            )
            self.apply(recipe, corner)


def _weighs(method: str) -> bool:
    """Whether it has ratios."""
    return isinstance(METHODS[method].fields().get("weights"), Weights)
