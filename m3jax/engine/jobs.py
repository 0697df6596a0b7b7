"""Which program merges which tensors: a job for each variant of the recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from m3jax.engine.kernel import Program
from m3jax.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Job:
    """The tensors that are merged alike.

    Attributes:
      recipe: without rules; its numbers go to the program.
      places: of the tensors, among all of the merge.
      label: of the rule, in front of what is kept of it: "" or "rule 1: ".
    """

    recipe: Recipe
    places: tuple[int, ...]
    label: str

    @property
    def program(self) -> Program:
        return Program.of(self.recipe)


def jobs(recipe: Recipe, merged: Iterable[tuple[int, str]]) -> tuple[Job, ...]:
    """The jobs of a merge, in order of the recipe's rules.

    Args:
      recipe: with its rules.
      merged: place and name of each tensor that is merged.
    """
    places: list[list[int]] = [[] for _ in recipe.variants]
    for place, name in merged:
        places[recipe.variant_of(name)].append(place)
    return tuple(
        Job(own, tuple(found), f"rule {i}: " if i else "")
        for i, (own, found) in enumerate(zip(recipe.variants, places, strict=True))
    )
