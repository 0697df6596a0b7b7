"""AdaMMS's choice without labels, arXiv 2503.23733, of draws that differ in λ."""

from __future__ import annotations

import math
from collections.abc import Sequence

from m3jax.exploration.search.samplers import LISTED
from m3jax.exploration.search.searches import Search
from m3jax.exploration.search.trials import Trial
from m3jax.recipe import Recipe, RecipeError
from m3jax.search.stability import most_stable

SELECTORS = ("scores", "answers")


def check(
    *,
    sampler: str,
    search: Sequence[str],
    recipe: Recipe,
    num_models: int,
    draws: int,
    halves: bool,
) -> None:
    """Raises RecipeError unless the draws have an order, and one alone: λ's."""
    needs = "selector='answers' compares each merge with its neighbours in λ; it needs"
    if num_models != 2:
        raise RecipeError(f"{needs} 2 models, and {num_models} are given")
    if not recipe.mixup.on:
        raise RecipeError(f"{needs} draws of λ; set mixup.alpha")
    if draws < 3:
        raise RecipeError(f"{needs} 3 draws or more, not {draws}")
    if sampler not in LISTED:
        raise RecipeError(
            f"{needs} one of the samplers {', '.join(LISTED)}; {sampler} goes by scores"
        )
    if sampler != "recipe" and set(search) - {"ratios", "seed"}:
        raise RecipeError(f"{needs} search=['ratios'] and no more, not {list(search)}")
    if halves:
        raise RecipeError(f"{needs} all of them evaluated alike, without halving")


def by_answers(search: Search) -> Search:
    """The search, won by the draw whose answers change least around its λ.

    See `m3jax.search.stability.most_stable`. A draw that scores NaN is left out.

    Raises:
      RecipeError: fewer than three λ differ.
    """
    trials: list[Trial] = []
    try:
        asked = next(search)
        while True:
            found = yield asked
            trials += found
            asked = search.send(found)
    except StopIteration:
        pass
    sound = [own for own in trials if not math.isnan(own.objective)]
    answers = [
        [text for own in (trial.answers or {}).values() for text in own]
        for trial in sound
    ]
    ratios = [(trial.mean_ratios or (0.0,))[0] for trial in sound]
    try:
        return sound[most_stable(answers, ratios)]
    except ValueError as error:
        raise RecipeError(f"selector='answers': {error}; ask for more draws") from None
