"""The 40 merges that the paper authors' released code made, in tests/golden."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import checkpoints
import functions
import numpy as np
import pytest
import reference
from command_line import Run
from grids import thinned

import m3jax

GOLDEN = Path(__file__).parent / "golden"
METHODS = {
    "average_merging": "average",
    "task_arithmetic": "task_arithmetic",
    "ties_merging": "ties",
}
TARGETS = {"delta_weight": "delta", "finetuned_weight": "weights"}
TOLERANCE = 1e-6  # absolute

CASES = [
    pytest.param(dtype, case, id=f"{dtype}-{case['name']}")
    for dtype in ("float32", "bfloat16")
    for case in json.loads((GOLDEN / dtype / "cases.json").read_text())["cases"]
]
NOTHING_DRAWN = [param for param in CASES if "masks" not in param.values[1]]


def test_all_cases_are_here():
    assert len(CASES) == 40
    assert len(NOTHING_DRAWN) == 24


@pytest.mark.parametrize(("dtype", "case"), CASES)
def test_functions(dtype: str, case: dict[str, Any]):
    base, models = _inputs(dtype, case)
    settings = _settings(case)
    rates = settings.pop("drop_rates")
    rescale, target = settings.pop("rescale"), settings.pop("target")
    if rates is not None:
        models = functions.drop(
            base,
            models,
            rates=rates,
            rescale=rescale,
            target=target,
            masks=_masks(dtype, case, models),
        )
    _check(dtype, case, functions.merge(base, models, **settings))


@pytest.mark.parametrize(("dtype", "case"), CASES)
def test_reference(dtype: str, case: dict[str, Any]):
    """The oracle of the other tests is held to the same standard."""
    base, models = _inputs(dtype, case)
    masks = _masks(dtype, case, models)
    lookup = None if masks is None else lambda i, name: masks[i][name]
    merged = reference.merge(base, models, **_settings(case), masks=lookup)
    _check(dtype, case, merged)


@pytest.mark.parametrize(("dtype", "case"), NOTHING_DRAWN)
def test_merge(dtype: str, case: dict[str, Any], tmp_path: Path):
    settings = _settings(case)
    mixup = m3jax.Mixup(alpha=None, ratios=settings["ratios"])
    if case["name"] == "average_m3_alpha0":
        mixup = m3jax.Mixup(alpha=0)  # λ = 1, whatever the seed
    recipe = m3jax.Recipe(
        method=settings["method"],
        mixup=mixup,
        scaling=settings["scaling"],
        trim_rate=settings["trim_rate"],
        dare=m3jax.Dare(
            drop_rate=settings["drop_rates"],
            strategy="magnitude",
            rescale=settings["rescale"],
            target=settings["target"],
        ),
        dtype="float32",
    )
    folder = GOLDEN / dtype
    models = [folder / name for name in case["models"]]
    m3jax.merge(folder / "base", models, tmp_path / "merged", recipe)
    _check(dtype, case, checkpoints.read(tmp_path / "merged"))


@pytest.mark.parametrize(
    ("dtype", "case"),
    thinned(NOTHING_DRAWN, lambda param: param.values[0] == "bfloat16"),
)
def test_command_line(dtype: str, case: dict[str, Any], tmp_path: Path, run: Run):
    settings = _settings(case)
    fields = {
        "method": settings["method"],
        "mixup.alpha": None,
        "mixup.ratios": settings["ratios"],
        "scaling": settings["scaling"],
        "trim_rate": settings["trim_rate"],
        "dare.drop_rate": settings["drop_rates"],
        "dare.strategy": "magnitude",
        "dare.rescale": settings["rescale"],
        "dare.target": settings["target"],
        "dtype": "float32",
    }
    folder = GOLDEN / dtype
    result = run(
        "merge",
        f"--base={folder / 'base'}",
        "--models=" + ",".join(str(folder / name) for name in case["models"]),
        f"--output={tmp_path / 'merged'}",
        *[f"--config.{field}={value}" for field, value in fields.items()],
    )
    assert result.code == 0, result.err
    _check(dtype, case, checkpoints.read(tmp_path / "merged"))


def _inputs(dtype: str, case: dict[str, Any]) -> tuple[Any, list[Any]]:
    loaded = [
        {
            name: tensor.astype(np.float32)
            for name, tensor in checkpoints.read(GOLDEN / dtype / folder).items()
        }
        for folder in ("base", *case["models"])
    ]
    return loaded[0], loaded[1:]


def _settings(case: dict[str, Any]) -> dict[str, Any]:
    """A case in the words of `reference.merge`."""
    ratio = case["lam"]
    if case.get("use_mixup") and case["alpha"] == 0:
        ratio = 1.0
    rates = case.get("weight_mask_rates")
    return {
        "method": METHODS[case.get("mask_apply_method", case["method"])],
        "ratios": None if ratio is None else (ratio, 1 - ratio),
        "scaling": case.get("scaling_coefficient", 1.0),
        "trim_rate": case.get("param_value_mask_rate", 0.5),
        "drop_rates": None if rates is None else tuple(rates),
        "rescale": case.get("use_weight_rescale", True),
        "target": TARGETS[case.get("weight_format", "delta_weight")],
    }


def _masks(
    dtype: str, case: dict[str, Any], models: list[Any]
) -> list[dict[str, np.ndarray]] | None:
    if "masks" not in case:
        return None
    packed = np.load(GOLDEN / dtype / case["name"] / "masks.npz")
    return [
        {
            name: np.unpackbits(packed[f"{folder}/{name}"], count=tensor.size)
            .astype(bool)
            .reshape(tensor.shape)
            for name, tensor in model.items()
        }
        for folder, model in zip(case["models"], models, strict=True)
    ]


def _check(dtype: str, case: dict[str, Any], merged: dict[str, np.ndarray]) -> None:
    path = GOLDEN / dtype / case["name"] / "merged.safetensors"
    expected = checkpoints.decode(path.read_bytes())
    assert set(merged) == set(expected)
    for name, tensor in expected.items():
        assert merged[name].dtype == np.float32
        np.testing.assert_allclose(merged[name], tensor, rtol=0, atol=TOLERANCE)
