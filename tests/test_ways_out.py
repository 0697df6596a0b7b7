"""The obvious is done, the rest refused; and what an error advises ends in a merge."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoints import encode, random_model, read, write
from command_line import Run

import m3jax
from m3jax import Mixup, Recipe
from m3jax.checkpoints.folder import open_checkpoint

SHAPES = {"model.embed_tokens.weight": (5, 3), "model.norm.weight": (3,)}
PLAIN = "--config.mixup.alpha=None"


@pytest.fixture
def models(tmp_path, monkeypatch):
    base = random_model(0, SHAPES)
    for seed, name in enumerate(("base", "a", "b")):
        write(tmp_path / name, random_model(seed, SHAPES, base=base), {"vocab_size": 5})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mean(folder):
    a, b = read(folder / "a"), read(folder / "b")
    return {name: (a[name] + b[name]) / 2 for name in a}


def check(output, expected):
    made = read(output)
    assert made.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(made[name], values, rtol=1e-6)


class TestCommandLine:
    @pytest.mark.parametrize(
        "given",
        [
            ("--models=a", "--models=b"),
            ("--models=a,b,",),
            ("--models=a, b",),
            ("--models", "a", "--models", "b"),
            ("-models=a", "--models=b"),
            ('--models="a",b',),
        ],
    )
    def test_no_model_is_dropped(self, given, models, run: Run):
        ran = run("merge", "--base=base", *given, "--output=out", PLAIN)
        assert ran.code == 0, ran.err
        check(models / "out", mean(models))

    @pytest.mark.parametrize("given", ["--models=,b", "--models=a,,b", "--models=,"])
    def test_an_empty_name_is_refused(self, given, models, run: Run):
        ran = run("merge", "--base=base", given, "--output=out", PLAIN)
        assert ran.code == 2
        assert "--models has an empty name between its commas" in ran.error

    @pytest.mark.parametrize("flag", ["base", "output", "config"])
    def test_a_second_value_is_refused(self, flag, models, run: Run):
        given = {"base": "base", "output": "out", "config": "average"}
        usual = [f"--{name}={value}" for name, value in given.items()]
        ran = run("merge", *usual, f"--{flag}=other", "--models=a,b")
        assert ran.code == 2
        assert f"--{flag} is given twice, {given[flag]} and other" in ran.error
        assert run("merge", *usual, f"--{flag}={given[flag]}", "--models=a,b").code == 0

    def test_a_home_folder_in_an_output(self, models, run: Run, monkeypatch):
        monkeypatch.setenv("HOME", str(models))
        (models / "here").mkdir()
        monkeypatch.chdir(models / "here")
        arguments = ("--base=~/base", "--models=~/a,~/b", "--output=~/o/out", PLAIN)
        assert run("merge", *arguments).code == 0
        check(models / "o" / "out", mean(models))
        assert not any((models / "here").iterdir())
        assert run("verify", "~/o/out").code == 0

    def test_a_config_that_is_a_dict(self, models, run: Run):
        (models / "c.py").write_text("def get_config(): return {'method': 'ties'}")
        arguments = ("--base=base", "--models=a,b", "--output=out", "--config=c.py")
        assert run("merge", *arguments).code == 0
        record = json.loads((models / "out" / "m3jax.json").read_text())
        assert record["recipe"]["method"] == "ties"
        (models / "c.py").write_text("def get_config(): return 3")
        ran = run("merge", *arguments)
        assert ran.code == 2
        assert "get_config() returns int, needs a ConfigDict or a dict" in ran.error

    def test_a_recipe_with_a_byte_order_mark(self, models, run: Run):
        (models / "r.json").write_bytes('\ufeff{"method": "ties"}'.encode())
        arguments = ("--base=base", "--models=a,b", "--output=out", "--config=r.json")
        assert run("merge", *arguments).code == 0


class TestPython:
    def test_a_single_path_is_one_model(self, models):
        for one in ("a", Path("a")):
            m3jax.merge("base", one, f"out{one!r}", Recipe(mixup=Mixup(alpha=None)))
            check(models / f"out{one!r}", read(models / "a"))

    def test_a_recipe_may_be_its_fields(self, models):
        m3jax.merge("base", ["a", "b"], "out", {"mixup": {"alpha": None}})
        check(models / "out", mean(models))

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ({"models": {"a": "a"}}, "models={'a': 'a'} needs a list of paths"),
            ({"models": [3]}, "models: 3 needs to be a path"),
            ({"models": b"a"}, "models=b'a' needs a list"),
            ({"models": 3}, "models=3 needs a list"),
            ({"recipe": "ties"}, "recipe='ties' needs a Recipe or a dict"),
        ],
    )
    def test_anything_else_is_refused(self, given, expected, models):
        arguments = {"models": ["a", "b"], "recipe": None, **given}
        with pytest.raises(TypeError) as caught:
            m3jax.merge("base", arguments["models"], "out", arguments["recipe"])
        assert str(caught.value).startswith(expected)
        assert not (models / "out").exists()


class TestShards:
    """Each error about files is followed by what it advises."""

    @pytest.fixture
    def sharded(self, models):
        names = sorted(SHAPES)
        tensors = read(models / "a")
        write(models / "s", tensors, {"vocab_size": 5}, [[name] for name in names])
        return models

    def merged(self, run, folder):
        ran = run("merge", "--base=base", "--models=s,b", "--output=out", PLAIN)
        if ran.code == 0:
            check(folder / "out", mean(folder))
        return ran

    def test_a_complete_set_without_its_index(self, sharded, run: Run):
        (sharded / "s" / "model.safetensors.index.json").unlink()
        ran = self.merged(run, sharded)
        assert ran.code == 0
        assert "s: no index; its complete set of 2 shards is read" in ran.err

    def test_a_set_of_which_one_is_missing(self, sharded, run: Run):
        (sharded / "s" / "model.safetensors.index.json").unlink()
        path = sharded / "s" / "model-00002-of-00002.safetensors"
        content = path.read_bytes()
        path.unlink()
        assert self.merged(run, sharded).error.endswith(
            "shard 'model-00002-of-00002.safetensors' is missing, 1 of 2 are there; "
            "download it again"
        )
        path.write_bytes(content)  # as told
        assert self.merged(run, sharded).code == 0

    def test_the_index_is_the_authority(self, sharded, run: Run):
        """Stale copies in other shards are passed over."""
        path = sharded / "s" / "model-00002-of-00002.safetensors"
        stale = {"model.embed_tokens.weight": np.zeros((5, 3), np.float32)}
        stale["model.norm.weight"] = read(sharded / "a")["model.norm.weight"]
        path.write_bytes(encode({**stale, "old.weight": np.zeros(2, np.float32)}))
        ran = self.merged(run, sharded)
        assert ran.code == 0
        assert "2 tensors stand where the index does not say" in ran.err

    def test_a_name_in_the_index_without_a_tensor(self, sharded, run: Run):
        index = sharded / "s" / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"]["lost.weight"] = "model-00001-of-00002.safetensors"
        index.write_text(json.dumps(content))
        message = self.merged(run, sharded).error
        assert "'lost.weight' is said to be in 'model-00001-of-00002" in message
        assert "which does not hold it; fetch the index and the files again" in message
        assert "or mend the index" in message
        del content["weight_map"]["lost.weight"]  # as told
        index.write_text(json.dumps(content))
        assert self.merged(run, sharded).code == 0

    def test_several_files_and_no_index(self, sharded, run: Run):
        folder = sharded / "s"
        (folder / "model.safetensors.index.json").unlink()
        for i, path in enumerate(sorted(folder.glob("*.safetensors"))):
            path.rename(folder / f"{i}.safetensors")
        assert (
            "give one file, as s/0.safetensors, or add the"
            in self.merged(run, sharded).error
        )
        weight_map = {name: f"{i}.safetensors" for i, name in enumerate(sorted(SHAPES))}
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))  # as told
        assert self.merged(run, sharded).code == 0

    def test_an_index_as_a_model(self, sharded, run: Run):
        ran = run(
            "merge",
            "--base=base",
            "--models=s/model.safetensors.index.json,b",
            "--output=out",
            PLAIN,
        )
        assert ran.code == 0
        check(sharded / "out", mean(sharded))

    def test_one_shard_as_a_model(self, sharded, run: Run):
        """Merged by itself it would be half a model."""
        shard = "s/model-00001-of-00002.safetensors"
        ran = run("merge", f"--models={shard},{shard}", "--output=out", PLAIN)
        assert ran.error.endswith("is one of 2 shards of a model; give the folder, s")
        assert run("inspect", shard).code == 0

    def test_an_index_of_another_name(self, sharded, run: Run):
        """As of diffusion transformers."""
        index = sharded / "s" / "model.safetensors.index.json"
        index.rename(index.with_name("diffusion_pytorch_model.safetensors.index.json"))
        assert self.merged(run, sharded).code == 0


class TestFolders:
    """A folder that holds a model's folder, or what is no model yet, says so."""

    def test_a_trainers_folder(self, models, run: Run):
        for name in ("checkpoint-500", "checkpoint-1000"):
            shutil.copytree(models / "a", models / "run" / name)
        (models / "run" / "trainer_state.json").write_text("{}")
        merge = ("merge", "--base=base", "--output=out", PLAIN)
        message = run(*merge, "--models=run,b").error
        assert "'checkpoint-500', 'checkpoint-1000'; give one of them" in message
        assert message.endswith("as run/checkpoint-1000")
        assert run(*merge, "--models=run/checkpoint-1000,b").code == 0

    def test_the_hubs_cache(self, models, run: Run):
        shutil.copytree(models / "a", models / "models--o--n" / "snapshots" / "0123")
        ran = run("inspect", "models--o--n")
        assert ran.error.endswith("as models--o--n/snapshots/0123")

    def test_a_pipeline_of_diffusers(self, models, run: Run):
        shutil.copytree(models / "a", models / "p" / "unet")
        (models / "p" / "model_index.json").write_text("{}")
        message = run("inspect", "p").error
        assert "a pipeline of diffusers, whose parts are in 'unet'" in message

    @pytest.mark.parametrize(
        ("file", "way_out"),
        [
            ("__0_0.distcp", "format_utils dcp_to_torch"),
            ("zero_to_fp32.py", "its zero_to_fp32.py makes a model of it"),
            ("zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_to_fp32.py makes"),
            ("tf_model.h5", "convert them to safetensors"),
        ],
    )
    def test_what_trainers_leave_in_parts(self, models, run: Run, file, way_out):
        (models / "d").mkdir()
        (models / "d" / file).write_bytes(b"x")
        assert way_out in run("inspect", "d").error


def test_flax_models_in_shards(models):
    serialization = pytest.importorskip("flax.serialization")
    tensors = {
        f"model/layer/{name}": np.full(3, i, np.float32)
        for i, name in enumerate(("kernel", "bias"))
    }
    folder = models / "flax"
    folder.mkdir()
    weight_map = {}
    for i, (name, values) in enumerate(tensors.items(), start=1):
        file = f"flax_model-0000{i}-of-00002.msgpack"
        (folder / file).write_bytes(serialization.to_bytes({name: values}))
        weight_map[name] = file
    for index in (True, False):
        path = folder / "flax_model.msgpack.index.json"
        path.write_text(json.dumps({"weight_map": weight_map}))
        if not index:
            path.unlink()
        with open_checkpoint(str(folder)) as checkpoint:
            assert list(checkpoint.tensors) == [
                "model.layer.bias",
                "model.layer.kernel",
            ]
            assert checkpoint.format == "msgpack"
