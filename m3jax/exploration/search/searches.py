"""Searches: what to evaluate next, given what came of it before.

A search is a generator. It yields proposals, a batch at a time, and is sent their
trials; when it returns, the search is over, and a trial that it returns is the winner,
in the place of the one of highest objective. The loop (`exploration.run`) knows nothing
else of it, so that a published search is a few lines:

    def halves(proposals):
        while len(proposals) > 1:
            trials = yield proposals
            proposals = [t.proposal for t in best(trials, len(proposals) // 2)]

A search is a function of the exploration's seed and of what it was sent: an exploration
that goes on asks for the same trials once more, and is sent those of the log.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple, TypeAlias

from m3jax.exploration.search.trials import Proposal, Trial, best
from m3jax.recipe import RecipeError
from m3jax.search import hyperband_brackets

Search: TypeAlias = Generator[Sequence[Proposal], Sequence[Trial], Trial | None]
Draw = Callable[[int], Proposal | None]  # the draw of an index


class Rung(NamedTuple):
    """So many draws, each evaluated at this budget; None: all there is."""

    draws: int
    budget: int | None


def in_brackets(
    draw: Draw,
    brackets: Sequence[Sequence[Rung]],
    tell: Callable[[Sequence[Trial]], None] = lambda trials: None,
) -> Search:
    """Bracket after bracket: so many draws on little, and the best of them on more.

    Args:
      draw: the draw of an index; None: one that is not to be evaluated.
      brackets: each one's rungs, from the smallest budget to the largest.
      tell: is told of the last trial of every draw of a bracket, in their order.
    """
    index = 0
    for rungs in brackets:
        places = range(index, index + rungs[0].draws)
        proposals = [own for own in map(draw, places) if own is not None]
        index += rungs[0].draws
        last: dict[int, Trial] = {}
        for rung in rungs:
            asked = [dataclasses.replace(p, budget=rung.budget) for p in proposals]
            if not asked:
                break
            trials = yield asked[: rung.draws]
            last |= {trial.index: trial for trial in trials}
            proposals = [trial.proposal for trial in best(trials, len(trials))]
        tell([last[place] for place in places if place in last])
    return None


def rungs(draws: int, budget: int | None, halving: int | None) -> list[Rung]:
    """The rungs of successive halving; the last one is at the full budget.

    With η = `halving`, a rung has 1/η of the draws of the one below it and η times its
    budget, down to one draw.

        >>> rungs(27, 90, 3)
        [Rung(draws=27, budget=4), Rung(draws=9, budget=10), \
Rung(draws=3, budget=30), Rung(draws=1, budget=90)]

    Source: Jamieson and Talwalkar, arXiv 1502.07943; the budgets grow as the numbers
    fall, so that every rung costs about the same.

    Args:
      draws: of the first rung.
      budget: the full one.
      halving: η; None: a single rung.
    """
    if halving is None:
        return [Rung(draws, budget)]
    assert budget is not None and halving > 1
    counts = [draws]
    while counts[-1] > 1:
        counts.append(max(1, counts[-1] // halving))
    found: list[Rung] = []
    for place, count in enumerate(counts):
        own = -(-budget // halving ** (len(counts) - 1 - place))
        if found and found[-1].budget == own:  # too small a budget to tell apart
            continue
        found.append(Rung(count, own))
    return found


def brackets(
    draws: int,
    budget: int | None,
    *,
    generation: int | None = None,
    hyperband: int | None = None,
) -> list[list[Rung]]:
    """What `in_brackets` is asked for.

    Args:
      draws: of all brackets, where there is no Hyperband to say how many there are.
      budget: the full one.
      generation: draws of a bracket, the last of which may have fewer; None: all.
      hyperband: η of Hyperband (arXiv 1603.06560), for budgets from 1 to the full one.
    """
    if hyperband is None:
        each = generation or draws
        return [
            [Rung(min(each, draws - first), budget)] for first in range(0, draws, each)
        ]
    assert budget is not None
    return [
        [Rung(count, max(1, math.floor(own))) for count, own in bracket]
        for bracket in hyperband_brackets(1, budget, hyperband)
    ]


def draws(brackets: Sequence[Sequence[Rung]]) -> int:
    """How many draws the brackets begin with."""
    return sum(rungs[0].draws for rungs in brackets)


def total(brackets: Sequence[Sequence[Rung]]) -> int:
    """How many trials the brackets make, at most."""
    return sum(rung.draws for rungs in brackets for rung in rungs)


def check_rate(name: str, rate: int | None) -> None:
    """Raises RecipeError unless η can divide the number of draws."""
    if rate is not None and rate < 2:
        raise RecipeError(f"{name}={rate} needs 2 or more")
