"""Merging systems beside M3: golden numbers, oracles in NumPy, identities.

`golden_systems` holds what the systems' own code gives on small models; the other
tests run over random models with a matrix and tensors that are none.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import slow, thinned

import m3jax
from m3jax.engine.draws import tables
from m3jax.engine.jobs import jobs
from m3jax.engine.kernel import take
from m3jax.methods import METHODS
from m3jax.methods.step import Operands, Problem, Reduction, run_statistics

GOLDEN = Path(__file__).parent / "golden_systems"
CALLS = {"merge_params", "consensus_and_tall", "multitask_emr", "regmean_outputs"}
CASES = [
    case
    for case in json.loads((GOLDEN / "cases.json").read_text())
    if case["call"] in CALLS
]
SHAPES = {
    "model.layers.0.q_proj.weight": (61, 29),
    "model.layers.0.experts.weight": (3, 5, 7),
    "model.layers.1.scale": (),
    "model.layers.1.nothing.weight": (0, 4),
}
NAMES = [name for name, shape in SHAPES.items() if 0 not in shape]
FEW = ("model.layers.0.q_proj.weight", "model.layers.1.scale")
# What is merged with each method; the rest of its options are the defaults.
OPTIONS: dict[str, dict[str, Any]] = {
    "consensus": {"mask_scale": 0.4},
    "emr": {"rescale": "mean"},
    "iso_c": {},
    "iso_cts": {"common_fraction": 0.6},
    "localize_and_stitch": {"share": 0.3},
    "magmax": {},
    "metagpt": {},
    "pcb": {"ratio": 0.3, "clip": 0.01},
    "ram": {"epsilon": 0.001},
    "ram_plus": {"epsilon": 0.003, "boost": 1.5},
    "star": {"energy": 0.6},
    "tsv_m": {},
    "wudi": {"steps": 12},
}
WITH_STATISTICS: dict[str, dict[str, Any]] = {
    "df_merge": {"coefficients": (0.2, 0.9, 0.5)},
    "fisher": {},
    "regmean": {},
}


def by_call(*calls: str) -> list[Any]:
    named = [(f"{case['system']}-{case['name']}", case) for case in CASES]
    return [pytest.param(c, id=name) for name, c in named if c["call"] in calls]


def test_all_cases_are_here():
    assert len(CASES) == 45
    assert {case["options"].get("method") for case in CASES} - {None} == {
        *("tsv_m", "iso_c", "iso_cts", "consensus", "pcb", "wudi", "magmax"),
        *("fisher", "regmean", "df_merge"),
    }


NAMED = {(case["system"], case["name"]) for case in CASES}


def few(param: Any) -> bool:
    """Four and eight models compile as much as all others together; three, where
    two are there as well, as much as these."""
    case = param.values[0]
    many = ["four", "eight", *["three"] * ((case["system"], "two") in NAMED)]
    return case["name"] not in (*many, "a10")


@pytest.mark.parametrize(
    "case", thinned(by_call("merge_params", "consensus_and_tall"), few)
)
def test_merges(case: dict[str, Any]):
    base, *models = load(case, case["inputs"]["base"], *case["inputs"]["models"])
    recipe = recipe_of(**case["options"])
    if "statistics" in case["inputs"]:
        beside = load(case, *case["inputs"]["statistics"])
        merged = applied(base, models, recipe, beside)
    else:
        merged = m3jax.merge_params(base, models, recipe, 0)
    check(case, "merged", merged)


EMR = {case["name"]: case for case in CASES if case["call"] == "multitask_emr"}


RESCALED = {"three": "l2", "zeros": "sum"}  # of five; OPTIONS has the mean


@pytest.mark.parametrize(
    ("name", "rescale"),
    thinned(
        itertools.starmap(pytest.param, itertools.product(EMR, ["sum", "mean", "l2"])),
        lambda case: RESCALED.get(case.values[0]) == case.values[1],
    ),
)
def test_emr(name: str, rescale: str):
    case = EMR[name]
    base, *models = load(case, case["inputs"]["base"], *case["inputs"]["models"])
    result = m3jax.multitask.emr(base, models, rescale=rescale)
    check(case, "delta", result.delta, 0)
    check_masks(case, result.masks)
    scales = np.load(GOLDEN / case["outputs"]["scales"])[rescale]
    np.testing.assert_allclose(result.scales, scales, rtol=0, atol=1e-5)
    for k in range(len(models)):
        if f"model_{rescale}_{k}" in case["outputs"]:
            rebuilt = m3jax.multitask.modulate(base, result, k)
            check(case, f"model_{rescale}_{k}", rebuilt)


@pytest.mark.parametrize("case", thinned(by_call("consensus_and_tall"), few))
def test_tall(case: dict[str, Any]):
    base, *models = load(case, case["inputs"]["base"], *case["inputs"]["models"])
    scale = case["options"]["consensus"]["mask_scale"]
    result = m3jax.multitask.tall(base, models, mask_scale=scale)
    check_masks(case, result.masks)
    assert result.scales.tolist() == [1.0] * len(models)
    for name, delta in result.delta.items():
        expected = sum(model[name] - base[name] for model in models)
        np.testing.assert_array_equal(delta, expected)
    rebuilt = m3jax.multitask.modulate(base, result, 1)
    for name, own in rebuilt.items():
        kept = np.asarray(result.masks[name][1])
        moved = np.asarray(result.delta[name]) * kept
        np.testing.assert_array_equal(own, base[name] + moved)


def test_multitask_says_what_is_wrong():
    base, *models = ({"a": np.float32([1, own])} for own in (2, 3, 4))
    with pytest.raises(
        ValueError, match=r"mask_scale=\(0.4,\) .* each of the 2 models"
    ):
        m3jax.multitask.tall(base, models, mask_scale=(0.4,))
    with pytest.raises(m3jax.RecipeError, match=r"emr\.rescale='max' .*sum, mean, l2"):
        m3jax.multitask.emr(base, models, rescale="max")
    result = m3jax.multitask.tall(base, models)
    with pytest.raises(IndexError, match="k=2 needs 0 to 1"):
        m3jax.multitask.modulate(base, result, 2)
    # Nested trees, and leaves that the result lacks or that are no floats.
    tree = {"a": {"b": np.float32([1, 2])}, "step": np.int32(3)}
    other = {"a": {"b": np.float32([3, 2])}, "step": np.int32(3)}
    result = m3jax.multitask.emr(tree, [other])
    assert result.masks["a"]["b"].tolist() == [[True, False]]
    rebuilt = m3jax.multitask.modulate({**tree, "head": np.float32([7])}, result, 0)
    assert rebuilt["a"]["b"].tolist() == [3, 2]
    assert (rebuilt["step"], rebuilt["head"].tolist()) == (3, [7])


def test_regmean_reproduces_the_outputs_of_experts_on_their_inputs():
    (case,) = (case for case in CASES if case["call"] == "regmean_outputs")
    arrays = np.load(GOLDEN / case["inputs"]["arrays"])
    models = [{"a": arrays[f"w{k}"].astype(np.float32)} for k in (0, 1)]
    inputs = [arrays[f"x{k}"] for k in (0, 1)]
    grams = [{"a": (x.T @ x / len(x)).astype(np.float32)} for x in inputs]
    recipe = recipe_of(method="regmean", regmean=case["options"])
    merged = np.asarray(applied(None, models, recipe, grams)["a"])
    for model, x in zip(models, inputs, strict=True):
        difference = np.abs(x @ merged.T - x @ model["a"].T).max()
        assert difference <= case["tolerance"]["absolute"]


@pytest.mark.parametrize("condition", [1e2, 1e5, math.inf])
def test_regmean_on_ill_conditioned_inputs(condition: float):
    """The equations hold, and what they leave open is near the mean."""
    generator = np.random.default_rng(0)
    spread = np.geomspace(1, 1 / condition, 24) if condition < math.inf else np.ones(24)
    spread[20:] *= condition < math.inf
    turn = np.linalg.qr(generator.normal(size=(24, 24)))[0]
    turned = spread[:, None] ** 0.5 * turn.T
    inputs = [generator.normal(size=(60, 24)) @ turned for _ in range(3)]
    if condition == math.inf:
        inputs = [x * (np.arange(24) != 5) for x in inputs]  # always 0
    grams = [{"a": (x.T @ x / len(x)).astype(np.float32)} for x in inputs]
    models = [
        {"a": generator.normal(size=(9, 24)).astype(np.float32)} for _ in range(3)
    ]
    recipe = recipe_of(method="regmean", regmean={"nondiagonal": 1.0})
    merged = np.asarray(applied(None, models, recipe, grams)["a"], np.float64)
    wide = [own["a"].astype(np.float64) for own in grams]
    right = sum(g @ m["a"].T for g, m in zip(wide, models, strict=True))
    residual = np.abs(sum(wide) @ merged.T - right).max()
    assert residual <= 3e-6 * np.abs(right).max()
    mean = sum(own["a"] for own in models) / 3
    if condition == math.inf:
        assert np.abs(merged - mean).max() < 3
        np.testing.assert_allclose(merged[:, 5], mean[:, 5], rtol=0, atol=1e-6)


@pytest.mark.slow  # test_contract has them with their defaults
@pytest.mark.parametrize("method", OPTIONS)
def test_executors_agree_to_the_bit(method: str, tmp_path: Path):
    base, *models = random_models(2)
    folders = [
        checkpoints.write(tmp_path / str(i), own)
        for i, own in enumerate([base, *models])
    ]
    alpha = 0.4 if "weights" in METHODS[method].fields() else None
    options = {method: OPTIONS[method]}
    recipe = recipe_of(method=method, **options, mixup={"alpha": alpha})
    in_memory = m3jax.merge_params(base, models, recipe, 3)
    if "" in in_memory:  # EMR's masks are files of their own
        in_memory = in_memory[""]
    for i, execution in enumerate(
        (
            m3jax.Execution(chunk_size=1024),
            m3jax.Execution(executor="sharded", mesh={"rows": 4, "columns": 2}),
        )
    ):
        output = tmp_path / f"merged-{i}"
        m3jax.merge(
            folders[0], folders[1:], output, recipe, seed=3, execution=execution
        )
        written = checkpoints.read(output)
        for name, tensor in in_memory.items():
            np.testing.assert_array_equal(written[name], tensor, err_msg=name)


# Merges of K copies of one model are base + FACTOR · its task vector.
EQUAL: dict[str, tuple[dict[str, Any], float]] = {
    "consensus": ({"min_models": 3, "mask_scale": 0.4}, 3.0),
    "localize_and_stitch": ({"share": 1.0}, 1.0),
    "magmax": ({}, 1.0),
    "metagpt": ({}, 1.0),
    "ram": ({"epsilon": 0.0}, 1.0),
    "ram_plus": ({"epsilon": 0.0}, 1.0),
    "star": ({"energy": 1.0}, 1.0),
    "emr": ({}, 1.0),
    "wudi": ({"steps": 0}, 3.0),
    "fisher": ({}, 1.0),
    "regmean": ({}, 1.0),
    "df_merge": ({"coefficients": 1 / 3}, 1.0),
}


@pytest.mark.parametrize("method", EQUAL)
def test_equal_models(method: str):
    base, model = random_models(1)
    options, factor = EQUAL[method]
    beside = statistics(method, 3) if method in WITH_STATISTICS else None
    merged = run(base, [model] * 3, method, options, beside)
    for name in NAMES:
        # WUDI's tensors that are no matrices get the mean of the task vectors.
        own = 1.0 if method == "wudi" and len(SHAPES[name]) != 2 else factor
        expected = base[name] + own * (model[name] - base[name])
        np.testing.assert_allclose(merged[name], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", sorted({*METHODS} - {"magmax"}))
def test_order_of_models(method: str):
    """It tells nothing; where magnitudes are equal, MagMax takes the later model's."""
    base, models, options, beside = inputs_of(method)
    order = [*range(1, len(models)), 0]
    moved = {
        name: tuple(own[i] for i in order) if isinstance(own, tuple) else own
        for name, own in options.items()
    }
    merged = run(base, models, method, options, beside)
    other = run(
        base,
        [models[i] for i in order],
        method,
        moved,
        None if beside is None else [beside[i] for i in order],
    )
    assert_close(merged, other, 2e-6)


# What merges task vectors alone is homogeneous in them and does not see the base.
ON_SPHERES = dict.fromkeys(
    ("slerp", "nuslerp", "multislerp", "karcher"), "the directions of whole weights"
)
NOT_HOMOGENEOUS: dict[str, str] = {
    **ON_SPHERES,
    "arcee_fusion": "a softmax of the weights",
    "coefficients": "those of the models need not sum to 1",
    "nearswap": "moves each entry by at most t",
    "pcb": "the tanh of task vectors",
    "wudi": "a learning rate",
}
SEES_THE_BASE: dict[str, str] = {
    **ON_SPHERES,
    **{name: NOT_HOMOGENEOUS[name] for name in ("arcee_fusion", "coefficients")},
}


@pytest.mark.parametrize("method", sorted({*METHODS} - {*NOT_HOMOGENEOUS}))
def test_task_vectors_of_twice_the_size(method: str):
    base, models, options, beside = inputs_of(method)
    if "epsilon" in options:
        options["epsilon"] = 0.0
    merged = run(base, models, method, options, beside)
    doubled = [{n: 2 * m[n] - base[n] for n in base} for m in models]
    twice = run(base, doubled, method, options, beside)
    expected = {name: 2 * merged[name] - base[name] for name in base}
    assert_close(twice, expected, 2e-6)


@pytest.mark.parametrize("method", sorted({*METHODS} - {*SEES_THE_BASE}))
def test_another_base(method: str):
    """What is added to the base and to all models is added to the result."""
    base, models, options, beside = inputs_of(method)
    merged = run(base, models, method, options, beside)
    shift = random_models(0, seed=7)[0]
    moved = [{n: own[n] + shift[n] for n in base} for own in (base, *models)]
    other = run(moved[0], moved[1:], method, options, beside)
    assert_close(other, {n: merged[n] + shift[n] for n in base}, 2e-6)


@pytest.mark.parametrize("method", sorted({*NOT_HOMOGENEOUS, *SEES_THE_BASE}))
def test_what_is_said_to_see_more_does(method: str):
    base, models, options, beside = inputs_of(method)
    merged = run(base, models, method, options, beside)
    if method in NOT_HOMOGENEOUS:
        doubled = [{n: 2 * m[n] - base[n] for n in base} for m in models]
        twice = run(base, doubled, method, options, beside)
        wanted = {name: 2 * merged[name] - base[name] for name in base}
        assert max(np.abs(twice[n] - wanted[n]).max(initial=0) for n in base) > 2e-6
    if method in SEES_THE_BASE:
        shift = random_models(0, seed=7)[0]
        moved = [{n: own[n] + shift[n] for n in base} for own in (base, *models)]
        other = run(moved[0], moved[1:], method, options, beside)
        wanted = {name: merged[name] + shift[name] for name in base}
        assert max(np.abs(other[n] - wanted[n]).max(initial=0) for n in base) > 2e-6


WEIGHED = [name for name in OPTIONS if "weights" in METHODS[name].fields()]


@pytest.mark.parametrize("method", WEIGHED)
def test_ratios_multiply_the_task_vectors(method: str):
    base, *models = random_models(2)
    options = dict(OPTIONS[method])
    if "epsilon" in options:  # which is of the task vectors themselves
        options["epsilon"] = 0.0
    ratios = (0.75, 0.25)
    recipe = recipe_of(
        method=method, **{method: options}, mixup={"alpha": None, "ratios": ratios}
    )
    merged = m3jax.merge_params(base, models, recipe, 0)
    scaled = [
        {name: base[name] + ratio * (model[name] - base[name]) for name in base}
        for ratio, model in zip(ratios, models, strict=True)
    ]
    assert_close(merged, run(base, scaled, method, options), 2e-6)
    given = run(base, models, method, {**options, "weights": ratios})
    assert_close(merged, given, 0)


@pytest.mark.parametrize("method", sorted({*OPTIONS, *WITH_STATISTICS} - {*WEIGHED}))
def test_methods_without_ratios_refuse_them(method: str):
    if method in ("fisher", "regmean"):
        pytest.skip("their ratios are the models' weights")
    recipe = recipe_of(
        method=method,
        **{method: {**OPTIONS, **WITH_STATISTICS}[method]},
        mixup={"alpha": 0.4},
    )
    base, *models = random_models(3)
    with pytest.raises(m3jax.RecipeError, match=f"method {method} has no ratios"):
        m3jax.merge_params(base, models, recipe, 0)


def test_df_merge_needs_its_coefficients():
    with pytest.raises(m3jax.RecipeError, match=r"df_merge\.coefficients=None needs"):
        recipe_of(method="df_merge")


def test_pcb_wants_one_ratio_for_the_whole_model():
    base, *models = random_models(2)
    recipe = recipe_of(method="pcb", mixup={"alpha": 0.4, "granularity": "tensor"})
    with pytest.raises(ValueError, match=r"pcb\.weights differs between tensors"):
        m3jax.merge_params(base, models, recipe, 0)


@pytest.mark.parametrize("method", [slow("pcb"), "iso_cts", "wudi", "ram_plus"])
def test_under_jit(method: str):
    base, *models = random_models(2)
    small = NAMES[:2]
    base, *models = [{n: jnp.asarray(own[n]) for n in small} for own in (base, *models)]
    recipe = recipe_of(method=method, **{method: OPTIONS[method]})
    merged = m3jax.merge_params(base, models, recipe, 0)
    jitted = jax.jit(lambda base, models: m3jax.merge_params(base, models, recipe, 0))
    assert_close(jitted(base, models), merged, 1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"ratio": 0.0}, {"ratio": 1.0, "clip": 0.2}, {"ratio": 0.97}]
)
@pytest.mark.parametrize("num_models", [1, 2, 5])
def test_pcb(options: dict[str, Any], num_models: int):
    base, *models = random_models(num_models)
    merged = run(base, models, "pcb", options)
    taus = flat(base, models)
    n, ratio, clip = taus.shape[1], options.get("ratio", 0.1), options.get("clip", 1e-4)
    size = cut(np.abs(taus), int(n * clip), int(n * (1 - clip) - 1))
    within = np.exp(num_models * normalized(size) ** 2)
    balance = within * np.tanh(taus * taus.sum(0))
    weight = normalized(cut(balance, min(int(n * (1 - ratio)), n - 1), n - 1))
    moved = (np.sign(taus) * size * weight).sum(0) / np.maximum(weight.sum(0), 1e-12)
    # Where hardly anything weighs, rounding in β decides: 0.003 of a task vector.
    np.testing.assert_allclose(flat(base, [merged])[0], moved, rtol=0, atol=2e-5)


def test_pcb_of_models_that_oppose_each_other():
    """All β are negative, and a task vector of one value has nothing to weigh by."""
    base = {"a": np.zeros(6, np.float32)}
    first = np.float32([1, -2, 3, -4, 5, -6])
    merged = run(base, [{"a": first}, {"a": -2 * first}], "pcb", {"ratio": 1.0})
    taus = np.stack([first, -2 * first]).astype(np.float64)
    size = cut(np.abs(taus), 0, 4)
    balance = np.exp(2 * normalized(size) ** 2) * np.tanh(taus * taus.sum(0))
    weight = normalized(balance)
    expected = (np.sign(taus) * size * weight).sum(0) / np.maximum(weight.sum(0), 1e-12)
    np.testing.assert_allclose(merged["a"], expected, rtol=0, atol=1e-5)
    flat_one = {"a": np.full(6, 2, np.float32)}
    assert run(base, [flat_one], "pcb", {})["a"].tolist() == [0] * 6
    assert run(base, [base], "pcb", {})["a"].tolist() == [0] * 6


def test_star():
    base, *models = random_models(3)
    merged = run(base, models, "star", {"energy": 0.4}, scaling=0.7)
    for name in NAMES:
        taus = [model[name].astype(np.float64) - base[name] for model in models]
        if len(SHAPES[name]) == 2:
            taus = list(map(truncated, taus))
        expected = base[name] + 0.7 * np.mean(taus, 0)
        np.testing.assert_allclose(merged[name], expected, rtol=0, atol=1e-6)
    assert_close(run(base, [base, base], "star", {}), base, 0)


def truncated(tau: np.ndarray) -> np.ndarray:
    left, values, right = np.linalg.svd(tau, full_matrices=False)
    total = np.cumsum(values)
    rank = int(np.argmax(total >= 0.4 * total[-1])) + 1
    return left[:, :rank] * values[:rank] @ right[:rank] * total[-1] / total[rank - 1]


def test_metagpt():
    base, *models = random_models(3)
    models[1] = {n: base[n] + 3 * (models[1][n] - base[n]) for n in base}
    taus = flat(base, models)
    squares = (taus**2).sum(1)
    merged = run(base, models, "metagpt", {}, scaling=0.7)
    expected = 0.7 * (squares / squares.sum()) @ taus
    np.testing.assert_allclose(flat(base, [merged])[0], expected, rtol=0, atol=1e-6)
    assert_close(run(base, [base, base], "metagpt", {}), base, 0)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9, 1.0])
def test_localize_and_stitch(share: float):
    base, *models = random_models(3)
    models[2] = {n: np.where(m > base[n], m, base[n]) for n, m in models[2].items()}
    taus = flat(base, models)
    count = max(int(taus.shape[1] * share), 1)
    least = np.sort(np.abs(taus), axis=1)[:, -count][:, None]
    masks = (np.abs(taus) >= least) & (taus != 0)
    expected = (taus * masks).sum(0) / np.maximum(masks.sum(0), 1)
    merged = run(base, models, "localize_and_stitch", {"share": share})
    np.testing.assert_allclose(flat(base, [merged])[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["ram", "ram_plus"])
def test_ram(method: str):
    base, *models = random_models(3)
    generator = np.random.default_rng(1)
    for k, rate in enumerate(
        (0.9, 0.8, 0.7)
    ):  # sparse changes, as reinforcement makes them
        for name, tensor in models[k].items():
            kept = generator.random(tensor.shape) > rate
            models[k][name] = np.where(kept, tensor, base[name])
    taus = flat(base, models)
    changed = np.abs(taus) > 1e-5
    count = changed.sum(0)
    if method == "ram_plus":
        unique = (changed & (count == 1)).sum(1)
        overlap = (changed & (count > 1)).sum(1)
        boost = 1 + 0.2 * np.minimum(1, overlap / unique)
        assert 1 < boost[0] < 1.2  # not all at the bound
        taus = np.where(count == 1, taus * boost[:, None], taus)
    merged = run(base, models, method, {})
    expected = (taus * changed).sum(0) / np.maximum(count, 1)
    np.testing.assert_allclose(flat(base, [merged])[0], expected, rtol=0, atol=1e-6)
    assert_close(run(base, [base, base], method, {}), base, 0)


def test_wudi_goes_downhill_and_skips_tasks_of_zero():
    base, *models = random_models(2)
    name = "model.layers.0.q_proj.weight"
    models = [{name: model[name]} for model in models]
    base = {name: base[name]}
    taus = [model[name] - base[name] for model in models]

    def loss(params: Mapping[str, Any]) -> float:
        moved = np.asarray(params[name]) - base[name]
        return sum(
            (np.linalg.norm((moved - t) @ t.T) / np.linalg.norm(t)) ** 2 for t in taus
        )

    options = {"learning_rate": 1e-3}
    losses = [
        loss(run(base, models, "wudi", {**options, "steps": steps}))
        for steps in (0, 10, 100)
    ]
    assert losses[0] > 1.2 * losses[1] > 1.2 * losses[2]
    with_zero = run(base, [*models, base], "wudi", {**options, "steps": 10})
    without = run(base, models, "wudi", {**options, "steps": 10})
    assert_close(with_zero, without, 1e-7)


def test_spectral_methods_on_tasks_that_are_zero():
    (base,) = random_models(0)
    for method in ("iso_c", "iso_cts", "star", "tsv_m", "wudi"):
        assert_close(run(base, [base, base], method, OPTIONS[method]), base, 0)
    low = dict(base)
    for name in NAMES:
        if len(SHAPES[name]) == 2:
            rows, columns = (np.ones(size, np.float32) / 64 for size in SHAPES[name])
            low[name] = base[name] + np.outer(rows, columns)
    # What all tasks have in common is no task's own: no direction out of nothing.
    merged = run(base, [low, low], "iso_cts", {"common_fraction": 0.8})
    for name in NAMES:
        if len(SHAPES[name]) == 2:
            factor = 2 / min(SHAPES[name])
            expected = base[name] + factor * (low[name] - base[name])
            np.testing.assert_allclose(merged[name], expected, rtol=0, atol=1e-6)


def test_fisher_where_nothing_is_known():
    models = [{"a": np.float32([1, 2]), "b": np.float32([3])} for _ in range(2)]
    models[1] = {"a": np.float32([3, 6]), "b": np.float32([7])}
    beside = [{"a": np.float32([0, 1])}, {"a": np.float32([0, 3])}]
    merged = run(None, models, "fisher", {"normalize": "none", "floor": 0.0}, beside)
    assert (merged["a"].tolist(), merged["b"].tolist()) == ([2, 5], [5])
    first = {"normalize": "l2", "floor": 0.0, "floor_rule": "first_max"}
    assert run(None, models, "fisher", first, beside)["a"].tolist() == [1, 4]
    unknown = [{"a": np.zeros(2, np.float32)}] * 2
    assert run(None, models, "fisher", first, unknown)["a"].tolist() == [1, 2]


def load(case: dict[str, Any], *files: str | None) -> list[Any]:
    del case
    return [
        None if file is None else checkpoints.decode((GOLDEN / file).read_bytes())
        for file in files
    ]


def check(
    case: dict[str, Any], output: str, merged: Any, tolerance: float | None = None
) -> None:
    (expected,) = load(case, case["outputs"][output])
    assert set(merged) == set(expected)
    tolerance = case["tolerance"]["absolute"] if tolerance is None else tolerance
    assert_close(merged, expected, tolerance)


def check_masks(case: dict[str, Any], masks: Any) -> None:
    packed = np.load(GOLDEN / case["outputs"]["masks"])
    assert len(packed.files) == sum(len(own) for own in masks.values())
    for key in packed.files:
        k, name = key.split("/")
        own = np.packbits(np.asarray(masks[name])[int(k)])
        np.testing.assert_array_equal(own, packed[key], err_msg=key)


def random_models(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """A base and models; multiples of 2^-12, so that task vectors are exact."""
    generator = np.random.default_rng(seed)

    def one(deviation: float) -> dict[str, np.ndarray]:
        return {
            name: np.asarray(
                np.round(generator.normal(0, deviation * 4096, shape)) / 4096
            )
            for name, shape in SHAPES.items()
        }

    base = one(0.1)
    others = [one(0.03) for _ in range(count)]
    models = [base, *[{n: base[n] + own[n] for n in base} for own in others]]
    return [{n: np.asarray(t, np.float32) for n, t in own.items()} for own in models]


def inputs_of(method: str) -> tuple[Any, list[Any], dict[str, Any], list[Any] | None]:
    """Base, models, options and statistics: of all shapes, or of a few for methods that
    other files look at."""
    known = {**OPTIONS, **WITH_STATISTICS}
    count = METHODS[method].num_models or 3
    base, *models = random_models(count)
    if method not in known:
        base, *models = [{n: own[n] for n in FEW} for own in (base, *models)]
    beside = statistics(method, count) if METHODS[method].beside else None
    if beside is not None:
        beside = [{n: own[n] for n in base if n in own} for own in beside]
    needed = {"coefficients": (0.5,) * count}
    fields = METHODS[method].fields()
    options = {name: own for name, own in needed.items() if name in fields}
    return base, models, dict(known.get(method, options)), beside


def statistics(method: str, count: int) -> list[dict[str, np.ndarray]]:
    """Fisher information of all tensors but one, or Gram matrices of the matrices."""
    generator, grams = np.random.default_rng(11), method in ("regmean", "lot")
    made: list[dict[str, np.ndarray]] = []
    for _ in range(count):
        own = {}
        for name, shape in SHAPES.items():
            if grams and len(shape) == 2:
                inputs = generator.normal(size=(50, shape[1]))
                own[name] = (inputs.T @ inputs / 50).astype(np.float32)
            elif not grams and name != NAMES[-1]:
                own[name] = np.asarray(generator.random(shape) ** 4).astype(np.float32)
        made.append(own)
    return made


def recipe_of(**fields: Any) -> m3jax.Recipe:
    return m3jax.Recipe.from_dict({"mixup": {"alpha": None}, **fields})


def run(
    base: Any,
    models: Sequence[Any],
    method: str,
    options: Mapping[str, Any],
    beside: Sequence[Any] | None = None,
    **fields: Any,
) -> dict[str, np.ndarray]:
    """The merged model of a method with options of its group."""
    recipe = recipe_of(method=method, **{method: options}, **fields)
    if beside is not None:
        return applied(base, models, recipe, beside)
    merged = m3jax.merge_params(base, models, recipe, 0)
    return merged.get("", merged)


def applied(
    base: Any, models: Sequence[Any], recipe: m3jax.Recipe, beside: Sequence[Any]
) -> dict[str, Any]:
    """A method on whole tensors, with what comes beside the models."""
    method, names, count = recipe.method, list(models[0]), len(models)
    (job,) = jobs(recipe, enumerate(names))
    numbers = tables(job, names, count, 0, lambda: None)
    p = {name: own() if callable(own) else own for name, own in numbers.p[-1].items()}

    def operands(name: str) -> Operands:
        own = {}
        if name in beside[0]:
            own["statistics"] = np.stack([b[name] for b in beside])
        stack = np.stack([model[name] for model in models])
        return Operands(None if base is None else base[name], stack, own)

    def answer(reduction: Reduction) -> Any:
        if reduction.sample:
            return None
        arguments = {
            name: np.asarray(own, np.float32).reshape(-1, 1)
            for name, own in reduction.arguments.items()
        }
        function, parts = jax.jit(reduction.function), []
        for name in names:
            x = operands(name)
            axes = x.models.ndim - 1
            x = jax.tree.map(lambda a, n=axes: a.reshape(*a.shape[: a.ndim - n], -1), x)
            parts.append([*map(np.asarray, function(x, arguments))])
        how = [np.max if own == "max" else np.sum for own in reduction.combine]
        joined = [np.concatenate(own, -1) for own in zip(*parts, strict=True)]
        return tuple(
            own(part if own is np.max else part.astype(np.int64), axis=-1)
            for own, part in zip(how, joined, strict=True)
        )

    found = {}
    if method.scope:
        size = sum(model.size for model in models[0].values())
        found = run_statistics(method.measure(Problem(count, size, p)), answer)
    info = method.derive(p, {n: own[:, None] for n, own in found.items()}, np)
    info = {n: np.broadcast_to(own, (len(own), len(names))) for n, own in info.items()}
    merged = {}
    for i, name in enumerate(names):
        x = operands(name)
        own = [take(table, i, x.models.ndim - 1) for table in (p, info)]
        merged[name] = np.asarray(_apply(method.static, x, *own))
    return merged


@functools.partial(jax.jit, static_argnames="method")
def _apply(method: Any, x: Operands, p: Any, info: Any) -> Any:
    return method.apply(x, p, info)


def flat(base: Any, models: Sequence[Any]) -> np.ndarray:
    """The task vectors, (K, n) float64."""
    return np.stack(
        [
            np.concatenate([(np.float64(m[n]) - base[n]).ravel() for n in base])
            for m in models
        ]
    )


def cut(values: np.ndarray, first: int, last: int) -> np.ndarray:
    """Clipped to the sorted values of those numbers."""
    ordered = np.sort(values, axis=1)
    return np.clip(values, ordered[:, first, None], ordered[:, last, None])


def normalized(values: np.ndarray) -> np.ndarray:
    low, high = values.min(1, keepdims=True), values.max(1, keepdims=True)
    return np.where(high > low, (values - low) / np.where(high > low, high - low, 1), 0)


def assert_close(merged: Any, expected: Any, tolerance: float) -> None:
    for name, tensor in expected.items():
        np.testing.assert_allclose(
            merged[name], tensor, rtol=0, atol=tolerance, err_msg=name
        )
