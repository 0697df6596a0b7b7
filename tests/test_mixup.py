"""The ratios of M3: the documented keys, and the distribution they come from."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from grids import thin
from scipy import stats

from m3jax import Mixup, mixup
from m3jax.mixup import draw_ratios, group_of

NAMES = ["lm_head.weight", "model.layers.0.a.weight", "model.layers.0.b.weight"]
DRAWS = 10_000
SIGMAS = 4.5  # a fair draw passes each bound 149999 times of 150000


def plain_jax_ratios(seed: int, alpha: float, num_models: int, group: str | None):
    key = jax.random.fold_in(jax.random.key(seed), 0)
    if group is not None:
        for word in np.frombuffer(hashlib.sha256(group.encode()).digest()[:8], "<u4"):
            key = jax.random.fold_in(key, word)
    with jax.enable_x64(True):
        drawn = jax.random.dirichlet(key, np.full(num_models, alpha))
    assert drawn.dtype == np.float64
    return np.asarray(drawn).astype(np.float32)


@pytest.mark.parametrize(
    ("alpha", "num_models", "seed"), thin([0.2, 0.5, 2.0], [2, 3, 5], [0, 7, 2**32 - 1])
)
def test_ratios_are_those_of_jax(seed: int, num_models: int, alpha: float):
    drawn = draw_ratios(Mixup(alpha=alpha), num_models, NAMES, seed)
    assert list(drawn) == [""]
    expected = plain_jax_ratios(seed, alpha, num_models, None)
    np.testing.assert_array_equal(np.float32(drawn[""]), expected)
    assert sum(drawn[""]) == pytest.approx(1, abs=1e-6)


def test_an_xla_without_the_fast_options(monkeypatch: pytest.MonkeyPatch):
    expected = draw_ratios(Mixup(), 2, NAMES, 7)
    other = jax.jit(mixup._dirichlet, compiler_options={"xla_of_another_year": True})
    monkeypatch.setattr(mixup, "_dirichlet_fast", other)
    assert draw_ratios(Mixup(), 2, NAMES, 7) == expected


@pytest.mark.parametrize(
    ("granularity", "groups"),
    [("layer", ["lm_head", "model.layers.0"]), ("tensor", NAMES)],
)
def test_granularity(granularity: str, groups: list[str]):
    drawn = draw_ratios(Mixup(alpha=0.7, granularity=granularity), 2, NAMES, 3)
    assert sorted(drawn) == sorted(groups)
    for group in groups:
        expected = plain_jax_ratios(3, 0.7, 2, group)
        np.testing.assert_array_equal(np.float32(drawn[group]), expected)
    assert len(set(drawn.values())) == len(groups)


@pytest.mark.parametrize(("alpha", "num_models"), thin([0.05, 0.5, 2.0], [2, 3, 5]))
def test_a_draw_does_not_depend_on_the_others(alpha: float, num_models: int):
    """To the bit; XLA's programs for different numbers of draws differ in the last."""
    by_tensor = Mixup(alpha=alpha, granularity="tensor")
    names = [f"tensor{i}" for i in range(301)]
    together = draw_ratios(by_tensor, num_models, names, 0)
    for few in (names[:1], names[1:8], names[8:50]):
        assert draw_ratios(by_tensor, num_models, few, 0).items() <= together.items()


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.11.mlp.up_proj.weight", "model.layers.11"),
        ("model.layers.1.mlp.experts.3.weight", "model.layers.1"),
        ("transformer.h.0.ln_1.weight", "transformer.h.0"),
        ("0.weight", "0"),
        ("lm_head.weight", "lm_head"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("model.ln2.weight", "model.ln2"),
        ("scale", "scale"),
    ],
)
def test_groups(name: str, layer: str):
    assert group_of(name, "model") == ""
    assert group_of(name, "layer") == layer
    assert group_of(name, "tensor") == name


def test_nothing_drawn():
    assert draw_ratios(Mixup(alpha=None), 2, NAMES, 0) is None
    assert draw_ratios(Mixup(alpha=0), 3, NAMES, 0) == {"": (1.0, 0.0, 0.0)}
    assert draw_ratios(Mixup(alpha=0.5), 1, NAMES, 0) == {"": (1.0,)}
    fixed = Mixup(alpha=None, ratios=(0.75, 0.25), granularity="tensor")
    assert draw_ratios(fixed, 2, NAMES, 0) == dict.fromkeys(NAMES, (0.75, 0.25))
    assert draw_ratios(Mixup(ratios=(0.75, 0.25)), 2, NAMES, 0) == {"": (0.75, 0.25)}


@pytest.mark.parametrize(
    ("alpha", "paper"), [(0.2, 0.67), (0.5, 0.41), (1.0, 0.20), (2.0, 0.06)]
)
def test_distribution(alpha: float, paper: float):
    """Beta(α, α); for small α one of the two models nearly alone."""
    ratios = first_ratios(Mixup(alpha=alpha, granularity="tensor"), 2)
    check_distribution(ratios, stats.beta(alpha, alpha))
    extreme = np.mean((ratios < 0.1) | (ratios > 0.9))
    assert extreme == pytest.approx(paper, abs=0.005 + SIGMAS * 0.5 / np.sqrt(DRAWS))


def test_distribution_of_three():
    """One part of Dirichlet(α, α, α) is Beta(α, 2α)."""
    ratios = first_ratios(Mixup(alpha=0.5, granularity="tensor"), 3)
    check_distribution(ratios, stats.beta(0.5, 1.0))


def test_pinned():
    """Of jax 0.10; a release that draws other numbers must be noticed."""
    drawn = [draw_ratios(Mixup(alpha=0.5), 2, NAMES, seed)[""] for seed in range(3)]
    assert drawn == [
        (0.29073160886764526, 0.7092683911323547),
        (0.7740905284881592, 0.22590948641300201),
        (0.3719354271888733, 0.6280645728111267),
    ]


def test_settings_of_jax_do_not_matter():
    """The same ratios under 64-bit types, another generator and the old threefry."""
    code = (
        "import json; from m3jax import Mixup; from m3jax.mixup import draw_ratios;"
        "print(json.dumps([draw_ratios(Mixup(alpha=0.5), k, [], 3) for k in (2, 3)]))"
    )
    settings = {
        "JAX_ENABLE_X64": "1",
        "JAX_DEFAULT_PRNG_IMPL": "rbg",
        "JAX_THREEFRY_PARTITIONABLE": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=True,
    )
    expected = [draw_ratios(Mixup(alpha=0.5), k, [], 3) for k in (2, 3)]
    assert json.loads(done.stdout) == json.loads(json.dumps(expected))


def check_distribution(ratios: np.ndarray, expected) -> None:
    for point in (0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999):
        share = expected.cdf(point)
        deviation = np.sqrt(share * (1 - share) / len(ratios))
        assert abs(np.mean(ratios <= point) - share) < SIGMAS * deviation, point


def first_ratios(mixup: Mixup, num_models: int) -> np.ndarray:
    names = [f"tensor{i}" for i in range(DRAWS)]
    drawn = draw_ratios(mixup, num_models, names, 1)
    return np.array([ratios[0] for ratios in drawn.values()])
