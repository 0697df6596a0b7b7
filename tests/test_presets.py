"""Published searches as presets of `explore`: their steps, and what they find."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest

import m3jax
from m3jax import search
from m3jax.checkpoints.formats import tree
from m3jax.exploration.presets.registry import PRESETS

LAYERS, WIDTH = 4, 24
NAMES = [f"model.layers.{i}.weight" for i in range(LAYERS)]
FILES = ("trials.jsonl", "scores.jsonl", "summary.json", "summary.md", "winner.json")


def trees(count: int, *, names: list[str] = NAMES, spread: float = 1.0) -> list[dict]:
    """A base and models that lie around it."""
    generator = np.random.default_rng(5)

    def draw() -> dict:
        size = (WIDTH, 2)
        return {n: generator.normal(size=size).astype(np.float32) for n in names}

    base = draw()
    noise = [draw() for _ in range(count)]
    return [
        base,
        *({n: base[n] + np.float32(spread) * own[n] for n in names} for own in noise),
    ]


def near(target: dict) -> Any:
    """An evaluator that is 0 at a pytree, and falls off around it."""

    def evaluator(parameters: Any, budget: Any, key: Any) -> dict[str, float]:
        errors = [  # a program may leave layers out
            np.mean((np.asarray(parameters.get(n, 0), np.float64) - own) ** 2)
            for n, own in target.items()
        ]
        return {"near": -math.sqrt(np.mean(errors))}

    return evaluator


def mixed(models: list[dict], rows: Any) -> dict:
    """The models' weighted sums, a row of weights for each tensor."""
    return {
        name: sum(w * model[name] for w, model in zip(row, models, strict=True))
        for name, row in zip(models[0], rows, strict=True)
    }


def score_of(evaluator: Any) -> Any:
    return lambda parameters: sum(evaluator(parameters, None, None).values())


def close(a: dict, b: dict) -> None:
    for name in b:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-5)


def better_than_random(
    base: dict, models: list[dict], evaluator: Any, seeds: range, **options: Any
) -> None:
    """The preset's winners are the better ones on average, after as many trials."""
    ours, theirs = [], []
    for seed in seeds:
        found = m3jax.explore(
            base, models, evaluator=evaluator, seed=seed, **{"draws": 48, **options}
        )
        ours.append(found.winner.objective)
        kept = {k: v for k, v in options.items() if k != "preset"}
        random = m3jax.explore(
            base,
            models,
            evaluator=evaluator,
            seed=seed,
            sampler="random",
            **{**kept, "draws": len(found.trials)},
        )
        theirs.append(random.winner.objective)
    assert np.mean(ours) > np.mean(theirs), (ours, theirs)


# Each takes the steps of its source.


def test_greedy_soup_is_that_of_the_published_function():
    base, *models = trees(5)
    rows = [(0.45, 0.1, 0.45, 0, 0)] * LAYERS
    evaluator = near(mixed(models, rows))
    found = m3jax.explore(base, models, evaluator=evaluator, preset="greedy_soup")
    soup = search.greedy_soup(models, score_of(evaluator))
    assert len(found.trials) == 9
    tried = [trial.objective for trial in found.trials[5:]]
    np.testing.assert_allclose(tried, [own.score for own in soup.trials], rtol=1e-4)
    assert {own.accepted for own in soup.trials} == {True, False}
    (ratios,) = found.winner.ratios.values()
    assert [k for k, r in enumerate(ratios) if r] == sorted(soup.members)
    merged = m3jax.merge_params(base, models, found.winner.recipe, found.winner.seed)
    close(merged, soup.params)


def test_model_glue_merges_selectively_and_then_by_layers():
    base, *models = trees(3, spread=0.1)
    rows = [(0.6, 0.4, 0)] * 2 + [(0.1, 0.5, 0.4)] * 2
    evaluator = near(mixed(models, rows))
    found = m3jax.explore(
        base, models, evaluator=evaluator, preset="model_glue", groups=2, draws=36
    )
    chosen = search.selective_merge(
        models, score_of(evaluator), grid=[c / 10 for c in range(1, 10)]
    )
    first, later = found.trials[:21], found.trials[21:]
    best = max(first, key=lambda trial: trial.objective)
    np.testing.assert_allclose(best.recipe.mixup.ratios, chosen.weights, atol=1e-12)
    rounds = [max(t.objective for t in first[i : i + 9]) for i in (3, 12)]
    np.testing.assert_allclose(rounds, [r.score for r in chosen.rounds], rtol=1e-4)
    assert len(later) == 15
    assert found.winner in later
    for trial in later[:3]:
        own = (*trial.recipe.variants[1:], trial.recipe.variants[0])
        weights = [recipe.method.weights for recipe in own]
        expected = search.merge_layer_groups(models, weights)
        close(m3jax.merge_params(base, models, trial.recipe, trial.seed), expected)


def test_model_glue_keeps_unlike_models_apart():
    base, *models = trees(4, spread=0.05)
    models[1] = {name: -leaf for name, leaf in models[1].items()}
    models[3] = {name: -leaf for name, leaf in models[3].items()}
    assert search.clusters(search.similarity_matrix(models), 0.95) == [[0, 2], [1, 3]]
    evaluator = near(mixed(models, [(0, 0.3, 0, 0.7)] * LAYERS))
    found = m3jax.explore(
        base, models, evaluator=evaluator, preset="model_glue", draws=37
    )
    for trial in found.trials:
        merged = m3jax.merge_params(base, models, trial.recipe, trial.seed)
        used = [own.mixup.ratios or own.method.weights for own in trial.recipe.variants]
        together = [any(row[0:3:2]) and any(row[1:4:2]) for row in used]
        assert not any(together), merged
    assert len(found.trials) == 37


def test_safety_aware_starts_at_lm_cocktail_and_weighs_as_published():
    base, *models = trees(3)
    targets = {"safety": models[0], "maths": models[2]}

    def evaluator(parameters: Any, budget: Any, key: Any) -> dict[str, float]:
        return {
            name: near(own)(parameters, 0, 0)["near"] for name, own in targets.items()
        }

    with pytest.raises(m3jax.RecipeError, match="no task with safety in its name"):
        m3jax.explore(base, models, evaluator=evaluator, preset="safety_aware")
    weights = {"safety": 1.0, "maths": 0.3}
    found = m3jax.explore(
        base, models, evaluator=evaluator, preset="safety_aware", weights=weights
    )
    assert len(found.trials) == 32
    losses = [-trial.objective for trial in found.trials[:3]]
    start = search.lm_cocktail_weights(losses, temperature=1.0)
    np.testing.assert_allclose(found.trials[3].recipe.mixup.ratios, start, rtol=1e-6)
    for trial in found.trials:
        own = [-trial.scores[name] for name in weights]
        total = search.weighted_objective(own, list(weights), weights)
        assert trial.objective == pytest.approx(-total / 1.3)


def test_safety_aware_finds_out_what_is_of_safety():
    base, *models = trees(2)

    class Evaluator:
        losses = frozenset({"Safety-HH", "maths"})
        tasks = ()

        def __call__(self, parameters: Any, budget: Any, key: Any) -> dict[str, float]:
            return {
                "Safety-HH": -near(models[0])(parameters, 0, 0)["near"],
                "maths": 1.0,
            }

    found = m3jax.explore(
        base,
        models,
        evaluator=Evaluator(),
        preset="safety_aware",
        weights={"Safety-HH": 1, "maths": 0.3},
        draws=12,
    )
    assert found.winner.recipe.mixup.ratios[0] > 0.9


@pytest.mark.parametrize("count", [2, 3])
def test_lfs_makes_what_the_genotype_says(count: int):
    base, *models = trees(count)
    found = m3jax.explore(
        base,
        models,
        evaluator=near(models[0]),
        preset="lfs",
        sampler="random",
        groups=LAYERS,
        draws=10,
    )
    methods = set()
    for k, trial in enumerate(found.trials):
        groups = []
        for own in (*trial.recipe.variants[1:], trial.recipe.variants[0]):
            method, name = own.method, own.method.name
            methods.add(name)
            numbers = {
                "average": lambda m: {"weights": m.weights},
                "slerp": lambda m: {"t": [math.log(w + 1e-30) for w in m.weights]},
                "task_arithmetic": lambda m: {"scaling": m.scaling},
                "ties": lambda m: {"scaling": m.scaling, "trim_rate": m.trim_rate},
            }[name](method)
            kind = "linear" if name == "average" else name
            groups.append({"method": kind, "sets": {"base": numbers}})
        genotype = {"layers_per_group": 1, "filters": [], "groups": groups}
        merged = m3jax.merge_params(base, models, trial.recipe, trial.seed)
        close(merged, search.lfs_merge(base, models, genotype))
        if k < count:
            close(merged, models[k])
    assert len(methods) == (4 if count == 2 else 3)


def test_lfs_goes_on_where_tpe_was_told_of_the_single_models():
    pytest.importorskip("optuna")
    base, *models = trees(3)
    found = m3jax.explore(
        base, models, evaluator=near(models[1]), preset="lfs", draws=8
    )
    for k, trial in enumerate(found.trials[:3]):
        close(m3jax.merge_params(base, models, trial.recipe, trial.seed), models[k])
    assert found.winner.index == 1
    assert len(found.trials) == 8


def test_lfs_under_hyperband():
    base, *models = trees(2)
    budgets: list[int] = []

    def evaluator(parameters: Any, budget: Any, key: Any) -> dict[str, float]:
        budgets.append(budget)
        return near(models[1])(parameters, budget, key)

    found = m3jax.explore(
        base, models, evaluator=evaluator, preset="lfs", hyperband=3, budget=9
    )
    asked = [
        int(own)
        for bracket in search.hyperband_brackets(1, 9, 3)
        for count, own in bracket
        for _ in range(count)
    ]
    assert [trial.budget for trial in found.trials] == asked
    assert (found.winner.index, found.winner.budget) == (1, 9)


class Answering:
    """Answers that change at some ratios, and scores that say nothing of it."""

    def __init__(self, models: list[dict], changes: list[list[float]]):
        self._models, self._changes = models, changes

    def answers(self, parameters: Any, budget: Any, key: Any) -> dict[str, list[str]]:
        (a, b), own = (m[NAMES[0]] for m in self._models), parameters[NAMES[0]]
        alpha = float(np.mean((own - b) / (a - b)))
        counts = [sum(alpha > c for c in own) for own in self._changes]
        return {"qa": [f"Answer {n}" for n in counts]}

    def fisher(self, parameters: Any, model: int, key: Any) -> dict:
        return {n: np.square(own) for n, own in parameters.items()}

    def __call__(self, parameters: Any, budget: Any, key: Any) -> dict[str, float]:
        return near(self._models[0])(parameters, budget, key)


def test_adamms_chooses_by_answers_and_not_by_scores():
    base, *models = trees(2)
    changes = [[0.45, 0.55, 0.85, 0.95], [0.55, 0.65], [0.85, 0.95]]
    evaluator = Answering(models, changes)
    found = m3jax.explore(base, models, evaluator=evaluator, preset="adamms")
    alphas = [trial.recipe.mixup.ratios[0] for trial in found.trials]
    assert alphas == [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    answers = [trial.answers["qa"] for trial in found.trials]
    best = search.response_stability(answers, alphas).best
    assert [found.winner.recipe.mixup.ratios[0]] == best[:1] == [0.7]
    assert found.winner.objective < max(trial.objective for trial in found.trials)


@pytest.mark.parametrize("sampler", [None, "grid"])
def test_draws_may_be_chosen_by_answers_too(sampler: str | None):
    base, *models = trees(2)
    evaluator = Answering(models, [[0.1, 0.9], [0.15, 0.4], [0.8, 0.95]])
    options = {"evaluator": evaluator, "draws": 9, "sampler": sampler}
    found = m3jax.explore(base, models, selector="answers", **options)
    ratios = [trial.mean_ratios[0] for trial in found.trials]
    place = search.most_stable([t.answers["qa"] for t in found.trials], ratios)
    assert found.winner == found.trials[place]
    assert 0.3 < ratios[place] < 0.7  # where the answers stay the same
    by_scores = m3jax.explore(base, models, **options)
    assert by_scores.winner.objective > found.winner.objective
    assert [t.proposal for t in by_scores.trials] == [t.proposal for t in found.trials]


def test_m3_is_what_explore_does_without_a_preset():
    base, *models = trees(2)
    options = {"evaluator": near(models[0]), "draws": 5, "seed": 3}
    plain = m3jax.explore(base, models, **options)
    named = m3jax.explore(base, models, preset="m3", **options)
    assert named.trials == plain.trials


# Each finds a planted optimum.

seeds = pytest.mark.parametrize("seeds", [3, pytest.param(10, marks=pytest.mark.slow)])


@seeds
def test_greedy_soup_finds_the_subset_that_random_ratios_miss(seeds: int):
    base, *models = trees(6)
    evaluator = near(mixed(models, [(1 / 3, 0, 1 / 3, 0, 1 / 3, 0)] * LAYERS))
    found = m3jax.explore(base, models, evaluator=evaluator, preset="greedy_soup")
    assert found.winner.objective > -1e-5
    better_than_random(base, models, evaluator, range(seeds), preset="greedy_soup")


@seeds
def test_model_glue_finds_ratios_by_layers(seeds: int):
    pytest.importorskip("cmaes")
    base, *models = trees(3, spread=0.1)
    evaluator = near(mixed(models, [(0.7, 0.2, 0.1)] * 2 + [(0.5, 0.1, 0.4)] * 2))
    options = {"preset": "model_glue", "groups": 2, "draws": 96}
    better_than_random(base, models, evaluator, range(seeds), **options)


@seeds
def test_safety_aware_finds_the_ratios(seeds: int):
    pytest.importorskip("cmaes")
    base, *models = trees(4)
    evaluator = near(mixed(models, [(0.6, 0.25, 0.15, 0)] * LAYERS))
    options = {"preset": "safety_aware", "weights": {"near": 1.0}}
    better_than_random(base, models, evaluator, range(seeds), **options)


class Informed:
    """An evaluator of a planted λ, whose Fisher information depends on where it is."""

    def __init__(self, target: dict):
        self._near = near(target)

    def __call__(self, parameters: Any, budget: Any, key: Any) -> dict[str, float]:
        return self._near(parameters, budget, key)

    def fisher(self, parameters: Any, model: int, key: Any) -> dict:
        return {
            n: (np.asarray(own) + model) ** 2 + np.float32(0.01)
            for n, own in parameters.items()
        }


def df_merged(base: dict, models: list[dict], coefficients: Any, evaluator: Any) -> Any:
    """θ0 + K Σ F_k λ_k τ_k / Σ F_k, with F_k at θ0 + λ_k τ_k."""
    made = {}
    for name, start in base.items():
        above = below = 0.0
        for k, (own, model) in enumerate(zip(coefficients, models, strict=True)):
            tau = model[name] - start
            moved = {name: start + np.float32(own) * tau}
            fisher = evaluator.fisher(moved, k, None)[name]
            above, below = above + own * fisher * tau, below + fisher
        made[name] = start + len(models) * above / below
    return made


def test_df_merge_measures_at_every_draw(tmp_path: Any):
    pytest.importorskip("optuna")
    base, *models = trees(2)
    evaluator = Informed(models[0])
    options = {"evaluator": evaluator, "preset": "df_merge", "sampler": "tpe"}
    found = m3jax.explore(base, models, draws=4, output=tmp_path, **options)
    own = df_merged(base, models, found.winner.recipe.method.coefficients, evaluator)
    merged = m3jax.merge_params(
        base, models, found.winner.recipe, 0, statistics=found.statistics
    )
    close(merged, own)
    scores = evaluator(own, None, None)
    assert found.winner.scores == pytest.approx(scores, rel=1e-4)
    written = [own["path"] for own in found.replay["statistics"]]
    for path, statistics in zip(written, found.statistics, strict=True):
        stored = m3jax.load(path)
        flat = {n: np.asarray(x) for n, x in tree.flatten(stored)[0].items()}
        close(flat, tree.flatten(statistics)[0])


@pytest.mark.parametrize(
    ("sampler", "seeds"), [("tpe", 3), pytest.param("gp", 10, marks=pytest.mark.slow)]
)
def test_df_merge_finds_the_coefficients(sampler: str, seeds: int):
    pytest.importorskip("torch" if sampler == "gp" else "optuna")
    base, *models = trees(3)
    evaluator = Informed({})
    target = df_merged(base, models, (0.15, 0.8, 0.45), evaluator)
    evaluator = Informed(target)
    ours, theirs = [], []
    options = {"preset": "df_merge", "sampler": sampler, "draws": 20}
    for seed in range(seeds):
        found = m3jax.explore(base, models, evaluator=evaluator, seed=seed, **options)
        ours.append(found.winner.objective)
        rng = np.random.default_rng(seed)
        scores = [
            evaluator(df_merged(base, models, own, evaluator), None, None)["near"]
            for own in rng.random((20, 3))
        ]
        theirs.append(max(scores))
    assert np.mean(ours) > np.mean(theirs), (ours, theirs)


@seeds
def test_lfs_finds_the_methods(seeds: int):
    pytest.importorskip("optuna")
    base, *models = trees(3)
    ties = m3jax.Recipe(method="ties", mixup=m3jax.Mixup(alpha=None))
    target = m3jax.merge_params(base, models, ties, 0)
    target = {n: models[0][n] if n == NAMES[0] else target[n] for n in NAMES}
    evaluator = near({n: np.asarray(own) for n, own in target.items()})
    options = {"preset": "lfs", "groups": 2, "draws": 48}
    ours, theirs = [], []
    for seed in range(seeds):
        for found, own in ((ours, {}), (theirs, {"sampler": "random"})):
            result = m3jax.explore(
                base, models, evaluator=evaluator, seed=seed, **options, **own
            )
            found.append(result.winner.objective)
    assert np.mean(ours) > np.mean(theirs), (ours, theirs)


# What they have in common.


def resumed(preset: str) -> dict[str, Any]:
    return {
        "m3": {"draws": 5},
        "model_glue": {"draws": 30, "groups": 2},
        "safety_aware": {"draws": 12, "weights": {"near": 1.0}},
        "lfs": {"draws": 8, "groups": 2},
        "dis": {"draws": 8},
        "rmm": {"draws": 16, "fraction": 0.5, "budget": 4},
        "df_merge": {"draws": 6, "sampler": "tpe"},
    }.get(preset, {})


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_goes_on_where_it_was_interrupted(preset: str, tmp_path: Any):
    pytest.importorskip("optuna")
    base, *models = trees(2, spread=0.1)
    options = {
        "evaluator": Answering(models, [[0.45, 0.75], [0.65]]),
        "preset": preset,
        "seed": 4,
        **resumed(preset),
    }
    m3jax.explore(base, models, output=tmp_path / "a", **options)
    expected = {name: (tmp_path / "a" / name).read_text() for name in FILES}
    lines = expected["trials.jsonl"].splitlines(keepends=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "trials.jsonl").write_text("".join(lines[: len(lines) // 2 + 1]))
    m3jax.explore(base, models, output=tmp_path / "b", resume=True, **options)
    found = {n: (tmp_path / "b" / n).read_text() for n in FILES}
    # df_merge names files in the output.
    winner = found["winner.json"].replace(f"{tmp_path}/b", f"{tmp_path}/a")
    found["winner.json"] = winner
    assert found == expected


@pytest.mark.parametrize("preset", ["greedy_soup", "model_glue", "safety_aware"])
def test_a_model_that_overflows_never_wins(preset: str):
    pytest.importorskip("cmaes")
    base, *models = trees(3, spread=0.1)
    bad = np.asarray(models[1][NAMES[0]])

    def evaluator(parameters: Any, budget: Any, key: Any) -> dict[str, float]:
        far = np.array_equal(parameters[NAMES[0]], bad)
        return {"near": math.nan if far else near(models[0])(parameters, 0, 0)["near"]}

    weights = {"near": 1.0} if preset == "safety_aware" else None
    found = m3jax.explore(
        base, models, evaluator=evaluator, preset=preset, weights=weights
    )
    assert math.isnan(found.trials[1].objective)
    assert found.winner.index == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"preset": "soup"}, "preset='soup' needs one of m3, greedy_soup, model_glue"),
        ({"preset": "m3", "sampler": "tpe"}, "sampler='tpe' does not go with it"),
        ({"preset": "lfs", "sampler": "grid"}, "(takes tpe or random)"),
        ({"preset": "lfs", "search": ["ratios"]}, "takes no search=['ratios']"),
        ({"preset": "greedy_soup", "groups": 2}, "takes no groups=2"),
        ({"preset": "model_glue", "halving": 2, "budget": 4}, "takes no halving=2"),
        ({"preset": "model_glue", "draws": 10}, "draws=10 is too few"),
        ({"preset": "model_glue", "groups": 9}, "groups=9 needs 1 to 4"),
        ({"preset": "safety_aware", "draws": 2}, "needs 3 or more"),
        ({"preset": "adamms"}, "the evaluator tells none"),
        ({"selector": "best"}, "selector='best' needs to be scores or answers"),
        ({"selector": "answers"}, "selector='answers' looks at answers, and the"),
        ({"selector": "answers", "sampler": "tpe"}, "tpe goes by scores"),
        ({"selector": "answers", "draws": 2}, "needs 3 draws or more, not 2"),
        (
            {
                "selector": "answers",
                "sampler": "random",
                "search": ["ratios", "scaling"],
                "recipe": m3jax.Recipe(method="task_arithmetic"),
            },
            "needs search=['ratios'] and no more",
        ),
        (
            {
                "selector": "answers",
                "recipe": m3jax.Recipe(mixup=m3jax.Mixup(alpha=None)),
            },
            "set mixup.alpha",
        ),
        ({"selector": "answers", "preset": "lfs"}, "takes no selector='answers'"),
        ({"preset": "df_merge"}, "measures the Fisher information, and the evaluator"),
        ({"preset": "df_merge", "sampler": "grid"}, "(takes gp or tpe)"),
        (
            {"preset": "greedy_soup", "recipe": m3jax.Recipe(method="ties")},
            "leave out method ties",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict, said: str):
    base, *models = trees(2, spread=0.1)
    with pytest.raises(m3jax.RecipeError, match=re.escape(said)):
        m3jax.explore(base, models, evaluator=near(models[0]), **options)


def test_presets_that_need_more_or_fewer_models_say_so():
    base, *models = trees(3)
    with pytest.raises(m3jax.RecipeError, match="needs 2 models"):
        m3jax.explore(base, models, evaluator=Answering(models, []), preset="adamms")
    with pytest.raises(m3jax.RecipeError, match="needs 2 models, and 3 are given"):
        m3jax.explore(base, models, evaluator=near(base), selector="answers")
    with pytest.raises(m3jax.RecipeError, match="needs two models or more"):
        m3jax.explore(base, models[:1], evaluator=near(base), preset="greedy_soup")
    with pytest.raises(m3jax.RecipeError, match="needs a base"):
        m3jax.explore(None, models, evaluator=near(base), preset="lfs")
