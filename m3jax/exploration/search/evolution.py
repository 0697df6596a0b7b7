"""CMA-ES over points of the unit cube, a generation at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from m3jax.exploration.search.searches import Search
from m3jax.exploration.search.trials import Proposal
from m3jax.recipe import RecipeError


def evolve(
    make: Callable[[int, np.ndarray], Proposal],
    start: Sequence[float],
    *,
    first: int,
    draws: int,
    seed: int,
    sigma: float,
    population: int | None = None,
) -> Search:
    """Maximises the objective from a point, generation after generation.

    Args:
      make: the draw of an index at a point.
      start: the mean of the first generation, two numbers or more, each in [0, 1].
      first: index of the first draw.
      draws: the index to stop before; the last generation may be cut short.
      seed: 0 <= seed < 2**32.
      sigma: the first step size.
      population: of a generation; None: 4 + ⌊3 ln n⌋.

    Raises:
      RecipeError: the package cmaes is missing.
    """
    cma = import_cmaes().CMA(
        mean=np.asarray(start, np.float64),
        sigma=sigma,
        bounds=np.tile([0.0, 1.0], (len(start), 1)),
        population_size=population,
        seed=seed,
    )
    index = first
    while index < draws:
        count = min(cma.population_size, draws - index)
        points = [cma.ask() for _ in range(count)]
        trials = yield [make(index + i, point) for i, point in enumerate(points)]
        index += count
        if count == cma.population_size:
            lost = [-t.objective for t in trials]
            costs = [math.inf if math.isnan(cost) else cost for cost in lost]
            cma.tell(list(zip(points, costs, strict=True)))
    return None


def import_cmaes() -> Any:
    """The package that CMA-ES is of."""
    try:
        import cmaes
    except ImportError:
        raise RecipeError(
            "this preset needs cmaes; install it from a checkout: "
            "pip install '.[explore]'"
        ) from None
    return cmaes
