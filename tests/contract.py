"""What every registered method has to keep, as checks that take its name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checkpoints
import jax
import numpy as np
import pytest
from command_line import Run

import m3jax
from m3jax.engine.recorder import Recorder
from m3jax.methods import METHODS
from m3jax.methods.fields import Choice, Number, Weights
from m3jax.recipe import Mixup, Recipe

SEED = 7
# A scalar, an empty tensor, a vector of several tiles, a matrix that the devices share,
# three axes, and more elements than the smallest chunk. Few: each is a compilation.
SHAPES: checkpoints.Shapes = {
    "model.layers.0.experts.weight": (3, 5, 7),
    "model.layers.0.mlp.up_proj.weight": (24, 46),
    "model.layers.0.norm.weight": (1025,),
    "model.layers.1.nothing.weight": (0, 4),
    "model.layers.1.scale": (),
}
MATRIX = "model.layers.0.mlp.up_proj.weight"
# For `make test`: in memory and sharded, each shape is several compilations.
THIN = {name: SHAPES[name] for name in (MATRIX, "model.layers.1.scale")}
# Of K equal models these make something else than that model, and say so.
NOT_IDEMPOTENT: dict[str, str] = {
    "arcee_fusion": "takes the entries that matter most",
    "tsv_m": "keeps a K-th of the singular values",
    "balanced_tsv": "keeps the triples that weigh",
    "wudi_closed_form": "its equations square what a direction weighs",
    "actmerge": "its equations square what a direction weighs",
    "iso_c": "makes all singular values equal",
    "iso_cts": "makes all singular values equal",
    "ram": "leaves out changes of at most 1e-5",
    "ram_plus": "leaves out changes of at most 1e-5",
    "ramplus_tl": "leaves out changes of at most 1e-5",
    "nearswap": "moves the base by at most t",
    "wudi": "descends from the sum on matrices",
    "star": "keeps the large singular values",
    "localize_and_stitch": "keeps the largest entries alone",
    "pcb": "keeps the entries that weigh most",
    "coefficients": "has those of its files",
}

Check = Callable[..., None]
Fields = dict[str, Any]


def recipe(method: str, **settings: Any) -> Recipe:
    """The method with its defaults, and with M3 where it has ratios."""
    weighs = isinstance(METHODS[method].fields().get("weights"), Weights)
    mixup = Mixup(alpha=0.7 if weighs else None)
    return Recipe(method=required(method), **{"mixup": mixup, **settings})


def required(method: str, count: int = 2) -> Any:
    """The method; a field without default that may be None gets a value."""
    cls = METHODS[method]
    if "coefficients" in cls.fields():
        return cls(coefficients=(0.5,) * count)
    return cls()


def inputs(
    method: str, dtype: Any = np.float32, shapes: checkpoints.Shapes = SHAPES
) -> tuple[Any, list[Any]]:
    base = checkpoints.random_model(0, shapes, dtype)
    count = METHODS[method].num_models or 2
    models = [
        checkpoints.random_model(i, shapes, dtype, base) for i in range(1, count + 1)
    ]
    return base, models


def statistics_of(
    method: str, count: int, shapes: checkpoints.Shapes = SHAPES
) -> list[Any] | None:
    """Positive statistics beside each model, for a method that reads some."""
    if not METHODS[method].beside:
        return None
    made = [checkpoints.random_model(90 + i, shapes) for i in range(count)]
    if method in ("regmean", "lot"):
        grams = []
        for i in range(count):
            generator = np.random.default_rng(i)
            own = {}
            for name, shape in shapes.items():
                if len(shape) == 2 and min(shape) > 1:
                    x = generator.normal(size=(64, shape[1])).astype(np.float32)
                    own[name] = x.T @ x / 64
            grams.append(own)
        return grams
    return [{n: np.asarray(np.square(own) * 1e3) for n, own in m.items()} for m in made]


class Files:
    """The checkpoints of a method's inputs in a folder, and merges of them."""

    def __init__(
        self,
        folder: Path,
        method: str,
        dtype: Any = np.float32,
        shapes: checkpoints.Shapes = SHAPES,
    ):
        self.folder, self.method = folder, method
        base, models = inputs(method, dtype, shapes)
        self.base = checkpoints.write(folder / "base", base)
        self.models = [
            checkpoints.write(folder / f"m{i}", m) for i, m in enumerate(models)
        ]
        beside = statistics_of(method, len(models), shapes)
        self.statistics = beside and [
            checkpoints.write(folder / f"s{i}", own) for i, own in enumerate(beside)
        ]

    def merge(self, name: str, own: Recipe, **execution: Any) -> Path:
        settings = {"fsync": False, **execution}
        output = self.folder / name
        extra = {} if self.statistics is None else {"statistics": self.statistics}
        m3jax.merge(
            self.base,
            self.models,
            output,
            own,
            seed=SEED,
            execution=m3jax.Execution(**settings),
            **extra,
        )
        return output


def in_memory(
    method: str,
    own: Recipe,
    dtype: Any = np.float32,
    shapes: checkpoints.Shapes = SHAPES,
) -> dict[str, Any]:
    """What `merge_params` makes, named as in files."""
    base, models = inputs(method, dtype, shapes)
    beside = statistics_of(method, len(models), shapes)
    extra = {} if beside is None else {"statistics": beside}
    merged = m3jax.merge_params(base, models, own, SEED, **extra)
    if set(merged) == set(base):
        return {name: np.asarray(array) for name, array in merged.items()}
    found = {}
    for part, tree in merged.items():
        for name, array in tree.items():
            values = np.asarray(array)
            if values.dtype == np.bool_:
                values = np.packbits(values)
            found[f"{name}.{part}" if part else name] = values
    return found


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert set(a) == set(b)
    for name, values in a.items():
        assert values.dtype == b[name].dtype, name
        np.testing.assert_array_equal(values, b[name], err_msg=name)


def check_executors(method: str, folder: Path, shapes: checkpoints.Shapes) -> None:
    """Streamed, in chunks, over devices, sharded and in memory: the same bits.

    After DARE: the long check.
    """
    files = Files(folder, method, checkpoints.BFLOAT16, shapes)
    drops = shapes is SHAPES and not METHODS[method].beside
    dare = {"dare": m3jax.Dare(drop_rate=0.3)} if drops else {}
    own = recipe(method, dtype="float32", **dare)
    whole: Fields = {"devices": jax.devices()[:1], "chunk_size": 8192}
    expected = checkpoints.read(files.merge("whole", own, **whole))
    ways: dict[str, Fields] = {
        "chunks": {"chunk_size": 1024, "threads": 3},
        "devices": {"devices": jax.devices(), "chunk_size": 8192},
        "sharded": {"executor": "sharded", "mesh": {"rows": 4, "columns": 2}},
    }
    for name, execution in ways.items():
        same(checkpoints.read(files.merge(name, own, **execution)), expected)
    same(in_memory(method, own, checkpoints.BFLOAT16, shapes), expected)


def check_float64(method: str, folder: Path, shapes: checkpoints.Shapes) -> None:
    """float64 inputs are merged in float64, alike over devices: the long check."""
    files = Files(folder, method, np.float64, shapes)
    own = recipe(method)
    expected = checkpoints.read(files.merge("streamed", own))
    if shapes is SHAPES:
        sharded = files.merge("sharded", own, executor="sharded")
        same(checkpoints.read(sharded), expected)
    narrow = Files(folder / "narrow", method, shapes=shapes).merge("out", own)
    rounded, exact = checkpoints.read(narrow)[MATRIX], expected[MATRIX]
    assert exact.dtype == np.float64
    assert np.any(exact != exact.astype(np.float32))
    np.testing.assert_allclose(rounded, exact, rtol=1e-3, atol=1e-3)


def check_equal_models(method: str, folder: Path, shapes: checkpoints.Shapes) -> None:
    """K equal models give that model: where they weigh 1 together, or by default."""
    base, models = inputs(method, shapes=shapes)
    equal = [models[0]] * len(models)
    given = {"scaling": 1.0} if "scaling" in METHODS[method].fields() else {}
    if "trim_rate" in METHODS[method].fields():
        given["trim_rate"] = 0.0
    beside = statistics_of(method, len(models), shapes)
    extra = {} if beside is None else {"statistics": beside}
    mixups = [Mixup(alpha=None)]
    if isinstance(METHODS[method].fields().get("weights"), Weights):
        mixups.append(Mixup(ratios=(1 / len(models),) * len(models)))
    distances = []
    for mixup in mixups:
        own = Recipe(method=required(method), mixup=mixup, **given)
        merged = m3jax.merge_params(base, equal, own, SEED, **extra)
        merged = merged.get("", merged)
        distances.append(
            max(
                np.abs(np.asarray(merged[name]) - tensor).max(initial=0)
                for name, tensor in models[0].items()
            )
        )
    assert min(distances) < 2e-6


def check_one_model(method: str, folder: Path, shapes: checkpoints.Shapes) -> None:
    """One model is merged like any number, or refused in one line."""
    base, models = inputs(method, shapes=shapes)
    mixup = Mixup(alpha=None)
    beside = statistics_of(method, 1, shapes)
    extra = {} if beside is None else {"statistics": beside}
    own = Recipe(method=required(method, 1), mixup=mixup)
    if METHODS[method].num_models not in (None, 1):
        with pytest.raises(m3jax.RecipeError, match="models for method"):
            m3jax.merge_params(base, models[:1], own, SEED)
        return
    merged = m3jax.merge_params(base, models[:1], own, SEED, **extra)
    for leaf in jax.tree.leaves(merged):
        assert np.all(np.isfinite(np.asarray(leaf)))


def check_resume(method: str, folder: Path) -> None:
    """Interrupted after a few tensors and resumed: the same bytes."""
    files = Files(folder, method)
    own = recipe(method)
    expected = checkpoints.digest(files.merge("whole", own))
    kept, keep = 0, Recorder.keep

    def interrupted(self: Any, done: Any) -> None:
        nonlocal kept
        keep(self, done)
        kept += len(done)
        if kept >= 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "keep", interrupted)
        with pytest.raises(KeyboardInterrupt):
            files.merge("again", own, threads=1, chunk_size=1024)
    assert kept < len(SHAPES)
    again = files.merge("again", own, resume=True)
    assert checkpoints.digest(again) == expected


def check_replay(method: str, folder: Path, run: Run) -> None:
    """m3jax.json makes the same bytes again, and `verify` agrees."""
    files = Files(folder, method)
    output = files.merge("first", recipe(method))
    record = json.loads((output / "m3jax.json").read_text())
    assert record["recipe"]["method"] == method
    assert set(record["recipe"][method]) == set(METHODS[method].fields())
    for name in METHODS[method].records:
        assert name in record["measured"]
    again = run(
        "merge", f"--config={output / 'm3jax.json'}", f"--output={folder / 'again'}"
    )
    assert again.code == 0, again.err
    assert checkpoints.digest(folder / "again") == checkpoints.digest(output)
    assert run("verify", output).code == 0


def check_flags(method: str, folder: Path, run: Run) -> None:
    """Every parameter is a flag, is checked, and changes the recipe as in Python."""
    files = Files(folder, method)
    common = [
        f"--base={files.base}",
        "--models=" + ",".join(map(str, files.models)),
        f"--config.method={method}",
        "--config.mixup.alpha=None",
    ]
    if files.statistics:
        common.append("--statistics=" + ",".join(map(str, files.statistics)))
    values = dict(parameters(method))
    given = [f"--config.{method}.{name}={value}" for name, value in values.items()]
    output = folder / "flags"
    ran = run("merge", *common, *given, f"--output={output}")
    assert ran.code == 0, ran.err
    record = json.loads((output / "m3jax.json").read_text())["recipe"][method]
    for name, value in values.items():
        assert record[name] == (list(value) if isinstance(value, tuple) else value)
    for name in values:
        bad = f"--config.{method}.{name}='nonsense'"
        ran = run("merge", *common, bad, f"--output={folder / 'bad'}")
        assert ran.code == 2
        assert name in ran.error
    ran = run("merge", *common, f"--config.{method}.nonsense=1", f"--output={folder}/n")
    assert ran.code == 2
    assert f"{method}.nonsense" in ran.error


def parameters(method: str) -> Iterator[tuple[str, Any]]:
    """Another value than the default for each parameter."""
    count = METHODS[method].num_models or 2
    for name, field in METHODS[method].fields().items():
        if isinstance(field, Choice):
            yield name, next(own for own in field.options if own != field.default)
        elif isinstance(field, Weights):
            yield name, (0.25, 0.75)[:count]
        elif isinstance(field, Number):
            low, high = field.search or (
                max(field.low, 0.0),
                min(field.high, max(field.low, 0.0) + 1),
            )
            value: Any = low + 0.4 * (high - low)
            if field.integer:
                value = int(max(low, 1))
            yield name, (value,) * count if field.per_model else value


def check_docs_row(method: str) -> None:
    """docs/METHODS.md has it, as `m3jax methods --markdown` prints it."""
    from m3jax.commands.methods import markdown, source

    rows = [line for line in markdown().splitlines() if f"`{method}" in line]
    assert rows
    assert len(source(METHODS[method])) > 10


SHAPED: tuple[Check, ...] = (
    check_executors,
    check_float64,
    check_equal_models,
    check_one_model,
)
COMMANDS: tuple[Check, ...] = (check_replay, check_flags)
