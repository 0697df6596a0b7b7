"""Searches of published systems, as pure functions: what to try next, and what it was.

soup = m3jax.search.greedy_soup([maths, code, law], evaluate)
brackets = m3jax.search.hyperband_brackets(100, 1000, 3)
"""

import importlib
from typing import TYPE_CHECKING, Any

# Imported when they are used, as those of `m3jax` itself.
_HOMES = {
    "clusters": "similarity",
    "dis_program": "dis",
    "dynamic_average_reward": "policy",
    "greedy_soup": "soup",
    "hyperband_brackets": "hyperband",
    "lfs_genotype": "lfs",
    "lfs_merge": "lfs",
    "lm_cocktail_weights": "objectives",
    "merge_layer_groups": "layer_groups",
    "ppo_loss": "policy",
    "ppo_returns": "policy",
    "most_stable": "stability",
    "response_stability": "stability",
    "rmm_start": "walk",
    "rmm_step": "walk",
    "selective_merge": "selective",
    "similarity_matrix": "similarity",
    "weighted_objective": "objectives",
}
__all__ = sorted(_HOMES)

if TYPE_CHECKING:
    # ruff: noqa: F401
    from m3jax.search.dis import dis_program
    from m3jax.search.hyperband import hyperband_brackets
    from m3jax.search.layer_groups import merge_layer_groups
    from m3jax.search.lfs import lfs_genotype, lfs_merge
    from m3jax.search.objectives import lm_cocktail_weights, weighted_objective
    from m3jax.search.policy import dynamic_average_reward, ppo_loss, ppo_returns
    from m3jax.search.selective import selective_merge
    from m3jax.search.similarity import clusters, similarity_matrix
    from m3jax.search.soup import greedy_soup
    from m3jax.search.stability import most_stable, response_stability
    from m3jax.search.walk import rmm_start, rmm_step


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"m3jax.search.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'm3jax.search' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
