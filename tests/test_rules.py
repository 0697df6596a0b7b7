"""Other steps for some tensors: each is what a merge by its own steps gives it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from command_line import Run

import m3jax
from m3jax.methods import METHODS
from m3jax.recipe import Mixup, Recipe, RecipeError

SEED = 11
SHAPES = {
    "model.embed_tokens.weight": (31, 7),
    "model.layers.0.attn.weight": (13, 11),
    "model.layers.0.mlp.weight": (40, 41),
    "model.layers.1.attn.weight": (13, 11),
    "model.layers.1.mlp.weight": (40, 41),
    "model.norm.weight": (3,),
    "scale": (),
}
TIES = METHODS["ties"](trim_rate=0.3)
RULES: Any = (
    (r"layers\.1\.mlp", (METHODS["slerp"](),)),
    ("mlp", (m3jax.Dare(drop_rate=0.4), METHODS["model_stock"]())),
    ("attn", (TIES,)),
    ("norm", (METHODS["iso_c"](),)),
)
ALONE: dict[str, tuple[Any, ...]] = {
    "model.embed_tokens.weight": (METHODS["average"](),),
    "model.layers.0.attn.weight": (TIES,),
    "model.layers.0.mlp.weight": RULES[1][1],
    "model.layers.1.attn.weight": (TIES,),
    "model.layers.1.mlp.weight": RULES[0][1],
    "model.norm.weight": RULES[3][1],
    "scale": (METHODS["average"](),),
}
RECIPE = Recipe(method="average", rules=RULES, mixup=Mixup(alpha=0.8))


def _trees() -> tuple[Any, list[Any]]:
    base = checkpoints.random_model(0, SHAPES)
    return base, [checkpoints.random_model(i, SHAPES, base=base) for i in (1, 2)]


def _alone(name: str) -> np.ndarray:
    """A tensor by its own steps; thresholds are of all tensors with these."""
    base, models = _trees()
    ours = [own for own, steps in ALONE.items() if steps == ALONE[name]]
    *transforms, method = ALONE[name]
    on = "weights" in method.fields()
    recipe = Recipe(
        method=method,
        transforms=tuple(transforms),
        mixup=Mixup(alpha=0.8 if on else None),
    )
    trees = [{own: tree[own] for own in ours} for tree in (base, *models)]
    return np.asarray(m3jax.merge_params(trees[0], trees[1:], recipe, SEED)[name])


def _files(folder: Path) -> tuple[Path, list[Path]]:
    base, models = _trees()
    paths = [checkpoints.write(folder / f"m{i}", own) for i, own in enumerate(models)]
    return checkpoints.write(folder / "base", base), paths


def test_each_tensor_is_merged_by_its_own_steps() -> None:
    base, models = _trees()
    merged = m3jax.merge_params(base, models, RECIPE, SEED)
    for name in SHAPES:
        assert np.asarray(merged[name]).tobytes() == _alone(name).tobytes(), name


@pytest.mark.parametrize(
    "execution",
    [
        {"chunk_size": 1024},
        {"threads": 1},
        {"executor": "sharded"},
    ],
    ids=str,
)
def test_files_hold_what_memory_gives(execution: Any, tmp_path: Path) -> None:
    base, models = _files(tmp_path)
    settings: Any = {"fsync": False, **execution}
    output = tmp_path / "out"
    m3jax.merge(
        base,
        models,
        output,
        RECIPE,
        seed=SEED,
        execution=m3jax.Execution(**settings),
    )
    merged = m3jax.merge_params(*_trees(), RECIPE, SEED)
    for name, own in checkpoints.read(output).items():
        assert own.tobytes() == np.asarray(merged[name]).tobytes(), name


def test_rules_are_recorded_and_replayed(tmp_path: Path, run: Run) -> None:
    base, models = _files(tmp_path)
    config = tmp_path / "rules.json"
    config.write_text(json.dumps(RECIPE.to_dict()))
    both = ",".join(map(str, models))
    first, again = tmp_path / "first", tmp_path / "again"
    ran = run(
        "merge",
        f"--base={base}",
        f"--models={both}",
        f"--config={config}",
        f"--seed={SEED}",
        f"--output={first}",
    )
    assert ran.code == 0, ran.err
    assert Recipe.from_dict(json.loads((first / "m3jax.json").read_text())["recipe"])
    ran = run("merge", f"--config={first / 'm3jax.json'}", f"--output={again}")
    assert ran.code == 0, ran.err
    read = [(own / "model.safetensors").read_bytes() for own in (first, again)]
    assert read[0] == read[1]


def test_dry_run_says_what_each_rule_merges(tmp_path: Path, run: Run) -> None:
    base, models = _files(tmp_path)
    some = [{"tensors": "attn", "method": "slerp"}, {"tensors": "mpl", "method": "emr"}]
    ran = run(
        "merge",
        f"--base={base}",
        f"--models={models[0]},{models[1]}",
        f"--config.rules={json.dumps(some)}",
        "--dry_run",
        f"--output={tmp_path / 'out'}",
    )
    assert ran.code == 0, ran.err
    assert "average; rule 1: slerp (2 tensors); rule 2: emr (0 tensors)" in ran.out
    assert "rules: 'mpl' matches no tensor" in ran.out


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (3, "rules=3 needs a list of groups"),
        ([{"method": "ties"}], "needs to be a group with 'tensors'"),
        ([{"tensors": "(", "method": "ties"}], "rules[0]='(' needs a regular"),
        ([{"tensors": "a", "method": "tise"}], "rules['a']: method='tise' needs one"),
        (
            [{"tensors": "a", "method": "ties", "ties": {"trim_rate": 3}}],
            "rules['a']: trim_rate=3 needs a number from 0 to 1",
        ),
        ([{"tensors": "a", "method": "ties", "seed": 1}], "unknown recipe field"),
    ],
    ids=str,
)
def test_wrong_rules_are_named(rules: Any, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict({"rules": rules})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_rule_needs_what_its_steps_need() -> None:
    with pytest.raises(RecipeError, match="method='ties' needs a base"):
        Recipe(rules=(("a", (TIES,)),)).check(num_models=2, has_base=False)
    with pytest.raises(RecipeError, match="2 models for method slerp"):
        Recipe(rules=RULES).check(num_models=3, has_base=True)


def test_m3_draws_for_the_methods_that_have_ratios() -> None:
    only = Recipe(method="model_stock", rules=(("a", (TIES,)),))
    only.check(num_models=2, has_base=True)
    with pytest.raises(RecipeError, match="method model_stock has no ratios"):
        drawn = Recipe(method="model_stock", mixup=Mixup(alpha=0.4))
        drawn.check(num_models=2, has_base=True)
    Recipe(method="model_stock").check(num_models=2, has_base=True)  # M3 is off
