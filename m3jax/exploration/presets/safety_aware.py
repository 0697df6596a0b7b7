"""Safety-aware merging, arXiv 2406.14563, started at LM-Cocktail's weights, 2311.13534.

Maximises Σ_i weight(type_i) · score_i, a loss counting negative; safety weighs 1 and a
task 0.3, as in the paper; a score that is not finite loses, as in
`m3jax.search.weighted_objective`. The single models first; with loss_k = −objective of
model k, the average with w = softmax(−loss / T), T = 1 as in the paper's scripts
(`m3jax.search.lm_cocktail_weights`); then CMA-ES over K weights from there, divided by
their sum.

Ours: a type is a task, its mean over examples; a task is of safety if that is in its
name, unless `weights` say otherwise; σ is 1/6; the start is a trial of its own.
"""

from __future__ import annotations

import math

import numpy as np

from m3jax.exploration.presets.setting import Plan, Setting
from m3jax.exploration.search.evolution import evolve, import_cmaes
from m3jax.exploration.search.scoring import Objective
from m3jax.exploration.search.searches import Search
from m3jax.exploration.search.trials import Proposal
from m3jax.recipe import RecipeError
from m3jax.search import lm_cocktail_weights

SAFETY, TASK, TEMPERATURE, _SIGMA = 1.0, 0.3, 1.0, 1 / 6


def plan(setting: Setting) -> Plan:
    """`draws` trials, the single models and the start among them."""
    setting.check_averages()
    import_cmaes()
    setting.check_draws(setting.num_models + 1)
    return Plan(_search(setting), setting.draws, _objective(setting))


def _objective(setting: Setting) -> Objective:
    given = setting.objective
    if given.weights:
        return given
    weights = {
        task: SAFETY if "safety" in task.lower() else TASK for task in setting.tasks
    }
    if SAFETY not in weights.values():
        raise RecipeError(
            f"preset={setting.name!r} finds no task with safety in its name; give "
            f"weights, as safety={SAFETY:g} and {TASK:g} for what is none"
        )
    return Objective(weights, given.losses)


def _search(setting: Setting) -> Search:
    singles = yield setting.singles()
    losses = [math.inf if math.isnan(t.objective) else -t.objective for t in singles]
    if not any(map(math.isfinite, losses)):
        losses = [0.0] * len(losses)
    start = np.asarray(lm_cocktail_weights(losses, temperature=TEMPERATURE), np.float64)
    yield [_proposal(setting, len(singles), start)]
    yield from evolve(
        lambda index, point: _proposal(setting, index, point),
        start.tolist(),
        first=len(singles) + 1,
        draws=setting.draws,
        seed=setting.seed,
        sigma=_SIGMA,
    )
    return None


def _proposal(setting: Setting, index: int, weights: np.ndarray) -> Proposal:
    total = float(weights.sum())
    ratios = weights / total if total else np.full(len(weights), 1 / len(weights))
    return setting.averaged(index, ratios.tolist())
