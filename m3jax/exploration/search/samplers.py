"""Which recipe and seed each trial has.

Every sampler is a function of the exploration's seed and of what it was told, so that
an exploration that goes on asks for the same trials once more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol

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


class Sampler(Protocol):
    """Proposes trials, in order.

    Attributes:
      count: of the trials.
      generation: how many may be asked for before the first of them is told of.
    """

    @property
    def count(self) -> int: ...

    @property
    def generation(self) -> int: ...

    def ask(self, index: int) -> Proposal:
        """The trial of this index; asked for in order."""
        ...

    def tell(self, index: int, objective: float) -> None:
        """What came of it, higher being better; NaN if nothing did."""
        ...


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
    if name == "recipe":
        return _Drawn(recipe, draws, seed)
    assert space is not None
    if name == "grid":
        return _Listed(recipe, space, seed, space.grid(draws))
    if space.dimensions == 0:
        raise RecipeError(f"sampler={name!r} needs more to search than seeds")
    if name == "sobol":
        return _Listed(recipe, space, seed, _sobol(space, draws, seed))
    return _Asked(name, recipe, space, draws, seed, generation)


def trial_seed(seed: int, index: int) -> int:
    """The second word of ``fold_in(fold_in(key(seed), 2), index)``."""
    key = prng.fold_in(prng.fold_in(prng.root_key(seed), prng.TRIALS), index)
    return int(key[1])


class _Drawn:
    """The recipe's own Beta or Dirichlet: the recipe as it is, a seed a trial."""

    def __init__(self, recipe: Recipe, draws: int, seed: int):
        fixed = recipe.mixup.ratios is not None or not recipe.mixup.alpha
        masked = recipe.dare.drop_rate and recipe.dare.strategy == "random"
        if fixed and not masked and draws > 1:
            raise RecipeError(
                "nothing is drawn: the recipe has fixed ratios, or mixup.alpha is 0 or "
                "None, and no random DARE; set mixup.alpha, or choose another sampler"
            )
        self._recipe, self._seed = recipe, seed
        self.count = self.generation = draws

    def ask(self, index: int) -> Proposal:
        return Proposal(self._recipe, trial_seed(self._seed, index))

    def tell(self, index: int, objective: float) -> None:
        pass


class _Listed:
    """Values that are known beforehand."""

    def __init__(
        self, recipe: Recipe, space: Space, seed: int, values: Sequence[Values]
    ):
        self._recipe, self._space, self._seed = recipe, space, seed
        self._values = values
        self.count = self.generation = len(values)

    def ask(self, index: int) -> Proposal:
        recipe = self._space.apply(self._recipe, self._values[index])
        return Proposal(recipe, _seed(self._space, self._seed, index))

    def tell(self, index: int, objective: float) -> None:
        pass


class _Asked:
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
        self._optuna = _import_optuna(name)
        samplers = self._optuna.samplers
        made = (samplers.TPESampler if name == "tpe" else samplers.CmaEsSampler)(
            seed=seed
        )
        self._study = self._optuna.create_study(sampler=made, direction="maximize")
        unit = self._optuna.distributions.FloatDistribution(0.0, 1.0)
        self._dimensions = {f"x{i}": unit for i in range(space.dimensions)}
        self._recipe, self._space, self._seed = recipe, space, seed
        self.count, self.generation = draws, generation
        self._asked: dict[int, Any] = {}  # optuna's trials that it was not told of

    def ask(self, index: int) -> Proposal:
        asked = self._asked[index] = self._study.ask(self._dimensions)
        point = [asked.params[name] for name in self._dimensions]
        recipe = self._space.apply(self._recipe, self._space.values(point))
        return Proposal(recipe, _seed(self._space, self._seed, index))

    def tell(self, index: int, objective: float) -> None:
        asked = self._asked.pop(index)
        if math.isfinite(objective):
            self._study.tell(asked, objective)
        else:
            self._study.tell(asked, state=self._optuna.trial.TrialState.FAIL)


def _seed(space: Space, seed: int, index: int) -> int:
    return trial_seed(seed, index) if space.new_seeds else seed


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
            f"sampler={name!r} needs {error.name}; install it with: "
            "pip install 'm3jax[explore]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
