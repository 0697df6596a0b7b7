"""M3, arXiv 2502.15434: ratios from Beta(α, α), for K models Dirichlet(α, …, α).

The draws of the recipe, each with a seed of its own; what `explore` does without a
preset. Successive halving and Hyperband, ours, may stand over them.
"""

from __future__ import annotations

from m3jax.exploration.presets.setting import Plan, Setting
from m3jax.exploration.search.make import make_search


def plan(setting: Setting) -> Plan:
    """So many draws of the recipe."""
    search, total = make_search(
        "recipe",
        setting.recipe,
        None,
        setting.objective,
        draws=setting.draws,
        seed=setting.seed,
        generation=1,
        budget=setting.budget,
        halving=setting.halving,
        hyperband=setting.hyperband,
        tasks=setting.tasks,
    )
    return Plan(search, total, setting.objective)
