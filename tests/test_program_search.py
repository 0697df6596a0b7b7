"""Searches over rows of layers: what `dis` and `rmm` ask for, and what they find."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_models
import tiny_tokenizer

import m3jax
from m3jax import programs
from m3jax.evaluation.evaluator import TaskEvaluator
from m3jax.evaluation.outside import CommandEvaluator
from m3jax.evaluation.tasks.task import load_tasks
from m3jax.exploration.merger import Merger
from m3jax.exploration.presets import registry
from m3jax.exploration.presets.setting import Setting
from m3jax.exploration.search.scoring import Objective, score
from m3jax.exploration.search.trials import Trial
from m3jax.models.parameters import load_model
from m3jax.programs import BASE
from m3jax.recipe import RecipeError
from m3jax.search import ppo


def setting(preset: str, layers: int, models: int, **options: Any) -> Setting:
    fields: dict[str, Any] = {
        "name": preset,
        "recipe": m3jax.Recipe(),
        "has_base": True,
        "models": [None] * models,
        "tensors": [f"layers.{i}.w" for i in range(layers)],
        "evaluator": None,
        "objective": Objective({}),
        "tasks": [],
        "draws": 100,
        "seed": 0,
        "budget": None,
        "sampler": None,
        "generation": 1,
        **dict.fromkeys(("groups", "halving", "hyperband", "fraction")),
    }
    return Setting(**{**fields, **options})


def driven(own: Setting, score: Callable[..., float]) -> list[Trial]:
    """The trials of a preset whose programs are scored as they are, without a merge."""
    search, trials = registry.plan(own).search, []
    try:
        asked = next(search)
        while True:
            batch = []
            for proposal in asked:
                blocks = programs.of_recipe(proposal.recipe)
                scores = {"s": score([block[:2] for block in blocks], proposal)}
                fields = dataclasses.asdict(proposal) | {"recipe": proposal.recipe}
                batch.append(
                    Trial(**fields, ratios=None, scores=scores, objective=scores["s"])
                )
            trials += batch
            asked = search.send(batch)
    except StopIteration:
        return trials


def like(planted: Sequence[tuple[int, int]]) -> Callable[..., float]:
    """1 at a program, and less the fewer of its layers are there in their order."""

    def score(program: Any, proposal: Any = None) -> float:
        return difflib.SequenceMatcher(None, planted, program, False).ratio()

    return score


def best(trials: Sequence[Trial]) -> float:
    return max(trial.objective for trial in trials)


# DIS.


def test_dis_begins_with_the_models_and_makes_what_the_genotype_says():
    trials = driven(setting("dis", 3, 2, sampler="random", draws=40), like([(0, 0)]))
    assert len(trials) == 40
    made = [[b[:2] for b in programs.of_recipe(t.recipe)] for t in trials]
    assert made[:2] == [[(k, layer) for layer in range(3)] for k in (0, 1)]
    each = [
        tuple(k for k, own in program if own == layer)
        for program in made
        for layer in range(3)
    ]
    assert set(each) == {(BASE,), (0,), (1,), (0, 1), (1, 0)}


def test_dis_scales_what_it_can():
    names = list(tiny_models.tensors("llama2"))
    own = setting("dis", 2, 2, sampler="random", draws=12, tensors=names)
    assert "epsilon" in registry.plan(own).notes[0]
    scales = [
        programs.of_recipe(trial.recipe)[0].scale for trial in driven(own, like([]))
    ]
    np.testing.assert_allclose(scales[:2], 1)
    assert 0.4 < min(scales) < 0.9 < 1.1 < max(scales) < 1.6
    assert "not scaled" in registry.plan(setting("dis", 2, 2)).notes[0]


def test_dis_evaluates_no_more_than_fifty_layers():
    own = setting("dis", 33, 3, sampler="random", draws=60)
    depths = [len(programs.of_recipe(t.recipe)) for t in driven(own, like([]))]
    assert max(depths) <= 50
    assert 5 < len(depths) < 60
    with pytest.raises(RecipeError, match="at most 50 layers; these have 51"):
        registry.plan(setting("dis", 51, 2))


PLANTED = [(0, 0), (1, 1), (0, 1), (BASE, 2), (1, 3)]


def dis_and_random(seed: int, draws: int) -> tuple[float, float]:
    options = {"seed": seed, "draws": draws}
    ours = driven(setting("dis", 4, 2, **options), like(PLANTED))
    random = driven(setting("dis", 4, 2, sampler="random", **options), like(PLANTED))
    return best(ours), best(random)


def test_dis_finds_the_planted_program():
    pytest.importorskip("optuna")
    ours, _ = dis_and_random(0, 200)
    assert ours == 1


@pytest.mark.slow
def test_dis_is_better_than_random_programs_over_ten_seeds():
    pytest.importorskip("optuna")
    found = np.array([dis_and_random(seed, 100) for seed in range(10)])
    ours, random = found.mean(axis=0)
    assert ours > random, found


def test_dis_under_hyperband_learns_from_every_budget():
    pytest.importorskip("optuna")
    options = {"hyperband": 3, "budget": 27}

    def score(program: Any, proposal: Any) -> float:
        noise = jax.random.normal(jax.random.key(proposal.index)) / proposal.budget
        return like(PLANTED)(program) + float(noise)

    ours = driven(setting("dis", 4, 2, **options), score)
    random = driven(setting("dis", 4, 2, sampler="random", **options), score)
    asked = [
        int(budget)
        for bracket in m3jax.search.hyperband_brackets(1, 27, 3)
        for count, budget in bracket
        for _ in range(count)
    ]
    assert [t.budget for t in ours] == [t.budget for t in random] == asked
    later = slice(asked.index(3, 27 + 9 + 3 + 1), None)  # once it was told something
    means = [np.mean([t.objective for t in own[later]]) for own in (ours, random)]
    assert means[0] > means[1]


# RMM.

ROAD = [(0, 0), (1, 1), (1, 2), (0, 3), (0, 4), (1, 5)]


def rmm_and_random(seed: int, draws: int) -> tuple[float, float]:
    trials = driven(setting("rmm", 6, 2, seed=seed, draws=draws), like(ROAD))
    random = setting("rmm", 6, 2, seed=seed, draws=2 * draws, sampler="random")
    return best(trials), best(driven(random, like(ROAD))[: len(trials)])


def test_rmm_finds_the_planted_program():
    ours, random = rmm_and_random(8, 200)
    assert ours == 1 > random


@pytest.mark.slow
def test_rmm_is_better_than_random_walks_over_ten_seeds():
    found = np.array([rmm_and_random(seed, 700) for seed in range(10)])
    ours, random = found.mean(axis=0)
    assert ours > random, found


def test_rmm_evaluates_no_program_twice():
    trials = driven(setting("rmm", 6, 2, draws=300), like(ROAD))
    made = [str(programs.of_recipe(trial.recipe)) for trial in trials]
    assert len(set(made)) == len(made) < 300
    assert [trial.index for trial in trials] == list(range(len(trials)))


def test_rmm_walks_on_parts_and_ends_on_everything():
    own = setting("rmm", 6, 2, draws=60, fraction=0.25, budget=40)
    seen = []

    def score(program: Any, proposal: Any) -> float:
        seen.append((proposal.budget, proposal.part))
        return like(ROAD)(program)

    trials = driven(own, score)
    walked, whole = seen[:-3], seen[-3:]
    assert whole == [(40, 0)] * 3
    assert {budget for budget, _ in walked} == {10}
    assert {part for _, part in walked} == {0, 1, 2, 3}
    ends = [trial.objective for trial in trials[-3:]]
    assert max(ends) == best(trials)
    made: dict[int, str] = {}
    for trial in trials:  # a draw is a program, wherever it is evaluated
        program = str(programs.of_recipe(trial.recipe))
        assert made.setdefault(trial.index, program) == program
    assert len(set(made.values())) == len(made) < len(trials) - 3


def test_what_makes_no_model_is_worse_than_anything(monkeypatch):
    rewards: list[float] = []

    def learn(agent: ppo.Agent, buffer: list[ppo.Step]) -> ppo.Agent:
        rewards.extend(step.reward for step in buffer if step.terminal)
        return agent

    monkeypatch.setattr(ppo, "learn", learn)
    own = setting("rmm", 6, 2, draws=60)
    trials = driven(own, lambda program, proposal: [-100.0, math.nan][len(program) % 2])
    assert len(rewards) == 60
    assert {own for own in rewards if own < -100} == {-101.0}
    lost = sum(math.isnan(trial.objective) for trial in trials)
    assert 0 < lost < sum(own == -101 for own in rewards)  # walks that failed, too


def test_an_agent_learns_which_action_is_rewarded():
    agent = ppo.new_agent(jax.random.key(0), 12, 4)
    seen = np.ones(12)

    def steps(count: int, seed: int) -> list[ppo.Step]:
        found = [ppo.act(agent, seen, jax.random.key(seed), i) for i in range(count)]
        return [s._replace(reward=float(s.action == 2), terminal=True) for s in found]

    for i in range(12):
        agent = ppo.learn(agent, steps(9, i))
    assert np.mean([s.action == 2 for s in steps(40, 99)]) > 0.9


def test_padding_changes_nothing_of_the_loss():
    draw = np.random.default_rng(0).normal(size=(6, 5))
    plain = m3jax.search.ppo_loss(*draw)
    filled = np.concatenate([draw, np.full((6, 3), 7.0)], axis=1)
    taken = np.arange(8) < 5
    padded = m3jax.search.ppo_loss(*filled, taken=taken)
    np.testing.assert_allclose(padded, plain, rtol=1e-6)


# Over models, with tasks.


@pytest.fixture
def compiled():
    """Programs that XLA has compiled so far, in a list of one number."""
    found = [0]

    def listen(event: str, duration: float, **_: object) -> None:
        found[0] += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def evaluator(tmp_path: Path) -> TaskEvaluator:
    """The loss of a few words."""
    lines = [{"q": q, "a": a} for q, a in (("to be", " or"), ("a", "b"), ("2+", "2"))]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "words.jsonl").write_text(text)
    spec = {"name": "words", "kind": "loss", "data": "words.jsonl"}
    spec |= {"prompt": "{q}", "completion": "{a}"}
    (tmp_path / "words.json").write_text(json.dumps(spec))
    tasks = load_tasks(tmp_path / "words.json")
    config = tiny_models.config("llama2")
    return TaskEvaluator(tasks, config, tiny_tokenizer.Characters())


def test_one_compilation_serves_all_programs_of_a_depth_bound(evaluator, compiled):
    base, *models = (tiny_models.parameters("llama2", seed) for seed in range(3))
    merger = Merger(base, models, programs.as_recipe([(0, 0)]))
    key, counts = jax.random.key(0), []

    def scored(program: list[tuple[Any, ...]]) -> float:
        recipe = programs.as_recipe(program)
        layers = [layer for _, layer, *_ in program]
        made = merger(recipe, 0)
        found = score(evaluator, made, None, key, layers=layers).scores
        counts.append(compiled[0])
        return found["words"]

    jax.clear_caches()
    program = [(BASE, 0), (0, 1, 0.7), (1, 1), (0, 0, 1.3), (1, 0)]
    first = scored(program)
    others = (
        [(0, 0), (1, 1), (0, 1), (BASE, 0), (1, 0), (0, 1)],
        [(0, 0, 0.5), (1, 1), (0, 1), (1, 1), (1, 0, 1.2), (0, 1)],
        [(1, 1), (1, 1), (0, 0), (BASE, 0), (1, 0)],
    )
    assert len({first, *map(scored, others)}) == 4
    assert counts == counts[:1] * 4
    assert scored(program) == first


def test_device_memory_holds_base_models_and_one_child():
    base, *models = (tiny_models.parameters("llama2", seed) for seed in range(3))
    held = []

    def size() -> int:
        return sum(array.nbytes for array in jax.live_arrays())

    def evaluator(parameters: Any, budget: Any, key: Any) -> dict[str, float]:
        own = sum(leaf.nbytes for leaf in jax.tree.leaves(parameters))
        held.append(size() - before - own)
        return {"score": 0.0}

    before = size()
    m3jax.explore(
        base, models, evaluator=evaluator, preset="dis", sampler="random", draws=6
    )
    assert max(held[5:]) < 1000  # numbers of the search


@pytest.mark.slow
def test_a_search_of_tasks_exports_what_it_scored(evaluator, tmp_path):
    folders = []
    for seed, name in enumerate(("base", "maths", "code")):
        folders.append(str(tmp_path / name))
        m3jax.save(tiny_models.parameters("llama2", seed), folders[-1])
        config = json.dumps(tiny_models.config_dict("llama2"))
        (tmp_path / name / "config.json").write_text(config)
    said: list[str] = []
    found = m3jax.explore(
        folders[0],
        folders[1:],
        evaluator=evaluator,
        preset="rmm",
        draws=24,
        seed=1,
        output=tmp_path / "found",
        say=said.append,
    )
    assert found.winner.objective == max(t.objective for t in found.trials)
    recipe, seed = found.winner.recipe, found.winner.seed
    m3jax.merge(folders[0], folders[1:], tmp_path / "child", recipe, seed=seed)
    made = load_model(str(tmp_path / "child"))
    depth = len(found.winner.program)
    assert made.config.num_layers == depth
    own = TaskEvaluator(evaluator.tasks, made.config, tiny_tokenizer.Characters())
    scores = own(made.parameters, None, jax.random.key(1))
    assert scores["words"] == pytest.approx(-found.winner.objective, rel=1e-5)
    words = programs.described(found.winner.program, ["maths", "code"])
    for name in ("summary.md", "report.html"):
        assert words in (tmp_path / "found" / name).read_text()
    assert any(f"{depth} layers: " in line for line in said)


def test_a_command_gets_the_child_as_a_model_of_its_depth(tmp_path):
    tensors = tiny_models.parameters("qwen2_window")
    m3jax.save(tensors, tmp_path / "base")
    config = json.dumps(tiny_models.config_dict("qwen2_window"))
    (tmp_path / "base" / "config.json").write_text(config)
    program = [(BASE, 1), (BASE, 0), (BASE, 1)]
    made = m3jax.merge_params(tensors, [tensors], programs.as_recipe(program), 0)
    code = "import json, sys; c = json.load(open(sys.argv[1] + '/config.json')); "
    code += "print(json.dumps({'layers': c['num_hidden_layers']}))"
    command = f'{sys.executable} -c "{code}" {{checkpoint}}'
    own = CommandEvaluator(command, like=str(tmp_path / "base"))
    scored = score(own, made, None, jax.random.key(0), layers=[1, 0, 1])
    assert scored.scores == {"layers": 3.0}


def test_parts_of_the_examples(evaluator):
    tensors, key = tiny_models.parameters("llama2"), jax.random.key(0)
    (whole,) = evaluator.evaluate(tensors, None, key)
    for part, members in ((0, [0, 1]), (1, [2, 0]), (2, [1, 2])):
        (own,) = evaluator.evaluate(tensors, 2, key, part)
        wanted = [whole.records[i]["score"] for i in members]
        np.testing.assert_allclose([r["score"] for r in own.records], wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fraction": 0.5}, "needs preset='rmm'"),
        ({"preset": "rmm", "fraction": 1.5}, "a number above 0, up to 1"),
        ({"preset": "rmm", "fraction": 0.5}, "fraction needs budget"),
        ({"preset": "dis", "fraction": 0.5, "budget": 4}, "takes no fraction=0.5"),
        ({"preset": "rmm", "sampler": "tpe"}, "(takes random)"),
        ({"preset": "dis", "groups": 2}, "takes no groups=2"),
        ({"preset": "rmm", "recipe": m3jax.Recipe(method="ties")}, "leave out method"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], said: str):
    trees = [{"layers.0.w": np.ones(2, np.float32)} for _ in range(3)]
    with pytest.raises(RecipeError, match=re.escape(said)):
        m3jax.explore(trees[0], trees[1:], evaluator=lambda *own: {"s": 0.0}, **options)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["w"], "these have no layers"),
        (["encoder.0.w", "decoder.0.w"], "these have layers in decoder., encoder."),
    ],
)
def test_models_without_one_stack_of_layers_are_refused(names: list[str], said: str):
    for preset in ("dis", "rmm"):
        with pytest.raises(RecipeError, match=re.escape(said)):
            registry.plan(setting(preset, 0, 2, tensors=names))


def test_dis_needs_a_base():
    with pytest.raises(RecipeError, match="needs a base"):
        registry.plan(setting("dis", 2, 2, has_base=False))
