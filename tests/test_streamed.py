"""The streamed engine: the same bytes however it runs, and the formulas' numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import checkpoints
import jax
import numpy as np
import pytest
import reference
from grids import thin

import m3jax
from m3jax.engine import streamed
from m3jax.engine.execution import Execution
from m3jax.methods import TRANSFORMS

SHAPES = {
    "model.embed_tokens.weight": (97, 29),
    "model.layers.0.experts.weight": (3, 5, 7),
    "model.layers.0.norm.weight": (1025,),
    "model.layers.1.scale": (),
    "model.layers.1.nothing.weight": (0, 4),
    "model.layers.10.up_proj.weight": (41, 71),
    "model.norm.weight": (3,),
}
DARE = {
    "no DARE": m3jax.Dare(),
    "random": m3jax.Dare(drop_rate=(0.3, 0.6)),
    "weights": m3jax.Dare(drop_rate=0.3, target="weights"),
    "magnitude": m3jax.Dare(drop_rate=(0.3, 0.6), strategy="magnitude", rescale=False),
    "weights by magnitude": m3jax.Dare(
        drop_rate=0.3, strategy="magnitude", target="weights"
    ),
}
M3 = {
    "off": m3jax.Mixup(alpha=None),
    "model": m3jax.Mixup(alpha=0.5),
    "layer": m3jax.Mixup(alpha=1.0, granularity="layer"),
    "tensor": m3jax.Mixup(alpha=1.0, granularity="tensor"),
}
GROUPS = {  # the group of tensors that shares a draw
    "off": None,
    "model": lambda name: "",
    "layer": lambda name: re.match(r"model\.(layers\.\d+|\w+)", name).group(),
    "tensor": lambda name: name,
}
KERNELS = {"average": 1, "task_arithmetic": 1, "ties": 3}
METHODS = tuple(KERNELS)  # those that the oracle knows; test_contract has them all
SEED = 4_000_000_005
EXECUTIONS = [
    {"chunk_size": 1024, "threads": 1, "devices": 1},
    {"chunk_size": 1024, "threads": 4, "devices": 8},
    {"chunk_size": 3 * 1024, "threads": 2, "devices": 1},
    {"chunk_size": 8 << 20, "threads": 4, "devices": 1},
    {"chunk_size": 8 << 20, "threads": 1, "devices": 8},
    {"chunk_size": None, "threads": None, "devices": 3},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in bfloat16 and three models in float32, two of them in shards.

    Merges of these into float32 show every bit of the arithmetic.
    """
    folder = tmp_path_factory.mktemp("models")
    names = list(SHAPES)
    base = checkpoints.random_model(0, SHAPES, checkpoints.BFLOAT16)
    checkpoints.write(folder / "base", base)
    for i, (name, shards) in enumerate(
        {"a": None, "b": [names[:3], names[3:]], "c": [names[::2], names[1::2]]}.items()
    ):
        model = checkpoints.random_model(i + 1, SHAPES, np.float32, base)
        checkpoints.write(folder / name, model, shards=shards)
    return folder


@pytest.fixture
def outputs(tmp_path: Path) -> Iterator[Path]:
    return (tmp_path / str(i) for i in itertools.count())


@pytest.mark.parametrize(
    ("method", "m3", "dare"), thin(METHODS, ["off", "layer"], DARE)
)
def test_same_bytes(method: str, m3: str, dare: str, models: Path, outputs):
    recipe = m3jax.Recipe(
        method=method,
        mixup=M3[m3],
        dare=DARE[dare],
        scaling=0.8,
        trim_rate=0.6,
        dtype="float32",
    )
    compared = EXECUTIONS[1:4] if m3 == "off" else EXECUTIONS[::4]
    digests = [
        merge(models, "ab", next(outputs), recipe, **execution)
        for execution in compared
    ]
    assert all(digest == digests[0] for digest in digests[1:])


@pytest.mark.parametrize("m3", M3)
def test_same_bytes_however_it_is_run(m3: str, models: Path, outputs):
    """Every way to run it, with all that a merge can do at once, in several shards."""
    recipe = m3jax.Recipe(
        method="ties",
        mixup=M3[m3],
        dare=m3jax.Dare(drop_rate=(0.3, 0.6, 0.1)),
        exclude=(r"model\.norm",),
        dtype="float32",
        max_shard_size=3000,
    )
    digests = [
        merge(models, "abc", next(outputs), recipe, **execution)
        for execution in EXECUTIONS
    ]
    assert len([name for name in digests[0] if name.endswith(".safetensors")]) == 6
    assert all(digest == digests[0] for digest in digests[1:])


def test_same_bytes_whatever_the_sample(models: Path, outputs, monkeypatch):
    """A sample of the model decides how often it is read, never the threshold."""
    recipe = m3jax.Recipe(method="ties")
    expected = merge(models, "ab", next(outputs), recipe)
    monkeypatch.setattr(streamed, "_SAMPLE_PAYS", 1)
    for tiles in (1, 2, 4):
        monkeypatch.setattr(streamed, "_SAMPLE_TILES", tiles)
        for devices in (1, 8):
            found = merge(models, "ab", next(outputs), recipe, devices=devices)
            assert found == expected


def test_shards_do_not_change_a_tensor(models: Path, outputs):
    recipe = m3jax.Recipe(method="ties", dare=DARE["random"])
    in_shards = dataclasses.replace(recipe, max_shard_size="2KB")
    whole, shards = next(outputs), next(outputs)
    merge(models, "ab", whole, recipe)
    merge(models, "ab", shards, in_shards)
    one, several = checkpoints.read(whole), checkpoints.read(shards)
    assert set(one) == set(several)
    for name, tensor in one.items():
        assert several[name].tobytes() == tensor.tobytes()


@pytest.mark.parametrize(("method", "m3", "dare"), thin(METHODS, M3, DARE))
def test_equals_the_reference(method: str, m3: str, dare: str, models: Path, outputs):
    """In float32, so that nothing hides in the rounding of the output."""
    output = next(outputs)
    recipe = m3jax.Recipe(
        method=method,
        mixup=M3[m3],
        dare=DARE[dare],
        scaling=0.8,
        trim_rate=0.6,
        dtype="float32",
    )
    merge(models, "ab", output, recipe)
    drawn = json.loads((output / "m3jax.json").read_text())["ratios"]
    own = DARE[dare]
    rates = None
    if own.on:
        rates = tuple(np.broadcast_to(own.drop_rate, 2).tolist())
    random = rates is not None and own.strategy == "random"
    expected = reference.merge(
        checkpoints.read(models / "base"),
        [checkpoints.read(models / name) for name in "ab"],
        method=method,
        ratios=drawn and {name: drawn[GROUPS[m3](name)] for name in SHAPES},
        scaling=0.8,
        trim_rate=0.6,
        drop_rates=[round(p * 65536) / 65536 for p in rates] if random else rates,
        rescale=own.rescale,
        target=own.target,
        masks=functools.partial(mask, rates) if random else None,
    )
    merged = checkpoints.read(output)
    assert set(merged) == set(SHAPES)
    for name, tensor in expected.items():
        assert (merged[name].dtype, merged[name].shape) == (np.float32, SHAPES[name])
        # A sole survivor's weight cancels up to rounding in TIES; the rest is exact.
        tolerance = 3e-8 if method == "ties" else 0
        np.testing.assert_allclose(merged[name], tensor, rtol=0, atol=tolerance)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("devices", [1, 8])
def test_compilations_do_not_grow_with_the_model(method: str, devices: int, outputs):
    """Each kernel is compiled once, for 2 tensors and then for 41 of other shapes."""
    recipe = m3jax.Recipe(
        method=method, mixup=m3jax.Mixup(alpha=None), dare=m3jax.Dare(drop_rate=0.1)
    )
    chunk_size = 40 * 1024  # as no other test has it
    counts = []
    for number in (1, 40):
        folder = next(outputs)
        shapes = {f"layers.{i}.weight": (i + 1, 57) for i in range(number)}
        shapes["larger.than.a.chunk"] = (70_001,)
        base = checkpoints.random_model(0, shapes)
        checkpoints.write(folder / "base", base)
        checkpoints.write(folder / "a", checkpoints.random_model(1, shapes, base=base))
        settings = {"devices": devices, "chunk_size": chunk_size, "threads": 3}
        with compilations() as count:
            merge(folder, "aa", folder / "o", recipe, **settings)
        counts.append(len(count))
    assert 0 < counts[0] <= KERNELS[method] + 1  # and DARE's masks
    assert counts[1] == 0


def test_rows_that_do_not_fill_the_last_block(outputs):
    """The last rows of a tensor, the last ones of the file, and all in one chunk."""
    folder = next(outputs)
    shapes = {"layers.0.weight": (33, 100), "layers.1.weight": (3, 100)}
    base = checkpoints.random_model(0, shapes)
    checkpoints.write(folder / "base", base)
    checkpoints.write(folder / "a", checkpoints.random_model(1, shapes, base=base))
    by_rank = TRANSFORMS["sparsify"](by="rank", density=0.5)
    rescale = TRANSFORMS["rescale"](norm="l1")
    recipe = m3jax.Recipe(transforms=(by_rank, rescale), method="task_arithmetic")
    digests = [
        merge(folder, "aa", folder / str(size), recipe, chunk_size=size, devices=1)
        for size in (None, 1024)
    ]
    assert digests[0] == digests[1]
    assert m3jax.verify(folder / "1024") == []


def test_64_bit_types_do_not_matter(models: Path, outputs):
    recipe = m3jax.Recipe(method="ties", dare=DARE["random"])
    expected = merge(models, "ab", next(outputs), recipe)
    jax.config.update("jax_enable_x64", True)
    try:
        assert merge(models, "ab", next(outputs), recipe) == expected
    finally:
        jax.config.update("jax_enable_x64", False)


def test_denormal_numbers(outputs):
    """XLA may take them for 0; it does so alike however the merge is run."""
    folder, shape = next(outputs), (5001,)
    base = {"a": np.zeros(shape, np.float32)}
    patterns = np.random.default_rng(0).integers(0, 1 << 23, shape).astype(np.uint32)
    model = {"a": patterns.view(np.float32)}
    checkpoints.write(folder / "base", base)
    checkpoints.write(folder / "a", model)
    recipe = m3jax.Recipe(method="ties", dare=DARE["magnitude"])
    first, *others = [
        merge(folder, "aa", folder / str(i), recipe, **execution)
        for i, execution in enumerate(EXECUTIONS)
    ]
    assert all(digest == first for digest in others)
    merged = checkpoints.read(folder / "0")["a"]
    np.testing.assert_allclose(merged, model["a"], atol=np.finfo(np.float32).tiny)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Collects an entry for every program that XLA compiles meanwhile."""
    heard: list[str] = []

    def listen(event: str, seconds: float, **facts: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            heard.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield heard
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def mask(rates: tuple[float, ...], model: int, name: str) -> np.ndarray:
    shape = SHAPES[name]
    return reference.plain_jax_mask(SEED, model, name, shape, rates[model])


def merge(
    folder: Path,
    names: str,
    output: Path,
    recipe: m3jax.Recipe,
    *,
    chunk_size: int | None = None,
    threads: int | None = None,
    devices: int = 1,
) -> dict[str, str]:
    """Merges models of `folder`; the checksums of every file of the output."""
    execution = Execution(
        chunk_size=chunk_size,
        threads=threads,
        devices=jax.local_devices()[:devices],
        fsync=False,
    )
    m3jax.merge(
        folder / "base",
        [folder / name for name in names],
        output,
        recipe,
        seed=SEED,
        execution=execution,
    )
    return checkpoints.digest(output)
