"""The searches of other systems: golden numbers, and what must hold of each."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import m3jax
from m3jax import search
from m3jax.checkpoints.formats import tree

GOLDEN = Path(__file__).parent / "golden_systems"
CASES = json.loads((GOLDEN / "cases.json").read_text())


def by_call(*calls: str) -> list[Any]:
    named = [(f"{case['system']}-{case['name']}", case) for case in CASES]
    return [pytest.param(c, id=name) for name, c in named if c["call"] in calls]


def load(path: str) -> dict[str, Any]:
    return tree.nest({n: jnp.asarray(x) for n, x in load_file(GOLDEN / path).items()})


def models_of(case: dict[str, Any]) -> list[Any]:
    return [load(path) for path in case["inputs"]["models"]]


def check(case: dict[str, Any], merged: Any, output: str = "merged") -> None:
    got, want = tree.flatten(merged)[0], load_file(GOLDEN / case["outputs"][output])
    assert set(got) == set(want)
    for name, array in want.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_allclose(
            got[name], array, rtol=0, atol=case["tolerance"]["absolute"], err_msg=name
        )


def bowl(case: dict[str, Any]) -> Any:
    """A score of −Σ curvature (θ − center)², or a constant."""
    inputs = case["inputs"]
    if "constant_score" in inputs:
        return lambda params: inputs["constant_score"]
    center, curvature = (
        load_file(GOLDEN / inputs[key]) for key in ("center", "curvature")
    )

    def evaluate(params: Any) -> float:
        leaves = tree.flatten(params)[0]
        return -sum(
            float((curvature[n] * (np.asarray(leaves[n], np.float64) - c) ** 2).sum())
            for n, c in center.items()
        )

    return evaluate


def assert_same_bits(a: Any, b: Any) -> None:
    a, b = tree.flatten(a)[0], tree.flatten(b)[0]
    assert set(a) == set(b)
    assert all(np.asarray(a[n]).tobytes() == np.asarray(b[n]).tobytes() for n in a)


def test_importing_does_not_import_jax():
    code = (
        "import sys, m3jax, m3jax.search\n"
        "assert not {'jax', 'scipy'} & set(sys.modules)\n"
        "m3jax.align, m3jax.keymap, m3jax.programs, m3jax.search.greedy_soup\n"
        "assert 'scipy.optimize' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_are_there():
    assert all(callable(getattr(search, name)) for name in search.__all__)
    with pytest.raises(AttributeError, match="no attribute 'greedy'"):
        _ = search.greedy


@pytest.mark.parametrize("case", by_call("greedy_soup"))
def test_greedy_soup(case: dict[str, Any]):
    scores = case["inputs"].get("scores")
    soup = search.greedy_soup(models_of(case), bowl(case), scores=scores)
    outputs = case["outputs"]
    assert soup.members == outputs["members"]
    assert [(t.model, t.accepted) for t in soup.trials] == [
        (t["model"], t["accepted"]) for t in outputs["trials"]
    ]
    np.testing.assert_allclose(
        [soup.score, *(t.score for t in soup.trials)],
        [outputs["score"], *(t["score"] for t in outputs["trials"])],
        atol=case["tolerance"]["score"],
    )
    check(case, soup.params)


@pytest.mark.parametrize("case", by_call("selective_merge"))
def test_selective_merge(case: dict[str, Any]):
    models, outputs = models_of(case), case["outputs"]
    result = search.selective_merge(models, bowl(case), **case["options"])
    assert [(r.model, r.coefficient, r.accepted) for r in result.rounds] == [
        (r["model"], r["coefficient"], r["accepted"]) for r in outputs["rounds"]
    ]
    np.testing.assert_allclose(
        [result.score, *(r.score for r in result.rounds)],
        [outputs["score"], *(r["score"] for r in outputs["rounds"])],
        atol=case["tolerance"]["score"],
    )
    np.testing.assert_allclose(result.weights, outputs["weights"], atol=1e-6)
    check(case, result.params)


def test_soups_keep_dtypes_and_what_is_no_float():
    models = [{"w": jnp.full(3, x, jnp.bfloat16), "n": jnp.arange(2)} for x in (1, 2)]
    soup = search.greedy_soup(models, lambda params: float(params["w"][0]))
    assert soup.members == [1]
    kept = search.selective_merge(models, lambda p: 0.0, grid=[0.5], order="given")
    for params in (soup.params, kept.params):
        assert params["w"].dtype == jnp.bfloat16 and params["n"].tolist() == [0, 1]
    assert kept.params["w"].tolist() == [1.5] * 3 and kept.weights == [0.5, 0.5]


def test_a_soup_of_other_leaves_is_refused():
    with pytest.raises(ValueError, match="pytree 1 lacks 'w', which pytree 0 has"):
        search.greedy_soup([{"w": jnp.ones(2)}, {}], lambda params: 0.0)
    with pytest.raises(ValueError, match=r"'w' has the shape \(3,\) in pytree 1"):
        search.greedy_soup([{"w": jnp.ones(n)} for n in (2, 3)], lambda params: 0.0)
    with pytest.raises(ValueError, match="1 scores were given for 2 models"):
        search.greedy_soup([{"w": jnp.ones(2)}] * 2, lambda params: 0.0, scores=[1.0])


@pytest.mark.parametrize("case", by_call("similarity_matrix"))
def test_similarity_matrix(case: dict[str, Any]):
    base = load(case["inputs"]["base"])
    matrix = search.similarity_matrix(models_of(case), base, **case["options"])
    want = case["outputs"]["matrix"]
    np.testing.assert_allclose(matrix, want, atol=case["tolerance"]["absolute"], rtol=0)


def test_similarity_needs_something_to_compare():
    with pytest.raises(ValueError, match="in the name of no tensor"):
        search.similarity_matrix([{"w": jnp.ones(2)}], include="mlp")
    with pytest.raises(ValueError, match="needs a base"):
        search.similarity_matrix([{"w": jnp.ones(2)}], of="delta")


@pytest.mark.parametrize("case", by_call("clusters"))
@pytest.mark.parametrize("rule", ["leader", "connected"])
def test_clusters(case: dict[str, Any], rule: str):
    found = search.clusters(case["inputs"]["matrix"], **case["options"], rule=rule)
    assert found == case["outputs"][rule]


def test_rules_of_clusters_differ():
    chain = np.eye(4)
    for i, j in ((0, 2), (1, 2), (1, 3)):
        chain[i, j] = chain[j, i] = 0.9
    assert search.clusters(chain, 0.5) == [[0, 2], [1, 3]]
    assert search.clusters(chain, 0.5, rule="connected") == [[0, 1, 2, 3]]
    assert search.clusters(chain, 0.9) == [[0], [1], [2], [3]]


@pytest.mark.parametrize("case", by_call("group_weights"))
def test_merge_layer_groups(case: dict[str, Any]):
    weights = case["options"]["weights"]
    check(case, search.merge_layer_groups(models_of(case), weights))


def test_merge_layer_groups_says_what_is_wrong():
    models = [{"layers": {str(i): jnp.ones(1) for i in range(3)}}] * 2
    with pytest.raises(ValueError, match=r"weights\[1\] = \[0.0, 0.0\] cannot be"):
        search.merge_layer_groups(models, [[1, 0], [0, 0]])
    with pytest.raises(ValueError, match="3 layers cannot be divided into 2 groups"):
        search.merge_layer_groups(models, [[1, 0]] * 3)
    with pytest.raises(ValueError, match=r"weights\[0\] has the shape \(3,\)"):
        search.merge_layer_groups(models, [[1, 0, 1]] * 2)


@pytest.mark.parametrize("case", by_call("lm_cocktail_weights"))
def test_lm_cocktail_weights(case: dict[str, Any]):
    weights = search.lm_cocktail_weights(case["inputs"]["losses"], **case["options"])
    want = case["outputs"]["weights"]
    np.testing.assert_allclose(weights, want, atol=case["tolerance"]["absolute"])


@pytest.mark.parametrize("case", by_call("weighted_objective"))
def test_weighted_objective(case: dict[str, Any]):
    losses, types = case["inputs"]["losses"], case["inputs"]["types"]
    weights, want = case["options"]["weights"], case["outputs"]["loss"]
    near = pytest.approx(want, abs=case["tolerance"]["absolute"])
    assert search.weighted_objective(losses, types, weights) == near
    gradient = jax.grad(lambda x: search.weighted_objective(x, types, weights))
    slopes = gradient(jnp.asarray(losses, jnp.float32))
    np.testing.assert_allclose(slopes, [weights[kind] for kind in types], rtol=1e-6)


def test_one_failed_example_loses_the_trial():
    for losses in ([1.0, math.nan], jnp.asarray([1.0, jnp.inf])):
        result = search.weighted_objective(losses, ["a", "b"], {"a": 1, "b": 0})
        assert float(result) == math.inf
    with pytest.raises(ValueError, match=r"weights has none for \['b'\]"):
        search.weighted_objective([1.0, 2.0], ["a", "b"], {"a": 1})


@pytest.mark.parametrize("case", by_call("lfs_merge"))
def test_lfs(case: dict[str, Any]):
    genotype, models = case["options"], models_of(case)
    merged = search.lfs_merge(load(case["inputs"]["base"]), models, genotype)
    check(case, merged)
    if case["name"] == "single_model":
        assert_same_bits(merged, models[1])
    published = json.loads((GOLDEN / case["outputs"]["published"]).read_text())
    read = search.lfs_genotype(
        published,
        model_names=["m0", "m1", "m2"],
        layers_per_group=genotype["layers_per_group"],
        filters=genotype["filters"],
    )
    assert read == genotype


def test_lfs_says_what_is_wrong():
    params = {"layers": {"0": jnp.ones(2)}}

    def merge(method: str, **numbers: Any) -> Any:
        group = {"method": method, "sets": {"base": numbers}}
        genotype = {"layers_per_group": 1, "filters": (), "groups": [group]}
        return search.lfs_merge(params, [params, params], genotype)

    with pytest.raises(ValueError, match=r"sets.base.weights = \[0.0, 0.0\] cannot"):
        merge("linear", weights=[0, 0])
    with pytest.raises(ValueError, match=r"groups\[0\].method='dare' is none of"):
        merge("dare", scaling=1)
    with pytest.raises(ValueError, match=r"does not fit ties, which has \['scaling',"):
        merge("ties", scaling=1)
    with pytest.raises(ValueError, match="has no layer_selection_method_0"):
        search.lfs_genotype({}, model_names=[], layers_per_group=1, filters=())


@pytest.mark.parametrize("case", by_call("dis_program"))
def test_dis(case: dict[str, Any]):
    options, outputs = case["options"], case["outputs"]
    program = search.dis_program(
        options["selected"], options["order"], options["scales"]
    )
    assert [list(entry) for entry in program] == outputs["program"]
    base, models = load(case["inputs"]["base"]), models_of(case)
    child = m3jax.programs.apply(base, models, program)
    assert child.scales == [scale for _, _, scale in program]
    if "merged" in outputs:
        check(case, child.params)
    if case["name"] == "single":
        assert_same_bits(child.params, models[1])
    if case["name"] == "base":
        assert_same_bits(child.params, base)


def test_programs_say_what_is_wrong():
    params = {"embed": jnp.ones(1), "layers": {"0": {"w": jnp.ones(1)}}}
    for program, message in (
        ([(2, 0)], r"program\[0\] names model 2; there are 1"),
        ([(0, 0), (-1, 1)], r"program\[1\] names block 1 of model -1, which has 1"),
    ):
        with pytest.raises(ValueError, match=message):
            m3jax.programs.apply(params, [params], program)
    assert m3jax.programs.apply(params, [params], []).params == {"embed": jnp.ones(1)}
    two = {side: {"0": jnp.ones(1)} for side in ("encoder", "decoder")}
    with pytest.raises(
        ValueError, match=r"\['decoder.', 'encoder.'\]: give each stack"
    ):
        m3jax.programs.apply(two, [], [(-1, 0)])
    with pytest.raises(ValueError, match=r"order\[0\]=6 needs 0 to 5"):
        search.dis_program([[1, 0, 1]], [6], [1.0])


@pytest.mark.parametrize("case", by_call("hyperband_brackets"))
def test_hyperband(case: dict[str, Any]):
    brackets = search.hyperband_brackets(**case["options"])
    wanted = case["outputs"]["brackets"]
    assert len(brackets) == len(wanted)
    for bracket, rungs in zip(brackets, wanted, strict=True):
        assert [n for n, _ in bracket] == [rung["configs"] for rung in rungs]
        np.testing.assert_allclose(
            [budget for _, budget in bracket],
            [rung["budget"] for rung in rungs],
            rtol=case["tolerance"]["relative"],
        )


def test_hyperband_counts_exactly():
    assert len(search.hyperband_brackets(1, 243, 3)) == 6
    with pytest.raises(ValueError, match="eta > 1"):
        search.hyperband_brackets(1, 243, 1)


@pytest.mark.parametrize("case", by_call("rmm"))
def test_rmm(case: dict[str, Any]):
    options, outputs = case["options"], case["outputs"]
    state = search.rmm_start(options["num_blocks"], options["num_models"])
    for action, wanted in zip(case["inputs"]["actions"], outputs["trace"], strict=True):
        state = search.rmm_step(state, action)
        assert state.position == wanted["position"]
        assert state.counts.tolist() == wanted["counts"]
        assert state.done == wanted["done"]
        assert state.failed == (wanted["reward"] == -10)
    assert [list(block) for block in state.blocks] == outputs["blocks"]
    assert state.counts.size == outputs["observation_size"]


def test_a_walk_ends():
    state = search.rmm_start(2, 1, max_steps=4)
    for action in (0, 2, 0, 2):
        before, state = state, search.rmm_step(state, action)
    assert state.done and state.failed and not before.done
    with pytest.raises(ValueError, match="the walk is done"):
        search.rmm_step(state, 0)
    with pytest.raises(ValueError, match="action=3 needs 0 to 2"):
        search.rmm_step(before, 3)


@pytest.mark.parametrize("case", by_call("dynamic_average_reward"))
def test_dynamic_average_reward(case: dict[str, Any]):
    got = search.dynamic_average_reward(case["inputs"]["rewards"], **case["options"])
    want = case["outputs"]["rewards"]
    np.testing.assert_allclose(got, want, atol=case["tolerance"]["absolute"], rtol=0)


@pytest.mark.parametrize("case", by_call("ppo_loss"))
def test_ppo(case: dict[str, Any]):
    inputs, options = case["inputs"], dict(case["options"])
    returns = search.ppo_returns(
        inputs["rewards"], inputs["terminal"], gamma=options.pop("gamma")
    )
    names = ("log_probs", "old_log_probs", "values", "old_values")
    given = [inputs[name] for name in names]
    loss = search.ppo_loss(*given, returns, inputs["entropy"], **options)
    tolerance = case["tolerance"]["absolute"]
    np.testing.assert_allclose(returns, case["outputs"]["returns"], atol=tolerance)
    assert float(loss) == pytest.approx(case["outputs"]["loss"], abs=tolerance)


@pytest.mark.parametrize("case", by_call("response_stability"))
def test_response_stability(case: dict[str, Any]):
    inputs = case["inputs"]
    got = search.response_stability(
        inputs["responses"], inputs["alphas"], **case["options"]
    )
    want = case["outputs"]
    np.testing.assert_allclose(got.counts, want["counts"], atol=1e-6)
    assert got.best == want["best"]


def test_of_an_even_grid_the_most_stable_is_the_papers():
    rng = np.random.default_rng(0)
    alphas = [a / 10 for a in range(4, 11)]
    for _ in range(20):
        answers = rng.integers(3, size=(7, 12)).tolist()
        best = search.response_stability(answers, alphas).best
        order = rng.permutation(7)
        place = search.most_stable(
            [answers[i] for i in order], [alphas[i] for i in order]
        )
        assert alphas[order[place]] in best


def test_a_crowd_at_one_end_is_not_stable_for_being_near():
    ratios = [0.1, 0.3, 0.5, 0.995, 0.998, 0.999]
    answers = [["a", "b"]] * 3 + [["c", "c"]] * 3
    assert search.most_stable(answers, ratios) == 1
    assert search.most_stable([*answers, ["z", "z"]], [*ratios, 0.3]) == 1
    with pytest.raises(ValueError, match="2 ratios differ; 3 or more"):
        search.most_stable([["a"]] * 3, [0.0, 1.0, 1.0])


def test_response_stability_needs_three_rising_alphas():
    with pytest.raises(ValueError, match="2 alphas were given; 3 or more"):
        search.response_stability([["a"], ["b"]], [0.0, 1.0])
    with pytest.raises(ValueError, match="do not rise"):
        search.response_stability([["a"]] * 3, [0.0, 0.5, 0.5])
    by_alpha = {0.0: ["a", "b"], 0.5: ["A", 1], 1.0: ["a ", "1"]}
    found = search.response_stability(by_alpha, [0.0, 0.5, 1.0])
    assert found.counts == [2.0] and found.best == [0.5]


@pytest.mark.parametrize("case", by_call("keymap_merge", "keymap_error"))
def test_keymap(case: dict[str, Any]):
    target, source = (load(case["inputs"][key]) for key in ("target", "source"))
    keymap, alpha = case["options"]["keymap"], case["options"]["alpha"]
    if case["call"] == "keymap_error":
        with pytest.raises(ValueError) as error:
            m3jax.keymap.merge(target, source, keymap, alpha)
        assert all(name in str(error.value) for name in case["outputs"]["error_names"])
        return
    merged = m3jax.keymap.merge(target, source, keymap, alpha)
    check(case, merged)
    if alpha == 1:
        assert_same_bits(merged, target)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"sources": ["b"], "slice": [0, 9]}, "do not fit"),
        ({"sources": ["b"], "axis": 2}, "do not fit"),
        (["b", "b"], "do not fit"),
        ({"sources": ["b"], "flip": True}, r"has \['flip'\]"),
        ("{i}.b", "lacks the {i} of its sources"),
        ([], "names no source"),
    ],
)
def test_keymap_says_what_is_wrong(rule: Any, message: str):
    with pytest.raises(ValueError, match=message):
        m3jax.keymap.merge(
            {"a": jnp.ones((2, 3))}, {"b": jnp.ones((2, 3))}, {"a": rule}, 0.5
        )


def test_keymap_of_narrow_dtypes():
    target = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.zeros(1, jnp.int32)}
    source = {"x": jnp.full((1, 3), 2.0), "y": jnp.full((1, 3), 4.0, jnp.float16)}
    merged = m3jax.keymap.merge(target, source, {"a": ["x", "y"]}, 0.5)
    assert merged["a"].dtype == jnp.bfloat16 and merged["b"] is target["b"]
    assert merged["a"].tolist() == [[1.5] * 3, [2.5] * 3]


def test_keymap_of_no_tensor():
    with pytest.raises(ValueError, match="'c' is the name of no tensor of the target"):
        m3jax.keymap.merge({"a": jnp.ones(1)}, {"b": jnp.ones(1)}, {"c": "b"}, 0.5)


@pytest.mark.parametrize("case", by_call("weight_matching"))
def test_weight_matching(case: dict[str, Any]):
    target, source = (load(case["inputs"][key]) for key in ("target", "source"))
    axes = case["options"]["axes"]
    found = m3jax.align.weight_matching(target, source, axes)
    assert {g: p.tolist() for g, p in found.items()} == case["outputs"]["permutations"]
    aligned = m3jax.align.permute(source, found, axes)
    check(case, aligned, "aligned")
    ours, theirs = tree.flatten(target)[0], tree.flatten(aligned)[0]
    objective = sum(float(jnp.sum(ours[name] * theirs[name])) for name in ours)
    tolerance = case["tolerance"]["objective"]
    assert objective == pytest.approx(case["outputs"]["objective"], abs=tolerance)


@pytest.mark.parametrize("case", by_call("inject"))
def test_inject(case: dict[str, Any]):
    target, source = (load(case["inputs"][key]) for key in ("target", "source"))
    options = case["options"]
    axes, found = options["axes"], options["permutations"]
    merged = m3jax.align.inject(
        target,
        m3jax.align.permute(source, found, axes),
        found,
        axes,
        gamma=options["gamma"],
        unmatched=options["unmatched"],
    )
    check(case, merged)


AXES = {"up": ["hidden", None], "down": [None, "hidden"], "bias": ["hidden"]}


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_permutation_comes_back(seed: int):
    generator = np.random.default_rng(seed)
    shapes = {"up": (13, 5), "down": (4, 13), "bias": (13,)}
    source = {n: generator.normal(size=s).astype("f4") for n, s in shapes.items()}
    planted = {"hidden": generator.permutation(13)}
    target = m3jax.align.permute(source, planted, AXES)
    for key in (None, jax.random.key(seed)):
        found = m3jax.align.weight_matching(target, source, AXES, key=key)
        np.testing.assert_array_equal(found["hidden"], planted["hidden"])
    assert_same_bits(m3jax.align.permute(source, found, AXES), target)


def test_units_without_a_partner():
    source = {"up": jnp.ones((2, 1)), "down": jnp.ones((1, 2)), "bias": jnp.ones(2)}
    target = {"up": jnp.ones((3, 1)), "down": jnp.ones((1, 3)), "bias": jnp.ones(3)}
    found = m3jax.align.weight_matching(target, source, AXES)
    assert sorted(found["hidden"].tolist()) == [-1, 0, 1]
    aligned = m3jax.align.permute(source, found, AXES)
    kept = m3jax.align.inject(target, aligned, found, AXES, gamma=0.5)
    assert_same_bits(kept, target)
    shrunk = m3jax.align.inject(
        target, aligned, found, AXES, gamma=0.5, unmatched="shrink"
    )
    assert sorted(shrunk["bias"].tolist()) == [0.5, 1.0, 1.0]


def test_align_says_what_is_wrong():
    params = {"up": jnp.ones((3, 1)), "down": jnp.ones((1, 2)), "bias": jnp.ones(3)}
    with pytest.raises(ValueError, match="has 2 units of the group 'hidden', other"):
        m3jax.align.weight_matching(params, params, AXES)
    with pytest.raises(ValueError, match="the target lacks 'w', which axes names"):
        m3jax.align.weight_matching(params, params, {"w": [None]})
    with pytest.raises(ValueError, match="axes names 1 axes"):
        m3jax.align.weight_matching(params, params, {"up": ["hidden"]})
    with pytest.raises(ValueError, match="lacks the group 'hidden'"):
        m3jax.align.permute(params, {}, {"bias": ["hidden"]})
    with pytest.raises(ValueError, match="indices from -1 to 2"):
        m3jax.align.permute(params, {"hidden": [0, 3, 1]}, {"bias": ["hidden"]})
