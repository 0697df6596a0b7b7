"""The search over genotypes of "Fine, I'll Merge It Myself": for `lfs` and for `dis`.

SMAC has a random forest under Hyperband. Ours: TPE or random points; with Hyperband,
TPE is told how far each genotype came, and suggests those of the next bracket.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from m3jax.exploration.presets.setting import Setting
from m3jax.exploration.search import samplers, searches
from m3jax.exploration.search.searches import Search


def searched(
    setting: Setting, draw: samplers.Draws, first: Sequence[samplers.Pick]
) -> tuple[Search, int]:
    """The search, and how many trials it makes at most.

    Args:
      setting: says the sampler, ``tpe`` or ``random``, and how many draws.
      draw: makes proposals of values of its space.
      first: points to begin with.
    """
    at_random = setting.sampler == "random"
    brackets = searches.brackets(
        setting.draws,
        setting.budget,
        generation=None if at_random else setting.generation,
        hyperband=setting.hyperband,
    )
    if at_random:
        count, space = searches.draws(brackets), draw.space
        assert space is not None
        points = samplers.points("random", space, count, setting.seed)
        listed = [*map(space.picked, first), *points][:count]
        search = searches.in_brackets(
            dataclasses.replace(draw, listed=listed), brackets
        )
    else:
        search = samplers.optimised(
            "tpe", draw, setting.objective, brackets, first=first
        )
    return search, searches.total(brackets)
