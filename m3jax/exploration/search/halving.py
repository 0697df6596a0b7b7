"""Successive halving: many draws at a small budget, the best of them at larger ones.

Source: Jamieson and Talwalkar, arXiv 1502.07943; the budgets grow as the numbers fall,
so that every rung costs about the same.
"""

from __future__ import annotations

from typing import NamedTuple


class Rung(NamedTuple):
    """So many draws, each evaluated at this budget; None: all there is."""

    draws: int
    budget: int | None


def rungs(draws: int, budget: int | None, halving: int | None) -> list[Rung]:
    """The rungs of an exploration; the last one is at the full budget.

    With η = `halving`, a rung has 1/η of the draws of the one below it and η times its
    budget, down to one draw.

        >>> rungs(27, 90, 3)
        [Rung(draws=27, budget=4), Rung(draws=9, budget=10), \
Rung(draws=3, budget=30), Rung(draws=1, budget=90)]

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
