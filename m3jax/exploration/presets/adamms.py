"""AdaMMS, arXiv 2503.23733: the ratio at which answers change least, without labels.

α · the first model + (1 − α) · the second, for α = 0.4, 0.5 … 1.0; the winner is the α
whose answers differ least from those of both its neighbours, the two numbers added, as
the paper has it (`m3jax.search.response_stability`); scores are reported and not looked
at. The paper has some 100 samples. Ours: the least α where several are the best.

Models of two architectures are brought together before, by `m3jax.keymap`.
"""

from __future__ import annotations

from m3jax.exploration.presets.setting import Plan, Setting
from m3jax.exploration.search.searches import Search
from m3jax.recipe import RecipeError
from m3jax.search import response_stability

ALPHAS = tuple(a / 10 for a in range(4, 11))


def plan(setting: Setting) -> Plan:
    """Seven trials, whatever `draws` is."""
    setting.check_averages()
    if setting.num_models != 2:
        raise RecipeError(
            f"preset={setting.name!r} needs 2 models, the target first; "
            f"{setting.num_models} are given"
        )
    return Plan(_search(setting), len(ALPHAS), setting.objective, answers=True)


def _search(setting: Setting) -> Search:
    trials = yield [
        setting.averaged(i, (alpha, 1 - alpha)) for i, alpha in enumerate(ALPHAS)
    ]
    answers = [
        [text for own in (trial.answers or {}).values() for text in own]
        for trial in trials
    ]
    best = response_stability(answers, ALPHAS).best[0]
    return trials[ALPHAS.index(best)]
