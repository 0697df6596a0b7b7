"""RMM, arXiv 2503.21272: an agent that learns which layers make a model.

Layer by layer it takes one of a model, skips, or goes back (`m3jax.search.rmm_step`),
and is rewarded by the objective of what it made, −10 where that is nothing. Four walks
a generation, then PPO (`m3jax.search.ppo`). With `fraction` below 1 each walk is
evaluated on another part of the data, the rewards are averaged
(`m3jax.search.dynamic_average_reward`), and the best programs at last on all of it.

Ours: more than 50 layers, none, and a score that is not finite count as nothing, which
is worse than anything before; a program is not evaluated twice on the same part; parts
and averages count what is evaluated; a twentieth of the draws, 1 to 8, are for the end.
With `sampler="random"` all actions are equally likely, and nothing is learned. The
paper's budget is 700 walks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax

from m3jax import prng, programs
from m3jax.exploration.presets.setting import Plan, Setting
from m3jax.exploration.search.searches import Search
from m3jax.exploration.search.trials import Proposal
from m3jax.search import dynamic_average_reward, ppo, rmm_start, rmm_step

_MOST = 50  # layers
_BUFFER = 4  # walks
_FAILED = -10.0
Program = tuple[tuple[int, int], ...]


def plan(setting: Setting) -> Plan:
    """`draws` trials, less the walks that fail and those that were walked before."""
    layers = setting.check_programs(_MOST)
    return Plan(
        _search(setting, layers),
        setting.draws,
        setting.objective,
        reading=programs.as_recipe([(0, 0)], setting.recipe),
        notes=(
            f"of {setting.draws} walks those that make no model, or one that was "
            "evaluated before, are no trials",
        ),
    )


def _search(setting: Setting, layers: int) -> Search:
    parts = round(1 / (setting.fraction or 1))
    last = 0 if parts == 1 else min(8, max(1, setting.draws // 20))
    walks = setting.draws - last
    budget = setting.budget
    if parts > 1:
        assert budget is not None
        budget = -(-budget // parts)

    def proposal(program: Program, budget: int | None, part: int = 0) -> Proposal:
        index = draws.setdefault(program, len(draws))
        recipe = programs.as_recipe(program, setting.recipe)
        return Proposal(index, recipe, setting.seed, budget, part)

    models = setting.num_models
    root = jax.random.fold_in(jax.random.key(setting.seed), prng.WALKS)
    agent = None
    if setting.sampler != "random":
        agent = ppo.new_agent(root, layers * models, models + 2)
    draws: dict[Program, int] = {}
    found: dict[tuple[Program, int], float] = {}  # objectives, by part
    rewards: list[float] = []  # of what was evaluated
    for first in range(0, walks, _BUFFER):
        made = [
            _walk(layers, models, agent, jax.random.fold_in(root, walk))
            for walk in range(first, min(first + _BUFFER, walks))
        ]
        whole = [program for _, program in made if program]
        places = [(own, (len(rewards) + i) % parts) for i, own in enumerate(whole)]
        new = [place for place in dict.fromkeys(places) if place not in found]
        if new:
            trials = yield [proposal(own, budget, part) for own, part in new]
            found |= {
                place: trial.objective for place, trial in zip(new, trials, strict=True)
            }
        buffer: list[ppo.Step] = []
        scored = iter(places)
        for steps, program in made:
            reward = min([_FAILED, *(own - 1 for own in found.values() if own == own)])
            if program:
                score = found[next(scored)]
                rewards.append(reward if math.isnan(score) else score)
                averaged = dynamic_average_reward(
                    rewards, fraction=1 / parts, episodes=walks
                )
                reward = float(averaged[-1])
            end = steps[-1]._replace(reward=reward, terminal=True)
            buffer += [*steps[:-1], end]
        if agent is not None and len(buffer) > 1:
            agent = ppo.learn(agent, buffer)
    if last and found:
        yield [proposal(own, setting.budget) for own in _best(found)[:last]]
    return None


def _walk(
    layers: int, models: int, agent: ppo.Agent | None, key: jax.Array
) -> tuple[list[ppo.Step], Program]:
    """The steps of a walk, and its program; () where it makes no model.

    Args:
      agent: None: all actions are equally likely.
    """
    state, steps = rmm_start(layers, models), []
    if agent is None:
        drawn = jax.random.randint(key, (state.max_steps,), 0, models + 2).tolist()
    while not state.done and len(state.blocks) <= _MOST:
        seen = state.counts.reshape(-1)
        if agent is None:
            step = ppo.Step(seen, drawn[state.steps])
        else:
            step = ppo.act(agent, seen, key, state.steps)
        state = rmm_step(state, step.action)
        steps.append(step)
    whole = state.done and not state.failed and len(state.blocks) <= _MOST
    return steps, state.blocks if whole else ()


def _best(found: Mapping[tuple[Program, int], float]) -> list[Program]:
    """The programs, those of the highest mean over their parts first."""
    scores: dict[Program, list[float]] = {}
    for (program, _), score in found.items():
        scores.setdefault(program, []).append(score)
    means = {own: sum(s) / len(s) for own, s in scores.items()}
    return sorted(means, key=lambda own: (math.isnan(means[own]), -means[own]))
