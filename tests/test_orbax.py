"""Orbax checkpoints: read as Orbax restores them, written as Orbax reads them."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from command_line import Run
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import m3jax
from m3jax.checkpoints.folder import open_checkpoint
from m3jax.checkpoints.formats import boxes
from m3jax.checkpoints.formats.dtypes import DTYPES
from m3jax.checkpoints.formats.tree import flatten
from m3jax.checkpoints.output.orbax_output import Chunks

GRID = Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))
SEED = 11
# Orbax saves no tensor without elements.
SHAPES = {n: s for n, s in checkpoints.ODD_SHAPES.items() if 0 not in s}
RECIPE = m3jax.Recipe(method="ties", dare=m3jax.Dare(drop_rate=0.3))


def save(path: Path, tree: Any, *, ocdbt: bool = True, zarr3: bool = False) -> Path:
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(path.resolve(), args=ocp.args.PyTreeSave(tree))
    return path


def restore(path: Path, *target: Any) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path.resolve(), *target)


def state() -> dict[str, Any]:
    """What a trainer keeps: sharded weights, a list, numbers, an empty container."""
    weights = jnp.arange(16.0 * 24).reshape(16, 24).astype(jnp.bfloat16)
    return {
        "params": {
            "w": jax.device_put(weights, NamedSharding(GRID, P("x", "y"))),
            "layers": [jnp.arange(3.0), jnp.arange(5, dtype=jnp.int32)],
        },
        "count": np.arange(4),
        "flags": np.array([True, False]),
        "step": 5,
        "rate": 0.5,
        "nothing": None,
        "empty": {},
    }


def check_state(tree: dict[str, Any]) -> None:
    expected = state()
    del expected["nothing"], expected["empty"]
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for (name, found), wanted in zip(
        flatten(tree)[0].items(), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(found, np.asarray(wanted), err_msg=name)
        if hasattr(wanted, "dtype"):
            assert found.dtype == wanted.dtype


class TestRead:
    @pytest.mark.parametrize("zarr3", [False, True])
    @pytest.mark.parametrize("ocdbt", [False, True])
    def test_layouts(self, ocdbt: bool, zarr3: bool, tmp_path: Path):
        check_state(m3jax.load(save(tmp_path / "c", state(), ocdbt=ocdbt, zarr3=zarr3)))

    def test_standard_checkpointer(self, tmp_path: Path):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "c", state())
        check_state(m3jax.load(tmp_path / "c"))

    def test_steps_of_a_manager(self, tmp_path: Path, run: Run):
        with ocp.CheckpointManager(tmp_path / "run") as manager:
            for step in (9, 10):
                manager.save(step, args=ocp.args.StandardSave(state()))
        check_state(m3jax.load(tmp_path / "run" / "10"))
        check_state(m3jax.load(tmp_path / "run" / "10" / "default"))
        ran = run("inspect", tmp_path / "run")
        assert ran.code == 3
        assert (
            "2 steps of Orbax's CheckpointManager ('10', '9'); give one of them, as "
            in ran.err
        )
        assert ran.error.endswith(str(tmp_path / "run" / "10"))

    def test_several_items(self, tmp_path: Path, run: Run):
        trees = {name: ocp.args.StandardSave(state()) for name in ("params", "ema")}
        with ocp.CheckpointManager(tmp_path / "run") as manager:
            manager.save(0, args=ocp.args.Composite(**trees))
        check_state(m3jax.load(tmp_path / "run" / "0" / "ema"))
        ran = run("inspect", tmp_path / "run" / "0")
        assert "holds 2 Orbax pytrees ('ema', 'params'); give one of them" in ran.error

    @pytest.mark.parametrize("spec", [P("x", "y"), P("y"), P(None, ("y", "x")), P()])
    def test_shards_are_read_by_themselves(self, spec: P, tmp_path: Path, monkeypatch):
        """Not whole, where a process has but a part."""
        from m3jax.checkpoints.formats.orbax import OrbaxTensor
        from m3jax.engine import load

        save(tmp_path / "c", state())
        read: list[int] = []
        read_box = OrbaxTensor.read_box

        def counted(self: Any, out: np.ndarray, box: boxes.Box) -> None:
            read.append(out.size)
            read_box(self, out, box)

        monkeypatch.setattr(OrbaxTensor, "read_box", counted)
        wanted = state()["params"]["w"]
        with open_checkpoint(str(tmp_path / "c")) as opened:
            source = opened.tensors["params.w"]
            sharding = NamedSharding(GRID, spec)
            index = sharding.devices_indices_map(source.shape)
            holders: dict[boxes.Box, list[Any]] = {}
            for device in GRID.devices.flat[:3]:
                box = boxes.box_of(index[device], source.shape)
                holders.setdefault(box, []).append(device)
            shards = load.read_shards(source, holders, 64)
            for device, shard in shards.items():
                np.testing.assert_array_equal(shard, np.asarray(wanted)[index[device]])
            assert sum(read) == sum(math.prod(boxes.box_shape(box)) for box in holders)
        loaded = m3jax.load(
            tmp_path / "c",
            lambda _, shape: NamedSharding(GRID, spec if len(shape) == 2 else P()),
        )
        assert loaded["params"]["w"].sharding.spec == spec
        np.testing.assert_array_equal(loaded["params"]["w"], wanted)

    @given(data=st.data())
    def test_runs_as_boxes(self, data: st.DataObject):
        shape = tuple(data.draw(st.lists(st.integers(1, 5), max_size=4)))
        size = math.prod(shape)
        start = data.draw(st.integers(0, size - 1))
        count = data.draw(st.integers(1, size - start))
        numbers = np.arange(size).reshape(shape)
        parts = list(boxes.of_run(start, count, shape))
        found = [
            numbers[tuple(slice(*edges) for edges in box)].reshape(-1) for box in parts
        ]
        assert np.concatenate(found).tolist() == list(range(start, start + count))
        assert len(parts) <= max(1, 2 * len(shape))


class TestDamaged:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return save(tmp_path / "c", state(), ocdbt=False)

    def test_a_missing_chunk(self, folder: Path):
        """Is not read as zeros."""
        (folder / "params.w" / "1.2").unlink()
        with pytest.raises(m3jax.CheckpointError, match=r"tensor 'params.w' cannot be"):
            m3jax.load(folder)

    def test_a_missing_array(self, folder: Path):
        shutil.rmtree(folder / "count")
        with pytest.raises(m3jax.CheckpointError, match="tensor 'count' cannot be op"):
            m3jax.load(folder)

    def test_a_link_out(self, folder: Path, tmp_path: Path):
        (tmp_path / "secret").write_bytes(b"private")
        (folder / "count" / "0").unlink()
        (folder / "count" / "0").symlink_to(tmp_path / "secret")
        with pytest.raises(m3jax.CheckpointError, match="a link that leads out"):
            m3jax.load(folder)

    def test_changed_while_open(self, folder: Path):
        with open_checkpoint(str(folder)) as opened:
            (folder / "count" / "0").write_bytes(b"other")
            with pytest.raises(m3jax.CheckpointError, match="was changed"):
                opened.files[0].check_unchanged()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"key_metadata": [{"key": "../count", "key_type": 2}]}, "rename it"),
            ({"key_metadata": "x"}, "not as Orbax writes it"),
            ({"value_metadata": {"value_type": "string"}}, "only arrays can be merged"),
        ],
    )
    def test_metadata(self, change: dict[str, Any], message: str, folder: Path):
        path = folder / "_METADATA"
        metadata = json.loads(path.read_bytes())
        metadata["tree_metadata"]["('count',)"] |= change
        path.write_text(json.dumps(metadata))
        with pytest.raises(m3jax.CheckpointError, match=message):
            m3jax.load(folder)

    @pytest.mark.parametrize("shape", [[2**61 - 1], [2**40, 2**30], [1] * 33])
    def test_a_monstrous_shape(self, shape: list[int], folder: Path):
        path = folder / "count" / ".zarray"
        facts = json.loads(path.read_bytes())
        path.write_text(json.dumps(facts | {"shape": shape, "chunks": shape}))
        with pytest.raises(m3jax.CheckpointError, match="'count'"):
            m3jax.load(folder)

    def test_a_store_that_tensorstore_does_not_know(self, folder: Path):
        fsspec = pytest.importorskip("fsspec")
        fsspec.filesystem("memory").put(str(folder), "/orbax/c", recursive=True)
        with pytest.raises(m3jax.CheckpointError, match="from here, gs:// and s3"):
            m3jax.load("memory://orbax/c")

    def test_unfinished(self, folder: Path):
        partial = folder.rename(folder.parent / "c.orbax-checkpoint-tmp-7")
        with pytest.raises(m3jax.CheckpointError, match="was not finished"):
            m3jax.load(partial)


def sharded_state() -> Any:
    tree = state()
    del tree["nothing"], tree["empty"]
    return tree


class TestSave:
    def test_orbax_restores_it(self, tmp_path: Path):
        tree = sharded_state()
        m3jax.save(jax.tree.map(np.asarray, tree), tmp_path / "0", format="orbax")
        check_state(restore(tmp_path / "0" / "default"))
        everywhere = NamedSharding(GRID, P())
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=everywhere),
            {"w": tree["params"]["w"]},
        )
        target["w"] = target["w"].update(sharding=tree["params"]["w"].sharding)
        single = {"w": tree["params"]["w"]}
        m3jax.save(single, tmp_path / "1", format="orbax")
        found = restore(tmp_path / "1" / "default", target)["w"]
        assert found.sharding == single["w"].sharding
        np.testing.assert_array_equal(found, single["w"])
        with ocp.CheckpointManager(tmp_path) as manager:
            assert sorted(manager.all_steps()) == [0, 1]
            restored = manager.restore(1, args=ocp.args.StandardRestore())
            np.testing.assert_array_equal(restored["w"], single["w"])

    def test_bytes_do_not_depend_on_the_layout(self, tmp_path: Path):
        tree = sharded_state()
        m3jax.save(tree["params"], tmp_path / "a", format="orbax")
        whole = jax.tree.map(np.asarray, tree["params"])
        m3jax.save(whole, tmp_path / "b", format="orbax")
        assert digest(tmp_path / "a") == digest(tmp_path / "b")

    def test_there_and_back(self, tmp_path: Path):
        """safetensors → Orbax (ours, and Orbax's own) → safetensors: the same bytes."""
        tensors = checkpoints.random_model(3, SHAPES, checkpoints.BFLOAT16)
        tensors["ids"] = np.arange(7, dtype=np.int32)
        first = checkpoints.write(tmp_path / "first", tensors)
        m3jax.save(m3jax.load(first), tmp_path / "ours", format="orbax")
        save(tmp_path / "theirs", m3jax.load(first))
        for name in ("ours", "theirs"):
            m3jax.save(m3jax.load(tmp_path / name), tmp_path / f"{name}_back")
            written = (tmp_path / f"{name}_back" / "model.safetensors").read_bytes()
            assert written == (first / "model.safetensors").read_bytes()

    def test_names_that_are_no_folders(self, tmp_path: Path):
        for name in ("a/b", "..", "x" * 300):
            with pytest.raises(m3jax.CheckpointError, match="needs the name of a fold"):
                m3jax.save({name: np.ones(2)}, tmp_path / "out", format="orbax")
        with pytest.raises(ValueError, match="needs safetensors or orbax"):
            m3jax.save({"a": np.ones(2)}, tmp_path / "out", format="zarr")

    @given(
        shape=st.lists(st.integers(0, 6), max_size=4).map(tuple),
        limit=st.integers(2, 60),
        data=st.data(),
    )
    def test_chunks(self, shape: tuple[int, ...], limit: int, data: st.DataObject):
        """Every byte has one place, and what zarr says of the chunks is true."""
        dtype = DTYPES["I16"]
        chunks = Chunks.of(shape, dtype, limit)
        assert chunks.size <= limit or not chunks.names()
        size = math.prod(shape) * 2
        numbers = np.arange(math.prod(shape), dtype=np.int16).reshape(shape)
        files = {name: np.zeros(chunks.size // 2, np.int16) for name in chunks.names()}
        flat, start = numbers.reshape(-1), 0
        while start < size:
            count = 2 * data.draw(st.integers(1, (size - start) // 2))
            for name, offset, length in chunks.pieces(start, count):
                part = flat[start // 2 : (start + length) // 2]
                files[name][offset // 2 : (offset + length) // 2] = part
                start += length
        for name, content in files.items():
            index = [] if not shape else map(int, name.split("."))
            window = tuple(
                slice(i * n, (i + 1) * n)
                for i, n in zip(index, chunks.chunk_shape, strict=True)
            )
            part = numbers[window]
            held = content.reshape(chunks.chunk_shape)
            held = held[tuple(slice(0, n) for n in part.shape)]
            np.testing.assert_array_equal(held, part)
        assert sum(content.size for content in files.values()) >= numbers.size


def digest(folder: Path) -> dict[str, bytes]:
    """The bytes of all files, by their paths."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, a, b as safetensors, and as Orbax saves them in ob, oa and bb."""
    folder = tmp_path_factory.mktemp("trio")
    base = checkpoints.random_model(0, SHAPES, checkpoints.BFLOAT16)
    config = {"model_type": "llama", "vocab_size": 131}
    for i, name in enumerate(("base", "a", "b")):
        tensors = base
        if i:
            tensors = checkpoints.random_model(i, SHAPES, checkpoints.BFLOAT16, base)
        checkpoints.write(folder / name, tensors, config)
        save(folder / f"{name}_orbax", m3jax.load(folder / name), zarr3=i == 1)
        shutil.copy(folder / name / "config.json", folder / f"{name}_orbax")
    m3jax.merge(
        folder / "base",
        [folder / "a", folder / "b"],
        folder / "out",
        RECIPE,
        seed=SEED,
    )
    return folder


class TestMerge:
    @pytest.mark.parametrize("chunk_size", [None, 1024])
    def test_as_safetensors(
        self, chunk_size: int | None, trio: Path, tmp_path: Path, run: Run
    ):
        """The default output is Orbax, holds the same tensors, and can be verified."""
        names = [trio / f"{name}_orbax" for name in ("base", "a", "b")]
        execution = m3jax.Execution(chunk_size=chunk_size)
        result = m3jax.merge(
            names[0],
            names[1:],
            tmp_path / "out",
            RECIPE,
            seed=SEED,
            execution=execution,
        )
        expected = checkpoints.read(trio / "out")
        for found in (
            restore(tmp_path / "out" / "default"),
            m3jax.load(tmp_path / "out"),
        ):
            for name, tensor in flatten(found)[0].items():
                assert np.asarray(tensor).tobytes() == expected[name].tobytes(), name
        record = json.loads((trio / "out" / "m3jax.json").read_bytes())
        ours = json.loads((tmp_path / "out" / "m3jax.json").read_bytes())
        assert ours["base"]["checksum"] == record["base"]["checksum"]
        assert ours["ratios"] == record["ratios"]
        assert {
            n: t["checksum"] for n, t in ours["tensors"].items()
        } == result.checksums
        assert result.checksums == {
            n: t["checksum"] for n, t in record["tensors"].items()
        }
        assert (tmp_path / "out" / "config.json").read_bytes() == (
            trio / "a" / "config.json"
        ).read_bytes()
        ran = run("verify", tmp_path / "out")
        assert ran.code == 0, ran.out
        ran = run("diff", trio / "out", tmp_path / "out", "--exit_code")
        assert ran.code == 0, ran.out
        ran = run("inspect", tmp_path / "out")
        assert "folder with an Orbax pytree" in ran.out

    def test_formats_of_inputs_and_output(self, trio: Path, tmp_path: Path, run: Run):
        for index, (base, a, kind) in enumerate(
            [("base_orbax", "a", "safetensors"), ("base", "a_orbax", None)]
        ):
            out = tmp_path / str(index)
            flag = [f"--output_format={kind}"] if kind else []
            models = f"--models={trio / a},{trio / 'b'}"
            ran = run(
                "merge",
                f"--base={trio / base}",
                models,
                f"--output={out}",
                "--config=ties_m3_dare",
                "--config.dare.drop_rate=0.3",
                "--config.mixup.alpha=0.5",
                f"--seed={SEED}",
                *flag,
            )
            assert ran.code == 0, ran.err
            assert (out / "model.safetensors").read_bytes() == (
                trio / "out" / "model.safetensors"
            ).read_bytes()

    def test_repeated_and_overwritten(self, trio: Path, tmp_path: Path, run: Run):
        out, models = tmp_path / "out", f"--models={trio / 'a'},{trio / 'b_orbax'}"
        first = run(
            "merge",
            f"--base={trio / 'base'}",
            models,
            f"--output={out}",
            "--config.method=ties",
            "--output_format=orbax",
        )
        assert first.code == 0, first.err
        before = digest(out)
        again = run(
            "merge",
            f"--config={out / 'm3jax.json'}",
            f"--output={tmp_path / 'again'}",
            "--output_format=orbax",
        )
        assert again.code == 0, again.err
        assert digest(tmp_path / "again") == before
        ran = run(
            "merge",
            f"--config={out / 'm3jax.json'}",
            f"--output={out}",
            "--overwrite",
            "--output_format=orbax",
        )
        assert ran.code == 0, ran.err
        assert digest(out) == before

    def test_verify_finds_differences(self, trio: Path, tmp_path: Path, run: Run):
        out = tmp_path / "out"
        m3jax.merge(
            None,
            [trio / "a", trio / "b"],
            out,
            execution=m3jax.Execution(output_format="orbax"),
        )
        chunk = out / "default" / "model.norm.weight" / "0"
        chunk.write_bytes(bytes(reversed(chunk.read_bytes())))
        ran = run("verify", out)
        assert ran.code == 1
        assert "default: tensor 'model.norm.weight' has checksum" in ran.out
        shutil.rmtree(out / "default" / "lm_head.weight")
        ran = run("verify", out)
        assert ran.code == 1
        assert "'lm_head.weight' cannot be opened" in ran.out

    def test_other_names(self, trio: Path, tmp_path: Path, run: Run):
        save(tmp_path / "other", {"params": {"kernel": jnp.ones((2, 2))}})
        ran = run(
            "merge",
            f"--models={trio / 'a'},{tmp_path / 'other'}",
            f"--output={tmp_path / 'o'}",
        )
        assert ran.code == 3
        assert "(safetensors)" in ran.error and "no tensor name in common" in ran.error

    def test_trees_merge_as_they_are(self, tmp_path: Path):
        """Lists and numbers keep their places; names are paths joined by dots."""
        trees = []
        for i in (1, 2, 3):
            tree = sharded_state()
            tree["params"] = jax.tree.map(lambda x, i=i: x * i, tree["params"])
            tree["params"]["layers"][1] = jnp.arange(5, dtype=jnp.int32)
            trees.append(tree)
            save(tmp_path / str(i), tree)
        recipe = m3jax.Recipe(mixup=m3jax.Mixup(ratios=(0.25, 0.75)), exclude=("rate",))
        m3jax.merge(
            tmp_path / "1", [tmp_path / "2", tmp_path / "3"], tmp_path / "o", recipe
        )
        merged = restore(tmp_path / "o" / "default")
        assert jax.tree.structure(merged) == jax.tree.structure(trees[0])
        np.testing.assert_array_equal(
            merged["params"]["layers"][0], np.arange(3.0) * 2.75
        )
        assert merged["step"] == 5


def test_nnx_state(tmp_path: Path):
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, seed: int):
            rngs = nnx.Rngs(seed)
            self.layers = nnx.List(
                [nnx.Linear(4, 3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)]
            )

    models = [nnx.state(Model(seed), nnx.Param) for seed in (0, 1, 2)]
    for i, model in enumerate(models):
        save(tmp_path / str(i), model)
    recipe = m3jax.Recipe(method="task_arithmetic", dare=m3jax.Dare(drop_rate=0.5))
    m3jax.merge(
        tmp_path / "0", [tmp_path / "1", tmp_path / "2"], tmp_path / "o", recipe, seed=3
    )
    restored = restore(tmp_path / "o" / "default", models[0])
    loaded = [m3jax.load(tmp_path / str(i)) for i in range(3)]
    expected = m3jax.merge_params(loaded[0], loaded[1:], recipe, 3)
    for found, wanted in zip(
        jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)


def test_nothing_is_imported_without_need(tmp_path: Path):
    import subprocess
    import sys

    checkpoints.write(tmp_path / "a", {"x": np.ones(3, np.float32)})
    code = (
        "import sys, m3jax\n"
        f"m3jax.merge(None, [{str(tmp_path / 'a')!r}] * 2, {str(tmp_path / 'o')!r})\n"
        "print(sorted({'orbax', 'flax', 'tensorstore', 'fsspec'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
