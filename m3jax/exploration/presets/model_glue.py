"""Model-GLUE, arXiv 2410.05357: clusters, selective merging, CMA-ES over layers.

1. The single models. 2. In each cluster of similar models, best first: c current +
(1 − c) next on the grid 0.1 … 0.9, the last best c, kept if at least as good; agrees
with `m3jax.search.selective_merge`. 3. CMA-ES, population 15, σ 1/6, over the cluster
that has come furthest: weights per group of consecutive layers and for what lies
outside, each row divided by its sum, as `m3jax.search.merge_layer_groups` has it.

Ours: the clusters are those of `m3jax.search.clusters` (threshold 0.95, rule `leader`),
found where the models are pytrees, and otherwise one of all; CMA-ES starts at what
selective merging found, and of equal trials the earlier is the winner; no mixture of
experts is made of the clusters. The paper's budget is 500 trials.
"""

from __future__ import annotations

import math
import re
from collections.abc import Generator, Sequence

import numpy as np

from m3jax.exploration.groups import layer_groups, num_layers
from m3jax.exploration.presets.setting import Plan, Setting
from m3jax.exploration.search.evolution import evolve, import_cmaes
from m3jax.exploration.search.searches import Search
from m3jax.exploration.search.trials import Proposal, Trial
from m3jax.exploration.space import WHOLE, Space
from m3jax.runs.inputs import is_path
from m3jax.search import clusters, similarity_matrix
from m3jax.search.soup import best_first

GRID = tuple(c / 10 for c in range(1, 10))
_INCLUDE = r"self_attn|mlp"
_THRESHOLD = 0.95
_POPULATION, _SIGMA, _GROUPS = 15, 1 / 6, 4
Step = Generator[Sequence[Proposal], Sequence[Trial], tuple[list[float], float, int]]


def plan(setting: Setting) -> Plan:
    """At most `draws` trials; CMA-ES has what selective merging leaves."""
    setting.check_averages()
    import_cmaes()
    found = _clusters(setting)
    first = setting.num_models + sum(len(GRID) * (len(own) - 1) for own in found)
    setting.check_draws(first)
    most = setting.draws if any(len(own) > 1 for own in found) else first
    layers = num_layers(setting.tensors)
    count = setting.groups or min(_GROUPS, layers)
    groups = layer_groups(setting.tensors, count, outside=True) if count else WHOLE
    space = Space.parse(["ratios"], setting.recipe, setting.num_models, groups)
    return Plan(_search(setting, space, found), most, setting.objective)


def _search(setting: Setting, space: Space, found: Sequence[Sequence[int]]) -> Search:
    singles = yield setting.singles()
    index, reached = len(singles), []
    for cluster in found:
        weights, score, index = yield from _selected(setting, singles, cluster, index)
        reached.append((cluster, weights, score))
    at = best_first([score for _, _, score in reached])[0]
    cluster, weights, _ = reached[at]
    if len(cluster) < 2:
        return None
    count = len(space.groups)

    def proposal(index: int, point: np.ndarray) -> Proposal:
        values = {}
        for g, row in enumerate(point.reshape(count, len(cluster))):
            ratios = np.zeros(setting.num_models)
            ratios[list(cluster)] = row / row.sum() if row.sum() else 1 / len(row)
            values[space.label(g, "ratios")] = tuple(ratios.tolist())
        recipe = space.apply(setting.recipe, values)
        return Proposal(index, recipe, setting.seed, setting.budget)

    yield from evolve(
        proposal,
        [weights[k] for k in cluster] * count,
        first=index,
        draws=setting.draws,
        seed=setting.seed,
        sigma=_SIGMA,
        population=_POPULATION,
    )
    return None


def _selected(
    setting: Setting, singles: Sequence[Trial], cluster: Sequence[int], index: int
) -> Step:
    """Weights of all models, their score, and the next trial's index."""
    places = best_first([singles[k].objective for k in cluster])
    first, *others = (cluster[place] for place in places)
    weights, score = setting.one_hot()[first], singles[first].objective
    for k in others:
        rows = [[c * w for w in weights] for c in GRID]
        for c, row in zip(GRID, rows, strict=True):
            row[k] = 1 - c
        asked = [setting.averaged(index + i, row) for i, row in enumerate(rows)]
        trials = yield asked
        index += len(trials)
        scores = [_or_worst(trial.objective) for trial in trials]
        reached = max(scores)
        if reached >= _or_worst(score):
            last = max(i for i, own in enumerate(scores) if own == reached)
            weights, score = rows[last], reached
    return weights, score, index


def _clusters(setting: Setting) -> list[list[int]]:
    if any(map(is_path, setting.models)):
        return [list(range(setting.num_models))]
    include = _INCLUDE
    if not any(re.search(include, name) for name in setting.tensors):
        include = ""
    similar = similarity_matrix(setting.models, include=include)
    return clusters(similar, _THRESHOLD)


def _or_worst(score: float) -> float:
    return -math.inf if math.isnan(score) else score
