"""Where draws come from: the recipe itself, a grid, Sobol points, or an optimiser."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from m3jax import prng
from m3jax.exploration.fields import Searched
from m3jax.exploration.search import searches
from m3jax.exploration.search.scoring import Objective
from m3jax.exploration.search.searches import Rung, Search
from m3jax.exploration.search.trials import Proposal, Trial
from m3jax.exploration.space import Dimension, Space, Values
from m3jax.recipe import Recipe, RecipeError

LISTED = ("recipe", "grid", "sobol", "random")
ADAPTIVE = ("tpe", "cmaes", "gp", "nsga2")
SAMPLERS = (*LISTED, *ADAPTIVE)
Pick = Callable[[Dimension, Searched], float]  # a number from 0 to 1 of each
_PACKAGES = {"cmaes": ("cmaes",), "gp": ("torch", "scipy")}


@dataclasses.dataclass(frozen=True)
class Draws:
    """The draws of a sampler that is told of no scores, by index.

    Attributes:
      recipe: to start from; all of it but what is searched stays.
      seed: of the exploration.
      budget: of each.
      space: what is searched; None: nothing.
      listed: the values of each draw; empty: the recipe as it is, with new seeds.
    """

    recipe: Recipe
    seed: int
    budget: int | None
    space: Space | None = None
    listed: Sequence[Values] = ()

    def __call__(self, index: int) -> Proposal | None:
        if self.space is None:
            return self.proposal(index, self.recipe, new_seed=True)
        return self.with_values(index, self.listed[index])

    def with_values(self, index: int, values: Values) -> Proposal | None:
        """The draw with these values in its recipe; None: it counts as the worst."""
        assert self.space is not None
        recipe = self.space.apply(self.recipe, values)
        return self.proposal(index, recipe, new_seed=self.space.new_seeds)

    def proposal(self, index: int, recipe: Recipe, *, new_seed: bool) -> Proposal:
        seed = trial_seed(self.seed, index) if new_seed else self.seed
        return Proposal(index, recipe, seed, self.budget)


def listed(
    name: str,
    recipe: Recipe,
    space: Space | None,
    *,
    draws: int,
    seed: int,
    budget: int | None,
) -> tuple[Draws, int]:
    """The draws of a sampler that is told of no scores, and how many there are.

    Args:
      name: one of LISTED.
      recipe: to start from.
      space: what is searched; None for ``recipe``, which searches nothing.
      draws: how many; a grid has at most so many.
      seed: of the exploration.
      budget: of each.

    Raises:
      RecipeError: the sampler does not fit the recipe.
    """
    if name == "recipe":  # its own Beta or Dirichlet: as it is, with a seed a trial
        fixed = recipe.mixup.ratios is not None or not recipe.mixup.alpha
        masked = any(s.draws for own in recipe.variants for s in own.transforms)
        if fixed and not masked and draws > 1:
            raise RecipeError(
                "nothing is drawn: the recipe has fixed ratios, or mixup.alpha is 0 or "
                "None, and nothing random before the method; set mixup.alpha, or "
                "choose another sampler"
            )
        return Draws(recipe, seed, budget), draws
    assert space is not None
    if name == "grid":
        values = space.grid(draws)
    else:
        check_searches(name, space)
        values = points(name, space, draws, seed)
    return Draws(recipe, seed, budget, space, values), len(values)


def optimised(
    name: str,
    draw: Draws,
    objective: Objective,
    brackets: Sequence[Sequence[Rung]],
    *,
    tasks: Sequence[str] = (),
    first: Sequence[Pick] = (),
) -> Search:
    """Values that an optimiser of optuna's suggests, told what became of those before.

    A draw that stays behind at a smaller budget counts as worse than all at a larger
    one, and better than one that is not evaluated.

    Args:
      name: one of ADAPTIVE.
      draw: makes proposals of values.
      objective: what is maximised; `nsga2` looks at each task's part of it.
      brackets: how many are suggested at a time, and on what they are evaluated.
      tasks: whose scores `nsga2` is told of.
      first: points to begin with.

    Raises:
      RecipeError: a package is missing, or there is nothing to search but seeds.
    """
    space = draw.space
    optuna = import_optuna(f"sampler={name!r}", _PACKAGES.get(name, ()))
    assert space is not None
    check_searches(name, space)
    several = name == "nsga2"
    generation = brackets[0][0].draws
    study = optuna.create_study(
        sampler=_optuna_sampler(optuna, name, draw.seed, generation),
        directions=["maximize"] * (len(tasks) if several else 1),
    )
    for pick in first:
        study.enqueue_trial(_asked(space, pick))
    words = not isinstance(study.sampler, optuna.samplers.CmaEsSampler)
    asked: dict[int, Any] = {}

    def ask(index: int) -> Proposal | None:
        trial = study.ask()
        values = space.picked(
            lambda axis, field: _suggested(space, trial, axis, field, words)
        )
        proposal = draw.with_values(index, values)
        if proposal is None:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            asked[index] = trial
        return proposal

    def tell(trials: Sequence[Trial]) -> None:
        for own in trials:
            trial = asked.pop(own.index)
            scores = list(objective.parts(own.scores)) if several else [own.objective]
            if not all(map(math.isfinite, scores)):
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            elif own.budget == full:
                study.tell(trial, scores)
            else:
                trial.report(own.objective, step=own.budget)
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)

    full = brackets[-1][-1].budget
    return searches.in_brackets(ask, brackets, tell)


def _asked(space: Space, pick: Pick) -> dict[str, float]:
    """A point by the names that `_suggested` gives its numbers."""
    found: dict[str, float] = {}

    def kept(axis: Dimension, field: Searched) -> float:
        own, options = pick(axis, field), len(field.options)
        place = min(int(own * options), options - 1)
        found[_label(space, axis)] = place if options else own
        return own

    space.picked(kept)
    return found


def _label(space: Space, axis: Dimension) -> str:
    return f"{space.label(axis.group, axis.field)}.{axis.place}"


def _suggested(
    space: Space, trial: Any, axis: Dimension, field: Searched, words: bool
) -> float:
    """A number of the unit interval; of words, the middle of a word's part."""
    name = _label(space, axis)
    if field.options and words:
        place = trial.suggest_categorical(name, range(len(field.options)))
        return float((place + 0.5) / len(field.options))
    return float(trial.suggest_float(name, 0.0, 1.0))


def _optuna_sampler(optuna: Any, name: str, seed: int, generation: int) -> Any:
    samplers = optuna.samplers
    if name == "nsga2":
        return samplers.NSGAIISampler(seed=seed, population_size=max(2, generation))
    kinds = {
        "tpe": samplers.TPESampler,
        "cmaes": samplers.CmaEsSampler,
        "gp": samplers.GPSampler,
    }
    return kinds[name](seed=seed)


def trial_seed(seed: int, index: int) -> int:
    """The second word of ``fold_in(fold_in(key(seed), 2), index)``."""
    key = prng.fold_in(prng.fold_in(prng.root_key(seed), prng.TRIALS), index)
    return int(key[1])


def check_searches(name: str, space: Space) -> None:
    """Raises RecipeError where a sampler of points has none to choose."""
    if space.dimensions == 0:
        raise RecipeError(f"sampler={name!r} needs more to search than seeds")


def points(name: str, space: Space, draws: int, seed: int) -> list[Values]:
    """Points of the cube; the first of them are the same for any number of draws."""
    import numpy as np
    from scipy.stats import qmc

    generator = np.random.default_rng(seed)
    if name == "random":
        points = generator.random((draws, space.dimensions))
    else:  # scrambled
        engine = qmc.Sobol(space.dimensions, rng=generator)
        points = engine.random_base2(math.ceil(math.log2(draws)))
    return [space.values(point.tolist()) for point in points[:draws]]


def import_optuna(what: str, packages: Sequence[str] = ()) -> Any:
    """optuna, and that the packages are there that what is asked for needs."""
    import importlib

    try:
        import optuna

        for package in packages:
            importlib.import_module(package)  # optuna does when it is too late
    except ImportError as error:
        raise RecipeError(
            f"{what} needs {error.name}; install it from a checkout: "
            "pip install '.[explore]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
