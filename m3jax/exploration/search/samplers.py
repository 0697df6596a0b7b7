"""Which recipe and seed each trial has.

Every sampler is a function of the exploration's seed and of what it was told, so that
an exploration that goes on asks for the same trials once more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from m3jax import prng
from m3jax.exploration.space import Space, Values
from m3jax.recipe import Recipe, RecipeError

SAMPLERS = ("recipe", "grid", "sobol", "tpe", "cmaes")
ADAPTIVE = ("tpe", "cmaes")


@dataclasses.dataclass(frozen=True)
class Proposal:
    """A merge: recipe and seed fix every number of it."""

    recipe: Recipe
    seed: int


@dataclasses.dataclass
class Sampler:
    """Proposes trials, in order.

    Attributes:
      recipe: to start from; all of it but what is searched stays.
      seed: of the exploration.
      count: of the trials.
      generation: how many may be asked for before the first of them is told of.
      space: what is searched; None: nothing.
      listed: the values of each trial, where they are known beforehand.
    """

    recipe: Recipe
    seed: int
    count: int
    generation: int
    space: Space | None = None
    listed: Sequence[Values] = ()

    def ask(self, index: int) -> Proposal:
        """The trial of this index; asked for in order."""
        if self.space is None:
            return Proposal(self.recipe, trial_seed(self.seed, index))
        new = self.space.new_seeds
        seed = trial_seed(self.seed, index) if new else self.seed
        return Proposal(self.space.apply(self.recipe, self._values(index)), seed)

    def tell(self, index: int, objective: float) -> None:
        """What came of it, higher being better; NaN if nothing did."""

    def _values(self, index: int) -> Values:
        return self.listed[index]


def make_sampler(
    name: str,
    recipe: Recipe,
    space: Space | None,
    draws: int,
    seed: int,
    generation: int = 1,
) -> Sampler:
    """The sampler of a name.

    Args:
      name: one of SAMPLERS.
      recipe: to start from; all of it but what is searched stays.
      space: what is searched; None for ``recipe``, which searches nothing.
      draws: the number of trials; a grid has at most so many.
      seed: of the exploration.
      generation: of ``tpe`` and ``cmaes``; the others are not told of anything.

    Raises:
      RecipeError: the sampler does not fit the recipe, or needs another package.
    """
    if name not in SAMPLERS:
        raise RecipeError(f"sampler={name!r} needs one of {', '.join(SAMPLERS)}")
    if name == "recipe":  # its own Beta or Dirichlet: as it is, with a seed a trial
        fixed = recipe.mixup.ratios is not None or not recipe.mixup.alpha
        masked = any(step.draws for step in recipe.transforms)
        if fixed and not masked and draws > 1:
            raise RecipeError(
                "nothing is drawn: the recipe has fixed ratios, or mixup.alpha is 0 or "
                "None, and nothing random before the method; set mixup.alpha, or "
                "choose another sampler"
            )
        return Sampler(recipe, seed, draws, draws)
    assert space is not None
    if name != "grid" and space.dimensions == 0:
        raise RecipeError(f"sampler={name!r} needs more to search than seeds")
    if name in ADAPTIVE:
        return _Asked(name, recipe, space, draws, seed, generation)
    listed = space.grid(draws) if name == "grid" else _sobol(space, draws, seed)
    return Sampler(recipe, seed, len(listed), len(listed), space, listed)


def trial_seed(seed: int, index: int) -> int:
    """The second word of ``fold_in(fold_in(key(seed), 2), index)``."""
    key = prng.fold_in(prng.fold_in(prng.root_key(seed), prng.TRIALS), index)
    return int(key[1])


class _Asked(Sampler):
    """Values that optuna's ask and tell suggest."""

    def __init__(
        self,
        name: str,
        recipe: Recipe,
        space: Space,
        draws: int,
        seed: int,
        generation: int,
    ):
        super().__init__(recipe, seed, draws, generation, space)
        self._optuna = _import_optuna(name)
        samplers = self._optuna.samplers
        made = samplers.TPESampler if name == "tpe" else samplers.CmaEsSampler
        self._study = self._optuna.create_study(
            sampler=made(seed=seed), direction="maximize"
        )
        unit = self._optuna.distributions.FloatDistribution(0.0, 1.0)
        self._dimensions = {f"x{i}": unit for i in range(space.dimensions)}
        self._space = space
        self._asked: dict[int, Any] = {}  # optuna's trials that it was not told of

    def _values(self, index: int) -> Values:
        asked = self._asked[index] = self._study.ask(self._dimensions)
        return self._space.values([asked.params[name] for name in self._dimensions])

    def tell(self, index: int, objective: float) -> None:
        asked = self._asked.pop(index)
        if math.isfinite(objective):
            self._study.tell(asked, objective)
        else:
            self._study.tell(asked, state=self._optuna.trial.TrialState.FAIL)


def _sobol(space: Space, draws: int, seed: int) -> list[Values]:
    """Scrambled Sobol points; the first of them are the same for any number."""
    import numpy as np
    from scipy.stats import qmc

    engine = qmc.Sobol(space.dimensions, rng=np.random.default_rng(seed))
    points = engine.random_base2(math.ceil(math.log2(draws)))
    return [space.values(point.tolist()) for point in points[:draws]]


def _import_optuna(name: str) -> Any:
    try:
        import optuna

        if name == "cmaes":
            import cmaes  # noqa: F401 - optuna imports it when it is too late
    except ImportError as error:
        raise RecipeError(
            f"sampler={name!r} needs {error.name}; install it from a checkout: "
            "pip install '.[explore]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
