"""Model Breadcrumbs and DELLA's MagPrune by their papers' rules."""

from __future__ import annotations

from typing import Any

import checkpoints
import jax
import numpy as np

import m3jax
from m3jax import prng

SHAPES = {"layers.0.up.weight": (9, 14), "layers.0.bias": (23,), "empty": (0, 3)}
Tensors = dict[str, np.ndarray]


def inputs() -> tuple[Tensors, list[Tensors]]:
    base = checkpoints.random_model(0, SHAPES)
    models = [
        checkpoints.random_model(k, SHAPES, np.float32, base) for k in range(1, 3)
    ]
    return base, models


def merged(base: Any, models: Any, seed: int = 0, **fields: Any) -> Tensors:
    recipe = m3jax.Recipe.from_dict({"mixup": {"alpha": None}, **fields})
    found = m3jax.merge_params(base, models, recipe, seed)
    return {name: np.asarray(leaf, np.float64) for name, leaf in found.items()}


def test_breadcrumbs_keeps_what_lies_between_two_ranks():
    base, models = inputs()
    models[1]["layers.0.bias"] = base["layers.0.bias"]  # a task with nothing there
    fields = {"method": "task_arithmetic", "breadcrumbs": {"beta": 0.6, "gamma": 0.1}}
    found = merged(base, models, scaling=0.5, **fields)
    for name, own in found.items():
        wanted = base[name].astype(np.float64)
        for model in models:
            tau = (model[name] - base[name]).astype(np.float64)
            order = np.argsort(np.abs(tau), axis=None)
            n = tau.size
            kept = np.zeros(n)
            kept[order[int(n * 0.6) : n - int(n * 0.1)]] = 1
            wanted = wanted + 0.5 * tau * kept.reshape(tau.shape)
        np.testing.assert_allclose(own, wanted, atol=1e-8)


def test_breadcrumbs_that_leave_nothing_give_the_base():
    base, models = inputs()
    fields = {"method": "task_arithmetic", "breadcrumbs": {"beta": 0.95, "gamma": 0.1}}
    for name, own in merged(base, models, **fields).items():
        np.testing.assert_array_equal(own, base[name])


def test_magprune_drops_by_rank_and_makes_up_for_each_entrys_own_rate():
    base, models = inputs()
    own = {"drop_rate": [0.5, 0.7], "epsilon": 0.4}
    fields = {"method": "task_arithmetic", "magprune": own}
    found = merged(base, models, 5, **fields)
    for name, leaf in found.items():
        wanted = base[name].astype(np.float64)
        for i, (model, rate) in enumerate(zip(models, (0.5, 0.7), strict=True)):
            tau = (model[name] - base[name]).astype(np.float64)
            if not tau.size:
                continue
            rank = np.argsort(np.argsort(-np.abs(tau), axis=-1), axis=-1)
            drop = rate - 0.2 + 0.4 * rank / tau.shape[-1]
            drop = np.round(drop * 65536) / 65536
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), 1), i)
            for word in prng.name_words([name])[0]:
                key = jax.random.fold_in(key, word)
            with jax.enable_x64(True):
                bits = jax.random.bits(key, (-(-tau.size // 4),), np.uint64)
            lanes = np.asarray(bits).view("<u2")[: tau.size].reshape(tau.shape)
            kept = lanes >= np.round(drop * 65536)
            wanted = wanted + np.where(kept, tau / (1 - drop), 0)
        np.testing.assert_allclose(leaf, wanted, atol=1e-7, err_msg=name)


def test_magprune_keeps_task_vectors_on_average_and_elects_before_ties():
    base, models = inputs()
    name = "layers.0.up.weight"
    fields = {"method": "task_arithmetic", "magprune": {"drop_rate": 0.5}}
    every = [
        merged(base, models[:1], seed, **fields)[name] - base[name]
        for seed in range(24)
    ]
    tau = models[0][name] - base[name]
    spread = np.abs(np.mean(every, axis=0) - tau).mean() / np.abs(tau).mean()
    assert spread < 0.3  # √(1/24) of the deviation of one draw, about 1
    # DELLA: what was dropped everywhere is elected nowhere.
    della = {"method": "ties", "ties": {"trim_rate": 0.0}}
    gone = {"drop_rate": 1.0, "epsilon": 0.0}
    for key, own in merged(base, models, magprune=gone, **della).items():
        np.testing.assert_array_equal(own, base[key])
