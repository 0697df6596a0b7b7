"""Merges of random models by random recipes, run in random ways, equal the formulas."""

from __future__ import annotations

import random
import re
from pathlib import Path

import checkpoints
import jax
import ml_dtypes
import numpy as np
import pytest
import reference

import m3jax
from m3jax.engine.execution import Execution
from m3jax.mixup import group_of

DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
METHODS = ("average", "task_arithmetic", "ties")  # those that the oracle knows
SIZES = (0, 1, 2, 3, 5, 17, 33, 64, 127)
NAMES = ("model.layers.{}.w{}", "h.{}.x{}.weight", "t{}.{}")


@pytest.mark.parametrize(
    "seed",
    [*range(6), *(pytest.param(i, marks=pytest.mark.slow) for i in range(6, 150))],
)
def test_any_merge(seed: int, tmp_path: Path):
    choose = random.Random(seed)
    base, models = _models(choose)
    for i, tensors in enumerate([base, *models]):
        checkpoints.write(tmp_path / str(i), tensors, shards=_shards(choose, tensors))
    recipe = _recipe(choose, len(models), list(base))
    folders = [tmp_path / str(i) for i in range(1, 1 + len(models))]
    result = m3jax.merge(
        tmp_path / "0",
        folders,
        tmp_path / "merged",
        recipe,
        seed=seed,
        execution=_execution(choose),
    )
    found = checkpoints.read(tmp_path / "merged")
    assert set(found) == set(base)
    expected = _expected(base, models, recipe, seed, result.ratios)
    # A sole survivor's weight cancels up to rounding in TIES; the rest is exact.
    tolerance = (
        {"rtol": 2e-6, "atol": 3e-8} if recipe.method.name == "ties" else {"rtol": 0}
    )
    for name, tensor in expected.items():
        rounded = tensor.astype(found[name].dtype)
        np.testing.assert_allclose(found[name], rounded, **tolerance, err_msg=name)
    assert m3jax.verify(tmp_path / "merged") == []


def _models(choose: random.Random) -> tuple[dict, list[dict]]:
    """A base and one to four models; integers are the same in all of them."""
    generator = np.random.default_rng(choose.randrange(2**32))
    shapes = {}
    for i in range(choose.randint(1, 9)):
        name = choose.choice(NAMES).format(choose.randint(0, 12), i)
        shapes[name] = tuple(choose.choice(SIZES) for _ in range(choose.randint(0, 3)))
    integers = {
        f"ids{i}": generator.integers(0, 100, (3, 5)[:i]).astype(np.int64)
        for i in range(choose.randint(0, 2))
    }

    def model(base: checkpoints.Tensors | None) -> checkpoints.Tensors:
        exact = checkpoints.random_model(generator, shapes, np.float64, base)
        own, mixed = choose.choice(DTYPES), choose.random() < 0.4
        tensors = {
            name: tensor.astype(choose.choice(DTYPES) if mixed else own)
            for name, tensor in exact.items()
        }
        return tensors | integers

    base = model(None)
    return base, [model(base) for _ in range(choose.randint(1, 4))]


def _shards(choose: random.Random, tensors: checkpoints.Tensors) -> list | None:
    names, count = list(tensors), choose.choice([0, 0, 1, 2, 3])
    choose.shuffle(names)
    return [part for part in (names[i::count] for i in range(count)) if part] or None


def _recipe(choose: random.Random, num_models: int, names: list[str]) -> m3jax.Recipe:
    weights = [choose.random() + 0.01 for _ in range(num_models)]
    rates = tuple(choose.choice([0.0, 0.1, 0.5, 1.0]) for _ in range(num_models))
    excluded = [name for name in names if choose.random() < 0.15]
    mixup = choose.choice(["off", "drawn", "given"])
    granularity = choose.choice(["model", "layer", "tensor"])
    return m3jax.Recipe(
        method=choose.choice(METHODS),
        mixup=m3jax.Mixup(
            alpha=choose.choice([0, 0.1, 0.5, 2]) if mixup == "drawn" else None,
            ratios=tuple(weight / sum(weights) for weight in weights)
            if mixup == "given"
            else None,
            granularity=granularity,
        ),
        scaling=choose.choice([1.0, 0.3, -1.0, 0.0]),
        trim_rate=choose.choice([0.0, 0.2, 0.5, 0.9, 1.0]),
        dare=m3jax.Dare(
            drop_rate=choose.choice([None, None, 0.0, 0.2, 0.95, 1.0, rates, rates]),
            rescale=choose.random() < 0.7,
            strategy=choose.choice(["random", "magnitude"]),
            target=choose.choice(["delta", "weights"]),
        ),
        exclude=tuple(re.escape(name) + "$" for name in excluded),
        dtype="float32",
        max_shard_size=choose.choice(["5GB", 1000, 5000, 100]),
    )


def _execution(choose: random.Random) -> Execution:
    return Execution(
        threads=choose.choice([None, 1, 2, 4, 7]),
        chunk_size=choose.choice([None, 1024, 2048, 5000, 1 << 20]),
        devices=jax.local_devices()[: choose.choice([1, 1, 2, 3, 8])],
    )


def _expected(
    base: checkpoints.Tensors,
    models: list[checkpoints.Tensors],
    recipe: m3jax.Recipe,
    seed: int,
    drawn: dict[str, tuple[float, ...]] | None,
) -> checkpoints.Tensors:
    copied = {
        name: tensor if tensor.dtype == np.int64 else tensor.astype(np.float32)
        for name, tensor in base.items()
        if tensor.dtype == np.int64 or recipe.excludes(name)
    }
    names = [name for name in base if name not in copied]
    if not names:
        return copied
    granularity = recipe.mixup.granularity
    dare = recipe.transform("dare")
    rates = masks = None
    if dare is not None:
        rates = dare.drop_rate
        rates = rates if isinstance(rates, tuple) else (rates,) * len(models)
    if dare is not None and dare.strategy == "random":
        own = rates

        def masks(model: int, name: str) -> np.ndarray:
            shape = base[name].shape
            return reference.plain_jax_mask(seed, model, name, shape, own[model])

        rates = [round(rate * 65536) / 65536 for rate in rates]
    return copied | reference.merge(
        {name: base[name] for name in names},
        [{name: model[name] for name in names} for model in models],
        method=recipe.method.name,
        ratios=drawn and {name: drawn[group_of(name, granularity)] for name in names},
        scaling=getattr(recipe.method, "scaling", 1.0),
        trim_rate=getattr(recipe.method, "trim_rate", 0.5),
        drop_rates=rates,
        rescale=dare is None or dare.rescale,
        target="delta" if dare is None else dare.target,
        masks=masks,
    )
