"""What a preset is given, and what it makes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from m3jax.evaluation.evaluator import Evaluator
from m3jax.exploration.merger import Merger
from m3jax.exploration.search.scoring import Objective
from m3jax.exploration.search.searches import Search
from m3jax.exploration.search.trials import Proposal
from m3jax.recipe import Mixup, Recipe, RecipeError
from m3jax.search.pytrees import place_of


class Plan(NamedTuple):
    """A search, and how many trials it makes at most.

    Attributes:
      search: what is evaluated.
      total: trials.
      objective: what is maximised.
      reading: a recipe that reads what all draws together read; None: the recipe.
      answers: the search looks at what the models answer.
      merger: makes what merges, of base, models and recipe.
      notes: for the user.
    """

    search: Search
    total: int
    objective: Objective
    reading: Recipe | None = None
    answers: bool = False
    merger: Callable[[Any, Sequence[Any], Recipe], Merger] = Merger
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Everything a preset may depend on; see `m3jax.explore` for most of it.

    Attributes:
      name: of the preset.
      models: paths or pytrees.
      tensors: names of theirs.
      evaluator: that chooses.
      tasks: names of the scores, as far as they are known.
    """

    name: str
    recipe: Recipe
    has_base: bool
    models: Sequence[Any]
    tensors: Sequence[str]
    evaluator: Evaluator
    objective: Objective
    tasks: Sequence[str]
    draws: int
    seed: int
    budget: int | None
    groups: int | None
    sampler: str | None
    generation: int
    halving: int | None
    hyperband: int | None
    fraction: float | None

    @property
    def num_models(self) -> int:
        return len(self.models)

    def averaged(self, index: int, ratios: Sequence[float]) -> Proposal:
        """The average of the models with these ratios."""
        mixup = Mixup(ratios=tuple(map(float, ratios)))
        recipe = dataclasses.replace(self.recipe, method="average", mixup=mixup)
        return Proposal(index, recipe, self.seed, self.budget)

    def singles(self) -> list[Proposal]:
        """The models one by one."""
        return [self.averaged(k, row) for k, row in enumerate(self.one_hot())]

    def one_hot(self) -> list[list[float]]:
        """(K, K): the ratios of a model alone."""
        models = range(self.num_models)
        return [[float(j == k) for j in models] for k in models]

    def check_averages(self) -> None:
        """Raises RecipeError where the recipe asks for what the preset chooses."""
        own = self.recipe
        if own.method.name != "average" or own.transforms or own.rules:
            raise RecipeError(
                f"preset={self.name!r} chooses the methods itself; leave out method "
                f"{own.method.name}, rules and what stands before the method"
            )
        if self.num_models < 2:
            raise RecipeError(f"preset={self.name!r} needs two models or more")

    def check_programs(self, most: int) -> int:
        """How many layers the models have.

        Raises:
          RecipeError: the recipe asks for what the preset chooses, or the layers are
            none, more than that, or in several stacks.
        """
        self.check_averages()
        places = [place for place in map(place_of, self.tensors) if place is not None]
        stacks = {place.before for place in places}
        layers = {place.layer for place in places}
        if len(stacks) != 1 or layers != set(range(len(layers))):
            what = f"layers in {', '.join(sorted(stacks))}" if stacks else "no layers"
            raise RecipeError(
                f"preset={self.name!r} needs models of one stack of layers, as "
                f"model.layers.0…; these have {what}"
            )
        if len(layers) > most:
            raise RecipeError(
                f"preset={self.name!r} makes models of at most {most} layers; these "
                f"have {len(layers)}"
            )
        return len(layers)

    def check_draws(self, needed: int) -> None:
        """Raises RecipeError where the draws do not reach to the preset's search."""
        if self.draws < needed:
            raise RecipeError(
                f"draws={self.draws} is too few for preset={self.name!r} of "
                f"{self.num_models} models; needs {needed} or more"
            )
