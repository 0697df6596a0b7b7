"""mergekit's YAML beside mergekit 0.1.5: the same numbers, the same refusals.

golden_mergekit/ holds small configurations, models of our own, and what mergekit
makes of them. |got − expected| ≤ atol + rtol |expected|, apart from the entries marked
in `skip`, which no precision settles: magnitudes tied at a threshold, and the like.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from checkpoints import read
from command_line import Run
from grids import thinned
from safetensors.numpy import load_file

import m3jax
from m3jax.recipe import mergekit

GOLDEN = Path(__file__).parent / "golden_mergekit"
CASES = [
    case
    for path in sorted(GOLDEN.glob("cases*.json"))
    for case in json.loads(path.read_text())
]


def _cases(kind: str) -> list[Any]:
    return [pytest.param(c, id=c["name"]) for c in CASES if c["kind"] == kind]


@pytest.fixture(autouse=True)
def in_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in the configurations are relative to the models."""
    monkeypatch.chdir(GOLDEN / "models")


def _merged(
    run: Run, config: Path | str, output: Path, *flags: str
) -> dict[str, np.ndarray]:
    ran = run("merge", f"--config={config}", f"--output={output}", "--nofsync", *flags)
    assert ran.code == 0, ran.err
    return read(output)


def _check(case: dict[str, Any], got: dict[str, np.ndarray]) -> None:
    expected = load_file(GOLDEN / case["expected"])
    skip = load_file(GOLDEN / case["skip"]) if "skip" in case else {}
    if case.get("fused"):
        got = _fused(got)
    assert set(expected) - set(case.get("may_miss", ())) <= set(got) <= set(expected)
    for name, own in got.items():
        wanted = expected[name]
        assert (own.shape, own.dtype) == (wanted.shape, wanted.dtype), name
        away = np.abs(own.astype(np.float64) - wanted.astype(np.float64))
        near = away <= case["atol"] + case["rtol"] * np.abs(wanted.astype(np.float64))
        near |= skip.get(name, np.zeros(wanted.shape, np.uint8)) > 0
        assert near.all(), (name, np.count_nonzero(~near), away[~near].max())


def _fused(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Experts as transformers keeps them in memory: all of a layer in one tensor."""
    fused: dict[str, Any] = {}
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, own in tensors.items():
        name = name.replace("block_sparse_moe", "mlp")
        found = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name)
        if found is None:
            fused[name] = own
        else:
            experts.setdefault(f"{found[1]}.{found[3]}", {})[int(found[2])] = own
    stacked = {n: np.stack([own[i] for i in sorted(own)]) for n, own in experts.items()}
    for name in stacked:
        layer, _, part = name.rpartition(".")
        if part in ("w2", "down_proj"):
            fused[f"{layer}.down_proj"] = stacked[name]
        elif part in ("w1", "gate_proj"):
            up = stacked[f"{layer}.{'w3' if part == 'w1' else 'up_proj'}"]
            fused[f"{layer}.gate_up_proj"] = np.concatenate([stacked[name], up], axis=1)
    return fused


# Programs by row take seconds to compile; others of these stay.
BY_ROW = (
    "della_empty",
    "della_linear_empty",
    "model_stock_rows_three",
    "model_stock_opposed_rows",
    "nuslerp_whole_first",
    "nuslerp_task_first",
    "nuslerp_task_last",
    "nuslerp_weights_cancel",
    "nuslerp_task_flat_row",
    "nuslerp_edges_last",
)


@pytest.mark.parametrize(
    "case", thinned(_cases("tensors"), lambda param: param.id not in BY_ROW)
)
def test_agrees_with_mergekit(
    case: dict[str, Any], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one device, as most machines have; `SOME` are merged on eight, too."""
    one = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: one)
    output = tmp_path / "out"
    _check(case, _merged(run, GOLDEN / case["yaml"], output))
    if "config" in case:
        config = json.loads((output / "config.json").read_text())
        assert {key: config[key] for key in case["config"]} == case["config"]


SOME = (
    "nuslerp_task_first",
    "karcher_tolerance",
    "arcee_fusion",
    "sce_half",
    "ramplus_tl_three",
    "ties_rescale",
    "breadcrumbs_ties_gamma",
    "gradient_ties",
    "none_mixed",
    "slice_gradient",
    "shifted_layers",
    "mixed_slices",
    "slice_base_model",
    "gpt2_stack",
    "float64_linear",
)


# A gradient, dtypes, slices and float64; test_contract has all methods.
FEW = ("slice_gradient", "none_mixed", "mixed_slices", "float64_linear")


@pytest.mark.parametrize(
    "case",
    thinned([c for c in _cases("tensors") if c.id in SOME], lambda c: c.id in FEW),
)
def test_executors_agree(case: dict[str, Any], tmp_path: Path, run: Run) -> None:
    config = GOLDEN / case["yaml"]
    got = _merged(run, config, tmp_path / "streamed")
    _check(case, got)
    in_memory = _merged(run, config, tmp_path / "sharded", "--executor=sharded")
    document = mergekit.parse(config.read_text()).result
    trees = [_tree(model) for model in (document.base, *document.models) if model]
    base = trees.pop(0) if document.base else None
    with jax.enable_x64(document.recipe.compute == "float64"):
        params = m3jax.merge_params(base, trees, document.recipe, 0)
    for name, own in got.items():
        assert own.tobytes() == in_memory[name].tobytes(), name
        assert own.tobytes() == np.asarray(params[name]).tobytes(), name


def _tree(model: str) -> dict[str, np.ndarray]:
    return read(Path(model))


@pytest.mark.parametrize("case", _cases("statistics"))
def test_random_methods(case: dict[str, Any], tmp_path: Path, run: Run) -> None:
    """Means, variances and shares over 8 seeds, beside mergekit's over 400."""
    config = GOLDEN / case["yaml"]
    seeds = range(8)
    draws = [
        _merged(run, config, tmp_path / str(seed), f"--seed={seed}") for seed in seeds
    ]
    assert len({b"".join(own[n].tobytes() for n in own) for own in draws}) == 8
    expected = load_file(GOLDEN / case["expected"])
    base = _tree(yaml.safe_load(config.read_text())["base_model"])
    away, spread, moved, kept = [], [], [], []
    for name, origin in base.items():
        values = np.stack([own[name] for own in draws]).astype(np.float64)
        mean = expected[name].astype(np.float64)
        variance = expected[f"{name}#variance"].astype(np.float64)
        random = variance > 1e-14
        np.testing.assert_allclose(values[:, ~random] - mean[~random], 0, atol=1e-6)
        error = values.mean(axis=0) - mean
        away.append((error[random] / np.sqrt(variance[random] / 8)).ravel())
        own = values.var(axis=0, ddof=1)[random]
        spread.append(own.sum() / max(variance[random].sum(), 1e-30))
        share = (np.abs(values - origin) > 1e-8).mean(axis=0)
        moved.append((share - expected[f"{name}#moved"].astype(np.float64))[random])
        if f"{name}#keep" in expected:
            keep = expected[f"{name}#keep"].astype(np.float64)
            kept.append((share - keep)[random])
    z = np.concatenate(away)
    assert abs(z.mean()) < 0.05 and abs(z.std() - 1) < 0.06
    assert abs(np.mean([own for own in spread if own]) - 1) < 0.06
    assert abs(np.concatenate(moved).mean()) < 0.01
    assert not kept or abs(np.concatenate(kept).mean()) < 0.01


def test_what_is_kept_makes_up_for_the_rest(tmp_path: Path, run: Run) -> None:
    """y − θ0 is w τ s or 0, with s the ratio of the tensor's L1 norms."""
    base, model = _tree("base"), _tree("c")
    config = GOLDEN / "yaml" / "dare_linear_one.yml"
    got = _merged(run, config, tmp_path / "out", "--seed=3")
    for name, own in got.items():
        tau = model[name].astype(np.float64) - base[name]
        change = own.astype(np.float64) - base[name]
        kept = np.abs(change) > 1e-8
        if not kept.any():
            continue
        scale = np.abs(tau).sum() / np.abs(tau[kept]).sum()
        np.testing.assert_allclose(change[kept], 0.8 * scale * tau[kept], atol=3e-7)


@pytest.mark.parametrize("case", _cases("refuse"))
def test_refuses(case: dict[str, Any], tmp_path: Path, run: Run) -> None:
    config = f"--config={GOLDEN / case['yaml']}"
    ran = run("merge", config, f"--output={tmp_path / 'out'}")
    assert ran.code in (2, 3)
    assert ran.error.startswith("m3jax merge: ")
    assert not list(tmp_path.iterdir())


def test_recorded_recipe_makes_the_same_bytes(tmp_path: Path, run: Run) -> None:
    config = GOLDEN / "yaml" / "gradient_ties.yml"
    got = _merged(run, config, tmp_path / "first")
    record = tmp_path / "first" / "m3jax.json"
    again = _merged(run, record, tmp_path / "again")
    assert all(own.tobytes() == again[name].tobytes() for name, own in got.items())
    assert run("verify", tmp_path / "first").code == 0


def test_our_own_part(tmp_path: Path, run: Run) -> None:
    config = tmp_path / "own.yml"
    config.write_text(
        "merge_method: ties\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"
        "parameters: {density: 0.5}\n"
        "m3jax:\n  seed: 7\n  mixup: {alpha: 0.4}\n  exclude: [lm_head.weight]\n"
        "  transforms: {dare: {drop_rate: 0.2}}\n"
    )
    got = _merged(run, config, tmp_path / "out")
    recipe = m3jax.Recipe(
        method=m3jax.GeneralizedTaskArithmetic(vote=True, normalize=True),
        transforms=(m3jax.Dare(drop_rate=0.2), m3jax.Sparsify(density=0.5)),
        mixup=m3jax.Mixup(alpha=0.4),
        exclude=("lm_head.weight",),
        dtype="promote",
    )
    params = m3jax.merge_params(_tree("base"), [_tree("a"), _tree("b")], recipe, 7)
    for name, own in got.items():
        assert own.tobytes() == np.asarray(params[name]).tobytes(), name
    assert np.array_equal(got["lm_head.weight"], _tree("base")["lm_head.weight"])


DOCUMENT = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n"


SLICES = (
    "merge_method: linear\nparameters: {{weight: 1}}\n"
    "slices: [{{sources: [{{model: a, layer_range: {}}}]}}]\n"
)


@pytest.mark.parametrize(
    "text, message",
    [
        (
            DOCUMENT + "base_modle: b",
            "base_modle; did you mean 'base_model'",
        ),
        (DOCUMENT.replace("linear", "linaer"), "'linaer'; did you mean 'linear'"),
        (
            DOCUMENT + "slices: [{sources: [{model: a, layer_range: [0, 1]}]}]",
            "one of the three is needed, not models and slices",
        ),
        (DOCUMENT + "m3jax: {sede: 1}", "unknown key m3jax.sede; did you mean 'seed'"),
        (
            DOCUMENT.replace("model: a", "model: {model: a, lroa: b}"),
            "did you mean 'lora'",
        ),
        (DOCUMENT + "---\n" + DOCUMENT, "2 of 2 documents have no name"),
        (
            f"name: ../a\n{DOCUMENT}---\n{DOCUMENT}",
            "name='../a' needs letters",
        ),
        (
            f"name: a\n{DOCUMENT}---\n{DOCUMENT}",
            "documents need each other in a circle: a -> a",
        ),
        (
            SLICES.format("[2, 2]"),
            "slices[0].sources[0].layer_range=[2, 2] needs [first, stop]",
        ),
        (SLICES.format("[2, x]"), "needs [first, stop]"),
        (SLICES.format("[0, 1], parameter: 1"), "did you mean 'parameters'"),
        (
            DOCUMENT.replace("weight: 1", "weight: 1, wieght: 2"),
            "parameters of a: unknown parameter 'wieght'; did you mean 'weight'?",
        ),
        (DOCUMENT + "modules: {default: {}}", "not models and modules"),
        ("merge_method: linear\nmodules: {default: {}}", "needs models or slices"),
        (DOCUMENT.replace("1}", "[0, x]}"), "weight='x' needs a number"),
        (DOCUMENT.replace("1}", "[{filter: mlp}]}"), "a filter has no value"),
        (DOCUMENT.replace("1}", "[{fliter: mlp}]}"), "did you mean 'filter'"),
        ("[1, 2]", "not a mergekit configuration"),
        ("a: &a [*a", "not valid YAML"),
        ("models: {a: b}\nmerge_method: linear", "models is missing"),
    ],
)
def test_errors_name_the_key(text: str, message: str) -> None:
    with pytest.raises(m3jax.RecipeError, match=re.escape(message)):
        mergekit.parse(text)


def test_notes_what_has_no_effect() -> None:
    text = DOCUMENT + "parameters: {density: 0.3, int8_mask: true}"
    assert mergekit.parse(text).notes == (
        "parameters: linear has no parameter 'density' there: no effect",
    )
