"""Exploration in memory: samplers, halving, resuming, memory and compilations."""

from __future__ import annotations

import json
import math
import random
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import slow, thin

import m3jax
import m3jax.exploration.report
from m3jax import prng
from m3jax.checkpoints.errors import CheckpointError
from m3jax.exploration.merger import Merger
from m3jax.exploration.search.samplers import trial_seed
from m3jax.exploration.search.searches import Rung, rungs
from m3jax.exploration.space import Space

SIZE = 1000
NORMAL = np.random.default_rng(0).standard_normal((4, SIZE)).astype(np.float32)
FILES = (
    "trials.jsonl",
    "scores.jsonl",
    "summary.json",
    "summary.md",
    "winner.json",
    "report.html",
)


def trees(count: int = 2) -> list[dict]:
    """A base and models; the base is 0, so that a merge's ratios can be read off."""
    rows = [np.zeros(SIZE, np.float32), *NORMAL[:count]]
    return [{"layer": {"weight": jnp.asarray(row)}} for row in rows]


def near(*target: float):
    """An evaluator that is 0 at one ratio of the models and falls off around it."""
    wanted = np.tensordot(np.array(target, np.float32), NORMAL[: len(target)], 1)

    def evaluator(parameters, budget, key):
        error = np.asarray(parameters["layer"]["weight"]) - wanted
        return {"near": -float(np.sqrt(np.mean(error**2)))}

    return evaluator


def explore(*, count=2, evaluator=None, **options):
    base, *models = trees(count)
    evaluator = evaluator or near(*((0.3, 0.7) if count == 2 else (0.2, 0.3, 0.5)))
    return m3jax.explore(base, models, evaluator=evaluator, **options)


def contents(folder):
    return {name: (folder / name).read_text() for name in FILES}


# Samplers.


def test_recipe_draws_are_replayed_by_recipe_and_seed():
    found = explore(draws=5, seed=9)
    base, *models = trees()
    merges = []
    for i, trial in enumerate(found.trials):
        assert (trial.recipe, trial.seed) == (m3jax.Recipe(), trial_seed(9, i))
        merged = m3jax.merge_params(base, models, trial.recipe, trial.seed)
        merges.append(merged)
        assert near(0.3, 0.7)(merged, None, None) == trial.scores
        (ratios,) = trial.ratios.values()
        expected = np.tensordot(np.float32(ratios), NORMAL[:2], 1)
        np.testing.assert_allclose(merged["layer"]["weight"], expected, atol=1e-6)
    assert found.winner.objective == max(trial.objective for trial in found.trials)
    assert len({trial.ratios[""] for trial in found.trials}) == 5


def test_seed_of_a_trial_is_as_documented():
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(9), prng.TRIALS), 4)
    assert trial_seed(9, 4) == int(jax.random.key_data(key)[1])


def test_grid_takes_both_ends():
    found = explore(draws=5, sampler="grid")
    assert [t.ratios[""][0] for t in found.trials] == [0, 0.25, 0.5, 0.75, 1]
    assert found.winner.ratios[""] == (0.25, 0.75)
    ends = [found.trials[-1].scores, found.trials[0].scores]
    parents = [row.scored["validation"].scores for row in found.rows[1:3]]
    assert ends == parents


def test_grid_of_three_models_and_scaling():
    recipe = m3jax.Recipe(method="task_arithmetic")
    space = Space.parse(["ratios", "scaling=1:3"], recipe, 3)
    found = space.grid(20)  # 6 ratios of three levels, 3 scalings
    assert len(found) == len({tuple(v.values()) for v in found}) == 18
    assert all(math.isclose(sum(v["ratios"]), 1) for v in found)
    assert {v["scaling"][0] for v in found} == {1, 2, 3}
    with pytest.raises(m3jax.RecipeError, match=r"draws=5 is too few .* needs 6"):
        space.grid(5)


def test_ratios_of_the_unit_cube_are_uniform_on_the_simplex():
    space = Space.parse(["ratios"], m3jax.Recipe(), 3)
    points = np.random.default_rng(0).random((20000, 2))
    ratios = np.array([space.values(point)["ratios"] for point in points])
    np.testing.assert_allclose(ratios.sum(1), 1, atol=1e-12)
    assert ratios.min() >= 0
    # Dirichlet(1, 1, 1): every marginal is Beta(1, 2), of mean 1/3, variance 1/18.
    np.testing.assert_allclose(ratios.mean(0), 1 / 3, atol=0.006)
    np.testing.assert_allclose(ratios.var(0), 1 / 18, atol=0.002)


def test_sobol_fills_the_range_evenly_and_goes_on():
    few = explore(draws=8, sampler="sobol", seed=2)
    many = explore(draws=16, sampler="sobol", seed=2)
    assert many.trials[:8] == few.trials
    lambdas = sorted(trial.ratios[""][0] for trial in many.trials)
    assert [int(16 * x) for x in lambdas] == list(range(16))
    assert explore(draws=8, sampler="sobol", seed=3).trials != few.trials


@pytest.mark.parametrize(("sampler", "count"), [("tpe", 2), ("cmaes", 2), ("cmaes", 3)])
def test_optimisers_come_near_the_best(sampler, count):
    pytest.importorskip("optuna")
    found = explore(draws=40, sampler=sampler, count=count, seed=1)
    assert found.winner.objective > -0.1
    later = [trial.objective for trial in found.trials[20:]]
    first = [trial.objective for trial in found.trials[:10]]
    assert np.mean(later) > np.mean(first)


def test_search_sets_every_field():
    recipe = m3jax.Recipe(method="ties")
    search = ["ratios", "scaling=2:3", "trim_rate=0.1:0.2", "drop_rates", "seed"]
    found = explore(recipe=recipe, draws=4, sampler="sobol", search=search, seed=5)
    for i, trial in enumerate(found.trials):
        own = trial.recipe
        assert trial.seed == trial_seed(5, i)
        assert own.mixup.ratios is not None
        assert 2 <= own.method.scaling <= 3
        assert 0.1 <= own.method.trim_rate <= 0.2
        (dare,) = own.transforms
        assert all(0 <= rate <= 0.9 for rate in dare.drop_rate)
        assert len(dare.drop_rate) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "anneal"}, "sampler='anneal' needs one of recipe, grid"),
        ({"sampler": "grid", "search": ["wobble"]}, "search='wobble' needs each once"),
        ({"sampler": "grid", "search": ["scaling"]}, "scaling does nothing in .*avera"),
        ({"sampler": "grid", "search": ["ratios", "trim_rate"]}, "trim_rate does noth"),
        ({"sampler": "grid", "search": ["drop_rate=0:2"]}, "drop_rate=2.0 needs a num"),
        ({"sampler": "grid", "search": ["drop_rate=2"]}, "search=drop_rate='2' needs"),
        ({"sampler": "sobol", "search": ["seed"]}, "more to search than seeds"),
        ({"sampler": "tpe", "halving": 2, "budget": 4}, "halving=2 needs a sampler"),
        ({"halving": 2}, "halving needs budget"),
        ({"halving": 1, "budget": 4}, "halving=1 needs 2 or more"),
        ({"draws": 0}, "draws=0 needs 1 or more"),
        ({"at_once": 0}, "at_once=0 needs 1 or more"),
        ({"generation": 0}, "generation=0 needs 1 or more"),
        (
            {"generation": 2},
            "generation=2 is for the samplers tpe, cmaes",
        ),
        ({"weights": {"far": 1.0}}, "'far' is no validation task; those are near"),
        ({"weights": {"near": 0.0}}, "one of them needs to be other than 0"),
        ({"recipe": m3jax.Recipe(mixup=m3jax.Mixup(alpha=None))}, "nothing is drawn"),
    ],
)
def test_errors_say_what_is_wrong(options, message):
    if options.get("sampler") == "tpe":
        pytest.importorskip("optuna")
    with pytest.raises(ValueError, match=message):
        explore(**{"draws": 8, **options})


def test_a_sampler_without_its_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(m3jax.RecipeError, match=r"pip install '\.\[explore\]'"):
        explore(sampler="tpe")


@pytest.mark.parametrize(
    ("searched", "strategy"),
    thin(["ratios", "trim_rate", "drop_rate", "seed"], ["random", "magnitude"]),
)
def test_draws_are_what_merge_params_gives(searched, strategy):
    """What draws have in common is measured once, and nothing more than that."""
    seen = []

    def evaluator(parameters, budget, key):
        seen.append(np.asarray(parameters["layer"]["weight"]))
        return {"score": 0.0}

    dare = m3jax.Dare(drop_rate=0.3, strategy=strategy)
    recipe = m3jax.Recipe(method="ties", dare=dare)
    search = [searched, *(["ratios"] if searched == "seed" else [])]
    found = explore(
        recipe=recipe, evaluator=evaluator, draws=4, sampler="sobol", search=search
    )
    base, *models = trees()
    for trial, weights in zip(found.trials, seen[5:], strict=False):
        merged = m3jax.merge_params(base, models, trial.recipe, trial.seed)
        np.testing.assert_array_equal(merged["layer"]["weight"], weights)


# What is compared and chosen.


def test_rows_and_choice():
    base, *models = trees()
    recipe = m3jax.Recipe(method="task_arithmetic")
    found = explore(draws=6, recipe=recipe, test=near(0.9, 0.1))
    names = ["base", "model 0", "model 1", "equal ratios", "plain task_arithmetic"]
    winner = max(found.trials, key=lambda trial: trial.objective)
    assert found.winner == winner
    assert [r.name for r in found.rows] == [*names, f"winner (draw {winner.index})"]
    half = m3jax.Recipe(method="task_arithmetic", mixup=m3jax.Mixup(ratios=(0.5, 0.5)))
    plain = m3jax.Recipe(method="task_arithmetic", mixup=m3jax.Mixup(alpha=None))
    made = [
        base,
        *models,
        m3jax.merge_params(base, models, half),
        m3jax.merge_params(base, models, plain),
        m3jax.merge_params(base, models, winner.recipe, winner.seed),
    ]
    for row, parameters in zip(found.rows, made, strict=True):
        for name, own in (("validation", near(0.3, 0.7)), ("test", near(0.9, 0.1))):
            assert row.scored[name].scores == own(parameters, None, None)


def test_weights_and_signs():
    def evaluator(parameters, budget, key):
        middle = float(parameters["layer"]["weight"].mean())
        return {"middle": middle, "cost": -middle, "other": 1.0}

    weights = {"middle": 3.0, "cost": -1.0}
    found = explore(draws=4, evaluator=evaluator, weights=weights)
    for trial in found.trials:
        middle = trial.scores["middle"]
        assert trial.objective == pytest.approx((3 * middle + middle + 1) / 5)


def test_a_draw_that_scores_nan_cannot_win():
    calls = []

    def evaluator(parameters, budget, key):
        calls.append(0)
        # Parents and baselines come first: five rows.
        return {"score": math.nan if len(calls) in (6, 7) else -float(len(calls))}

    found = explore(draws=4, evaluator=evaluator, sampler="sobol")
    assert [math.isnan(t.objective) for t in found.trials] == [True, True, False, False]
    assert found.winner.index == 2
    with pytest.raises(CheckpointError, match="every draw scored NaN"):
        explore(draws=2, evaluator=lambda *_: {"score": math.nan})


def test_test_scores_change_nothing_but_the_report(tmp_path):
    plain = explore(draws=4, test=near(1, 0), output=tmp_path / "plain")
    all_tested = explore(
        draws=4, test=near(0.1, 0.9), test_all_draws=True, output=tmp_path / "all"
    )
    assert plain.winner.index == all_tested.winner.index
    own = [t.other["test"]["near"] for t in all_tested.trials]
    label = "4 draws, mean ± deviation"
    summaries = {
        name: json.loads((tmp_path / name / "summary.json").read_text())
        for name in ("plain", "all")
    }
    assert label in summaries["plain"]["validation"]["rows"]
    assert label not in summaries["plain"]["test"]["rows"]
    cell = summaries["all"]["test"]["rows"][label]["near"]
    assert cell["mean"] == pytest.approx(np.mean(own))
    assert cell["standard_deviation"] == pytest.approx(np.std(own, ddof=1))


# Successive halving.


def test_rungs():
    assert rungs(27, 90, 3) == [Rung(27, 4), Rung(9, 10), Rung(3, 30), Rung(1, 90)]
    assert rungs(8, 2, 2) == [Rung(8, 1), Rung(1, 2)]
    assert rungs(1, 7, 2) == [Rung(1, 7)]
    assert rungs(5, None, None) == [Rung(5, None)]


def test_halving_keeps_the_best_of_each_rung():
    budgets = []

    def evaluator(parameters, budget, key):
        budgets.append(budget)
        return near(0.3, 0.7)(parameters, budget, key)

    found = explore(draws=8, evaluator=evaluator, halving=2, budget=80)
    assert budgets[5:] == [10] * 8 + [20] * 4 + [40] * 2 + [80, 80]
    assert budgets[:5] == [80] * 5  # parents and baselines
    first = found.trials[:8]
    order = sorted(first, key=lambda trial: -trial.objective)
    assert [t.index for t in found.trials[8:12]] == [t.index for t in order[:4]]
    assert found.winner.index == order[0].index
    assert found.winner.budget == 80
    assert found.draws == first


# Interrupted and resumed.


@pytest.mark.parametrize("sampler", ["recipe", "grid", "sobol", "tpe", "cmaes"])
def test_cut_anywhere_it_resumes_to_the_same_files(sampler, tmp_path):
    if sampler in ("tpe", "cmaes"):
        pytest.importorskip("optuna")
    options = {"sampler": sampler, "draws": 12, "seed": 4, "test": near(0.5, 0.5)}
    if sampler == "sobol":
        options |= {"halving": 3, "budget": 9}
    whole = explore(output=tmp_path / "whole", **options)
    expected = contents(tmp_path / "whole")
    generator = random.Random(sampler)
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        trials = expected["trials.jsonl"].encode()
        kept = generator.randrange(len(trials))  # often in the middle of a line
        (folder / "trials.jsonl").write_bytes(trials[:kept])
        rows = expected["scores.jsonl"].encode()
        kept = rows[: generator.randrange(rows.index(b"winner"))]
        (folder / "scores.jsonl").write_bytes(kept)
        resumed = explore(output=folder, resume=True, **options)
        assert contents(folder) == expected
        assert resumed.winner == whole.winner


def test_an_error_half_way_is_resumed(tmp_path):
    calls = []

    def evaluator(parameters, budget, key):
        calls.append(0)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return near(0.3, 0.7)(parameters, budget, key)

    options = {"evaluator": evaluator, "draws": 6, "output": tmp_path / "a"}
    with pytest.raises(KeyboardInterrupt):
        explore(**options)
    with pytest.raises(CheckpointError, match="--resume goes on with it, --overwrite"):
        explore(**options)
    resumed = explore(resume=True, **options)
    assert len(calls) == 5 + 6 + 1 + 1  # nothing twice but the one that was lost
    explore(draws=6, evaluator=evaluator, output=tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    again = explore(resume=True, **options)
    assert again.winner == resumed.winner
    more = explore(resume=True, **{**options, "draws": 9})
    assert more.trials[:6] == resumed.trials


def test_what_is_resumed_must_be_the_same(tmp_path):
    explore(draws=3, output=tmp_path)
    with pytest.raises(CheckpointError, match="was begun with seed = 0, now it is 1"):
        explore(draws=3, seed=1, output=tmp_path, resume=True)
    recipe = m3jax.Recipe(mixup=m3jax.Mixup(alpha=2.0))
    with pytest.raises(CheckpointError, match="was begun with recipe = "):
        explore(draws=3, recipe=recipe, output=tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="was begun with models = "):
        explore(draws=3, count=3, output=tmp_path, resume=True)
    lines = (tmp_path / "trials.jsonl").read_text().splitlines()
    lines[2] = lines[2].replace('"seed": ', '"seed": 1')
    (tmp_path / "trials.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(CheckpointError, match="trial 1, which was evaluated before"):
        explore(draws=3, output=tmp_path, resume=True)
    explore(draws=3, seed=1, output=tmp_path, overwrite=True)


def test_same_seed_same_files(tmp_path):
    for name, seed in (("a", 6), ("b", 6), ("c", 7)):
        explore(draws=4, seed=seed, output=tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


def test_without_matplotlib_the_rest_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "m3jax.exploration.report.picture", raising=False)
    monkeypatch.delattr(m3jax.exploration.report, "picture", raising=False)
    said = []
    explore(draws=2, output=tmp_path, say=said.append)
    assert said[-1].endswith("install it from a checkout: pip install '.[plot]'")
    assert contents(tmp_path)
    assert not (tmp_path / "scores.png").exists()


@pytest.mark.parametrize("count", [2, 3])
def test_picture(count, tmp_path):
    pytest.importorskip("matplotlib")
    explore(draws=4, count=count, output=tmp_path)
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_a_recipe_without_ratios_has_a_picture_too(tmp_path):
    pytest.importorskip("matplotlib")
    masks = m3jax.Recipe(mixup=m3jax.Mixup(alpha=None), dare=m3jax.Dare(drop_rate=0.5))
    found = explore(recipe=masks, draws=2, output=tmp_path)
    assert [row.name for row in found.rows[3:-1]] == ["plain average"]
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")


# Several draws at once.


@pytest.mark.parametrize("at_once", [3, 11])  # there are eight devices
def test_draws_at_once_change_no_file(at_once, tmp_path):
    recipe = m3jax.Recipe(method="ties", dare=m3jax.Dare(drop_rate=0.2))
    options = {"recipe": recipe, "draws": 16, "sampler": "sobol", "seed": 8}
    options |= {"search": ["ratios", "trim_rate", "seed"], "halving": 4, "budget": 16}
    explore(output=tmp_path / "one", **options)
    used = set()

    def evaluator(parameters, budget, key):
        (device,) = parameters["layer"]["weight"].devices()
        used.add(device)
        time.sleep(random.random() / 100)  # they end in another order
        return near(0.3, 0.7)(parameters, budget, key)

    evaluator.__qualname__ = near(0.3, 0.7).__qualname__
    evaluator.__module__ = near.__module__
    explore(evaluator=evaluator, output=tmp_path / "more", at_once=at_once, **options)
    assert contents(tmp_path / "more") == contents(tmp_path / "one")
    assert len(used) == min(at_once, 8)


def test_places_that_share_a_merger_do_not_share_what_one_of_them_measured():
    """Whatever a draw leaves for later draws, another may replace at any moment."""

    class Replaced(Merger):
        @property
        def _measured(self):
            return {}

        @_measured.setter
        def _measured(self, value):
            pass

    base, *models = trees()
    recipe = m3jax.Recipe(method="ties")
    merged = Replaced(base, models, recipe)(recipe, 3)
    expected = m3jax.merge_params(base, models, recipe, 3)
    np.testing.assert_array_equal(
        merged["layer"]["weight"], expected["layer"]["weight"]
    )


@pytest.mark.parametrize("sampler", ["tpe", "cmaes"])
def test_a_generation_is_proposed_at_once(sampler, tmp_path):
    pytest.importorskip("optuna")
    options = {"sampler": sampler, "draws": 26, "seed": 2, "count": 3}
    used = {}

    def evaluator(parameters, budget, key):
        used.setdefault(name, set()).update(parameters["layer"]["weight"].devices())
        return near(0.2, 0.3, 0.5)(parameters, budget, key)

    options["evaluator"] = evaluator
    for name, more in {
        "alone": {"generation": 4},
        "together": {"generation": 4, "at_once": 4},
        "one by one": {"at_once": 4},  # no device holds models in vain
    }.items():
        explore(output=tmp_path / name, **options, **more)
    devices = {name: len(own) for name, own in used.items()}
    assert devices == {"alone": 1, "together": 4, "one by one": 1}
    together = contents(tmp_path / "together")
    assert together == contents(tmp_path / "alone")
    assert together["winner.json"] != contents(tmp_path / "one by one")["winner.json"]
    with pytest.raises(CheckpointError, match="was begun with generation = 4"):
        explore(output=tmp_path / "alone", resume=True, **options)


def test_an_error_among_draws_at_once_costs_none_before_it(tmp_path):
    seventh = explore(draws=12).trials[6].scores
    fails = [True]

    def evaluator(parameters, budget, key):
        scores = near(0.3, 0.7)(parameters, budget, key)
        if fails[0] and scores == seventh:
            raise OSError("out of luck")
        return scores

    options = {"evaluator": evaluator, "draws": 12, "at_once": 3}
    with pytest.raises(OSError, match="out of luck"):
        explore(output=tmp_path / "a", **options)
    lines = (tmp_path / "a" / "trials.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines[1:]] == list(range(6))
    fails[0] = False
    explore(output=tmp_path / "a", resume=True, **options)
    explore(output=tmp_path / "b", **options)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_models_on_several_devices_together_come_one_draw_at_a_time():
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    base, *models = jax.tree.map(lambda x: jax.device_put(x, split), trees())
    options = {"evaluator": near(0.3, 0.7), "draws": 3}
    with pytest.raises(m3jax.RecipeError, match="at_once=2 needs to be 1"):
        m3jax.explore(base, models, at_once=2, **options)
    found = m3jax.explore(base, models, at_once=None, **options)
    assert found.trials == explore(draws=3).trials


# Device memory and compilations.


def test_device_memory_holds_one_merged_copy(tmp_path):
    folders = []
    for i, tree in enumerate(trees()):
        folders.append(str(tmp_path / str(i)))
        m3jax.save(tree, folders[-1])
    model = SIZE * 4
    held = []

    def evaluator(parameters, budget, key):
        arrays = [a for a in jax.live_arrays() if a.nbytes >= SIZE]
        held.append(sum(array.nbytes for array in arrays) - before)
        return near(0.3, 0.7)(parameters, budget, key)

    recipe = m3jax.Recipe(method="ties", dare=m3jax.Dare(drop_rate=0.1))
    before = sum(a.nbytes for a in jax.live_arrays() if a.nbytes >= SIZE)
    m3jax.explore(folders[0], folders[1:], recipe, evaluator=evaluator, draws=4)
    assert held == [3 * model] * 3 + [4 * model] * 7  # base, two models, one merge


def test_device_memory_holds_a_merged_copy_for_each_draw_at_once():
    def copies() -> int:
        # Masks and codes of a tensor that another draw is merging come and go.
        own = [a for a in jax.live_arrays() if a.shape == (SIZE,)]
        return sum(a.dtype == jnp.float32 for a in own)

    held = []

    def evaluator(parameters, budget, key):
        held.append(copies() - before)
        time.sleep(0.01)
        return near(0.3, 0.7)(parameters, budget, key)

    recipe = m3jax.Recipe(method="ties", dare=m3jax.Dare(drop_rate=0.1))
    before = copies()
    explore(recipe=recipe, evaluator=evaluator, draws=24, at_once=11)
    assert held[:5] == [3] * 3 + [8 * 3 + 1] * 2  # the parents; each device's, and one
    assert 8 * 3 + 1 < max(held) <= 8 * 3 + 11


@pytest.fixture
def compiled():
    """Programs that XLA has compiled so far, in a list of one number."""
    found = [0]

    def listen(event: str, duration: float, **_: object) -> None:
        found[0] += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("method", [slow("average"), slow("task_arithmetic"), "ties"])
def test_one_compilation_serves_all_draws_of_a_device(method, compiled):
    counts = []

    def evaluator(parameters, budget, key):
        counts.append(compiled[0])
        return {"score": 0.0}

    search = ["ratios", "drop_rates", "seed"]
    search += {"average": [], "task_arithmetic": ["scaling"]}.get(
        method, ["scaling", "trim_rate"]
    )
    options = {
        "recipe": m3jax.Recipe(method=method, dare=m3jax.Dare(drop_rate=0.5)),
        "draws": 8,
        "sampler": "sobol",
        "search": search,
        "evaluator": evaluator,
    }
    jax.clear_caches()
    explore(**options)
    # The baselines are merges, too: the first of them, behind three parents, compiles.
    assert len(set(counts[3:])) == 1, counts
    once, before = counts[3] - counts[2], compiled[0]
    assert once > 0
    explore(**options, at_once=4)
    assert compiled[0] - before <= 3 * once  # for three more devices
    before = compiled[0]
    explore(**{**options, "draws": 16}, at_once=4, seed=1)
    assert compiled[0] == before
