"""Greedy soup, arXiv 2203.05482: add a model where the average then scores better.

The single models first; then, best first, each model's candidate n/(n+1) soup + 1/(n+1)
model, kept if strictly better. Agrees with `m3jax.search.greedy_soup` and so with the
loop of mlfoundations/model-soups. Ours: a soup of n models is merged at once, with
ratios of 1/n, not step by step, and of equal single scores the earlier model is first.
"""

from __future__ import annotations

from m3jax.exploration.presets.setting import Plan, Setting
from m3jax.exploration.search.searches import Search
from m3jax.search.soup import best_first


def plan(setting: Setting) -> Plan:
    """2K − 1 trials, whatever `draws` is."""
    setting.check_averages()
    return Plan(_search(setting), 2 * setting.num_models - 1, setting.objective)


def _search(setting: Setting) -> Search:
    singles = yield setting.singles()
    scores = [trial.objective for trial in singles]
    best, *others = best_first(scores)
    members, score = [best], scores[best]
    for index, k in enumerate(others, len(singles)):
        soup = [*members, k]
        ratios = [(j in soup) / len(soup) for j in range(setting.num_models)]
        (trial,) = yield [setting.averaged(index, ratios)]
        if trial.objective > score:
            members, score = soup, trial.objective
    return None
