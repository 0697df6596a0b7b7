"""`--executor=sharded` writes the very folder that the streamed merge writes."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import jax
import numpy as np
import pytest
from command_line import Run

import m3jax
from m3jax.engine import sharded
from m3jax.engine.sharding_rules import by_axes, make_mesh

SEED = 5
# Rows, columns, grids, and more devices than some axes have elements.
MESHES = (
    {"rows": 8},
    {"columns": 8},
    {"rows": 2, "columns": 4},
    {"columns": 2, "rows": 4},
)
DARE = {
    "off": m3jax.Dare(),
    "random": m3jax.Dare(drop_rate=(0.3, 0.6)),
    "random_weights": m3jax.Dare(drop_rate=0.3, target="weights"),
    "magnitude": m3jax.Dare(drop_rate=0.4, strategy="magnitude"),
    "magnitude_weights": m3jax.Dare(
        drop_rate=0.4, strategy="magnitude", target="weights"
    ),
}
METHODS = ("average", "task_arithmetic", "ties")
SHAPES = {
    "model.embed_tokens.weight": (131, 29),
    "model.layers.0.mlp.experts.weight": (3, 5, 8),
    "model.layers.1.scale": (),
    "model.layers.1.nothing.weight": (0, 4),
    "model.layers.3.mlp.up_proj.weight": (43, 64),
    "model.layers.10.norm.weight": (1032,),
    "lm_head.weight": (131, 29),
}
# Each method and each DARE at least once; the slow test takes all pairs.
PAIRS = [
    ("average", "off"),
    ("task_arithmetic", "magnitude"),
    ("ties", "random"),
    ("ties", "magnitude_weights"),
    ("average", "random_weights"),
]


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trio")
    base = checkpoints.random_model(0, SHAPES, checkpoints.BFLOAT16)
    for i, name in enumerate(("base", "a", "b")):
        tensors = (
            base
            if i == 0
            else checkpoints.random_model(i, SHAPES, checkpoints.BFLOAT16, base)
        )
        # Copied, of a dtype of its own, wide, and different among the models.
        tensors = {**tensors, "ids": np.arange(9), "scale": np.full((8, 3), i + 0.1)}
        tensors["half"] = (
            np.linspace(0, 1, 80)
            .astype(np.float32 if i == 1 else np.float16)
            .reshape(8, 10)
        )
        checkpoints.write(folder / name, tensors, {"vocab_size": 131})
    return folder


def merge(
    trio: Path, output: Path, recipe: m3jax.Recipe, **execution: object
) -> dict[str, str]:
    m3jax.merge(
        trio / "base",
        [trio / "a", trio / "b"],
        output,
        recipe,
        seed=SEED,
        execution=m3jax.Execution(fsync=False, **execution),
    )
    return checkpoints.digest(output)


@pytest.mark.parametrize(
    ("method", "dare"),
    [
        pytest.param(*pair, marks=pytest.mark.slow if i in (1, 2, 3) else ())
        for i, pair in enumerate(PAIRS)
    ],
)
def test_same_folder(method: str, dare: str, trio: Path, tmp_path: Path):
    """Tensors, checksums of inputs and outputs, record and card: all bytes."""
    number = PAIRS.index((method, dare))  # and with it, other choices change
    recipe = m3jax.Recipe(
        method=method,
        dare=DARE[dare],
        scaling=1.3,
        mixup=m3jax.Mixup(
            alpha=0.4, granularity=("model", "layer", "tensor")[number % 3]
        ),
        exclude=("lm_head.*",) if number % 2 else (),
        dtype=("input", "float32", "float64")[number % 4 % 3],
        max_shard_size="5GB" if number % 2 else "9000",
    )
    one = merge(trio, tmp_path / "one", recipe, devices=jax.devices()[:1])
    assert merge(trio, tmp_path / "eight", recipe, devices=jax.devices()) == one
    mesh = MESHES[number % len(MESHES)]
    assert (
        merge(trio, tmp_path / "sharded", recipe, executor="sharded", mesh=mesh) == one
    )


@pytest.mark.slow
@pytest.mark.parametrize("dare", DARE)
@pytest.mark.parametrize("method", METHODS)
def test_same_folder_on_every_mesh(method: str, dare: str, trio: Path, tmp_path: Path):
    recipe = m3jax.Recipe(method=method, dare=DARE[dare], mixup=m3jax.Mixup(alpha=0.4))
    one = merge(trio, tmp_path / "one", recipe, devices=jax.devices()[:1])
    for i, mesh in enumerate(MESHES):
        found = merge(trio, tmp_path / str(i), recipe, executor="sharded", mesh=mesh)
        assert found == one, mesh


def test_orbax_output(trio: Path, tmp_path: Path):
    recipe = m3jax.Recipe()
    folders = []
    for executor in ("streamed", "sharded"):
        out = tmp_path / executor
        execution = m3jax.Execution(executor=executor, output_format="orbax")
        m3jax.merge(
            trio / "base", [trio / "a", trio / "b"], out, recipe, execution=execution
        )
        files = [path for path in sorted(out.rglob("*")) if path.is_file()]
        folders.append({str(p.relative_to(out)): p.read_bytes() for p in files})
    assert folders[0] == folders[1]


@pytest.mark.parametrize("vocabulary", ["mean", "truncate"])
def test_vocabulary(vocabulary: str, tmp_path: Path):
    for name, rows in (("base", 39), ("a", 41), ("b", 40)):
        shapes = {"model.embed_tokens.weight": (rows, 16), "model.norm.weight": (16,)}
        tensors = checkpoints.random_model(rows, shapes)
        checkpoints.write(tmp_path / name, tensors, {"vocab_size": rows})
    recipe = m3jax.Recipe(method="task_arithmetic", vocabulary=vocabulary)
    one = merge(tmp_path, tmp_path / "one", recipe)
    assert merge(tmp_path, tmp_path / "sharded", recipe, executor="sharded") == one


def test_command(trio: Path, tmp_path: Path, run: Run):
    inputs = f"--base={trio / 'base'}", f"--models={trio / 'a'},{trio / 'b'}"
    how = "--executor=sharded", "--mesh=rows=2,columns=4"
    ran = run("merge", *inputs, *how, "--dry_run")
    assert ran.code == 0, ran.err
    assert "on each of 8 device(s) (rows=2, columns=4)" in ran.out
    ran = run("merge", *inputs, *how, f"--output={tmp_path / 'out'}")
    assert ran.code == 0, ran.err
    assert run("verify", tmp_path / "out").code == 0
    for flags, message in [
        (["--mesh=rows=3"], "mesh=rows=3 has 3 devices, there are 8"),
        (["--mesh=data=8"], "mesh=data=8 needs sizes of rows and columns"),
        (["--mesh=rows"], "needs AXIS=SIZE"),
        (["--mesh=rows=2,rows=4"], "names an axis twice"),
        (["--chunk_size=4096"], "chunk_size is of the streamed executor"),
        (["--executor=streamed", "--mesh=rows=8"], "mesh is of the sharded executor"),
    ]:
        ran = run(
            "merge", *inputs, "--executor=sharded", *flags, f"--output={tmp_path / 'o'}"
        )
        assert ran.code == 2 and message in ran.err
        assert not (tmp_path / "o").exists()


def test_nonfinite(trio: Path, tmp_path: Path, run: Run):
    """The same line as the streamed merge's, and the same bytes where it is allowed."""
    tensors = checkpoints.read(trio / "a")
    tensors["model.layers.3.mlp.up_proj.weight"] = tensors[
        "model.layers.3.mlp.up_proj.weight"
    ].copy()
    tensors["model.layers.3.mlp.up_proj.weight"][7, 50] = np.inf
    checkpoints.write(tmp_path / "bad", tensors, {"vocab_size": 131})
    inputs = f"--base={trio / 'base'}", f"--models={tmp_path / 'bad'},{trio / 'b'}"
    errors = []
    for i, flags in enumerate(
        ([], ["--executor=sharded"], ["--executor=sharded", "--mesh=columns=8"])
    ):
        ran = run("merge", *inputs, f"--output={tmp_path / 'out'}", *flags)
        assert ran.code == 3
        errors.append(ran.error.partition("; what is done")[0])
        ran = run(
            "merge",
            *inputs,
            f"--output={tmp_path / str(i)}",
            *flags,
            "--allow_nonfinite",
        )
        assert ran.code == 0, ran.err
    assert errors[0] == errors[1] == errors[2]
    assert "up_proj.weight' holds inf at [7, 50]" in errors[0]
    folders = [checkpoints.digest(tmp_path / str(i)) for i in range(3)]
    assert folders[0] == folders[1] == folders[2]


def test_out_of_memory(trio: Path, tmp_path: Path, run: Run, monkeypatch):
    def read_tensor(source: object, sharding: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(sharded, "read_tensor", read_tensor)
    inputs = f"--models={trio / 'a'},{trio / 'b'}", f"--output={tmp_path / 'out'}"
    ran = run("merge", *inputs, "--executor=sharded")
    assert ran.code == 4
    assert ran.error.endswith("--executor=streamed needs no more than a few buffers")
    assert list(tmp_path.iterdir()) == []


def test_resumed_by_the_other_executor(trio: Path, tmp_path: Path, monkeypatch):
    """What one executor has written, the other takes over."""
    from m3jax.engine import recorder

    whole = merge(trio, tmp_path / "whole", m3jax.Recipe(method="ties"))
    for first, second in (("sharded", "streamed"), ("streamed", "sharded")):
        keep, left = recorder.Recorder.keep, [4]

        def failing(self, done, keep=keep, left=left):
            if left[0] <= 0:
                raise OSError(5, "the disk is gone")
            left[0] -= len(done)
            keep(self, done)

        with monkeypatch.context() as patched:
            patched.setattr(recorder.Recorder, "keep", failing)
            with pytest.raises(OSError, match="gone"):
                small = {"chunk_size": 1024} if first == "streamed" else {}
                ties = m3jax.Recipe(method="ties")
                merge(trio, tmp_path / first, ties, executor=first, **small)
        result = m3jax.merge(
            trio / "base",
            [trio / "a", trio / "b"],
            tmp_path / first,
            m3jax.Recipe(method="ties"),
            seed=SEED,
            execution=m3jax.Execution(executor=second, resume=True),
        )
        assert result.resumed >= 3
        assert checkpoints.digest(tmp_path / first) == whole


def test_meshes():
    devices = jax.devices()
    assert make_mesh(None, devices).shape == {"rows": 8}
    grid = make_mesh({"rows": 2, "columns": 4}, devices)
    for shape, spec in [
        ((6, 8), ("rows", "columns")),
        ((8,), (("rows", "columns"),)),
        ((6,), ("rows",)),
        ((7, 8), (None, ("rows", "columns"))),
        ((7, 12), (None, "rows")),
        ((8, 7), (("rows", "columns"), None)),
        ((3, 4, 5), (None, ("rows",), None)),
        ((), ()),
        ((0, 8), (None, ("rows", "columns"))),
        ((7, 5), (None, None)),
    ]:
        found = by_axes(grid, shape)
        assert found.is_equivalent_to(
            jax.NamedSharding(grid, jax.P(*spec)), len(shape)
        ), (shape, found.spec)
