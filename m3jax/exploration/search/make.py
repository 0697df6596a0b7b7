"""Makes the search that `explore` is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from m3jax.evaluation.evaluator import Evaluator, TaskEvaluator
from m3jax.exploration.search import samplers, searches
from m3jax.exploration.search.samplers import ADAPTIVE
from m3jax.exploration.search.scoring import Objective
from m3jax.exploration.search.searches import Search
from m3jax.exploration.space import Space
from m3jax.recipe import Recipe, RecipeError


def tasks_of(evaluator: Evaluator, objective: Objective) -> list[str]:
    """The names of the scores, as far as they are known before there are any."""
    if isinstance(evaluator, TaskEvaluator):
        return [task.name for task in evaluator.tasks]
    return list(objective.weights)


def check_sampler(
    sampler: str, generation: int, rates: Mapping[str, int | None]
) -> None:
    """Raises RecipeError where a sampler does not go with the other options."""
    if sampler not in samplers.SAMPLERS:
        names = ", ".join(samplers.SAMPLERS)
        raise RecipeError(f"sampler={sampler!r} needs one of {names}")
    if generation > 1 and sampler not in ADAPTIVE:
        raise RecipeError(
            f"generation={generation} is for the samplers {', '.join(ADAPTIVE)}; "
            f"{sampler} is told of no scores"
        )
    for name, rate in rates.items():
        learns = sampler == "tpe" and name == "hyperband"  # bracket by bracket
        if rate is not None and sampler in ADAPTIVE and not learns:
            raise RecipeError(
                f"{name}={rate} needs a sampler that is not told of scores; "
                f"{sampler} would compare those of different budgets"
            )


def make_search(
    sampler: str,
    recipe: Recipe,
    space: Space | None,
    objective: Objective,
    *,
    draws: int,
    seed: int,
    generation: int,
    budget: int | None,
    halving: int | None,
    hyperband: int | None,
    tasks: Sequence[str],
) -> tuple[Search, int]:
    """What is evaluated, and how many trials that makes."""
    if sampler in ADAPTIVE:
        if sampler == "nsga2" and len(tasks) < 2:
            raise RecipeError(
                "sampler='nsga2' needs two tasks or more, or weights that name the "
                "scores of a function"
            )
        own = samplers.Draws(recipe, seed, budget, space)
        asked = searches.brackets(
            draws, budget, generation=generation, hyperband=hyperband
        )
        found = samplers.optimised(sampler, own, objective, asked, tasks=tasks)
        return found, searches.total(asked)
    asked = searches.brackets(draws, budget, hyperband=hyperband)
    draws = searches.draws(asked)
    listed, count = samplers.listed(
        sampler, recipe, space, draws=draws, seed=seed, budget=budget
    )
    if hyperband is None:
        asked = [searches.rungs(count, budget, halving)]
    elif count < draws:
        raise RecipeError(f"hyperband needs {draws} draws, a grid has {count}")
    return searches.in_brackets(listed, asked), searches.total(asked)
