"""Opens sound checkpoints in every form; test_attacks.py has the others."""

import json
import os
import shutil

import numpy as np
import pytest
from checkpoints import BFLOAT16, encode, random_model, write

from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.folder import open_checkpoint
from m3jax.checkpoints.formats.dtypes import DTYPES, of_numpy
from m3jax.checkpoints.source import read_whole

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = {"architectures": ["LlamaForCausalLM"], "vocab_size": 131}


def read_all(name, **options):
    """All tensors of a checkpoint, read to the end."""
    with open_checkpoint(str(name), **options) as checkpoint:
        assert list(checkpoint.tensors) == sorted(checkpoint.tensors)
        return {
            tensor: read_whole(source) for tensor, source in checkpoint.tensors.items()
        }


def assert_same(read, expected):
    assert read.keys() == expected.keys()
    for name, array in expected.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)


@pytest.fixture
def model():
    return random_model(0, dtype=BFLOAT16)


def test_one_file_in_a_folder(model, tmp_path):
    folder = write(tmp_path / "m", model, config=CONFIG)
    assert_same(read_all(folder), model)
    assert_same(read_all(f"{folder}/"), model)
    with open_checkpoint(str(folder)) as checkpoint:
        assert checkpoint.name == str(folder)
        assert checkpoint.location == checkpoint.folder == folder
        assert checkpoint.revision is None
        assert checkpoint.config == CONFIG
        assert [file.path.name for file in checkpoint.files] == [WEIGHTS]
        assert checkpoint.files[0].size == (folder / WEIGHTS).stat().st_size


def test_shards(model, tmp_path):
    names = sorted(model)
    folder = write(tmp_path / "m", model, shards=[names[:2], names[2:3], names[3:]])
    assert_same(read_all(folder), model)
    with open_checkpoint(str(folder)) as checkpoint:
        assert len(checkpoint.files) == 3
        assert checkpoint.config is None


def test_a_single_file(model, tmp_path):
    folder = write(tmp_path / "m", model, config=CONFIG)
    path = (folder / WEIGHTS).rename(folder / "weights.safetensors")
    assert_same(read_all(path), model)
    with open_checkpoint(str(path)) as checkpoint:
        assert checkpoint.location == path
        assert checkpoint.folder == folder
        assert checkpoint.config == CONFIG
    # In a folder it may have any name, as long as it is the only one.
    assert_same(read_all(folder), model)
    (folder / "._weights.safetensors").write_bytes(b"what macOS leaves behind")
    assert_same(read_all(folder), model)


def test_a_path_from_the_home_folder_or_the_current_one(model, tmp_path, monkeypatch):
    write(tmp_path / "m", model)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert_same(read_all("~/m"), model)
    monkeypatch.chdir(tmp_path / "m")
    assert_same(read_all("."), model)
    assert_same(read_all(WEIGHTS), model)


def test_a_whole_file_has_precedence_over_an_index(model, tmp_path):
    names = sorted(model)
    folder = write(tmp_path / "m", model, shards=[names[:2], names[2:]])
    (folder / WEIGHTS).write_bytes(encode({"other": np.zeros(2, np.float32)}))
    assert list(read_all(folder)) == ["other"]


def test_files_of_other_formats_beside_are_no_matter(model, tmp_path):
    folder = write(tmp_path / "m", model)
    for name in ("pytorch_model.bin", "consolidated.safetensors", "x.gguf", "a.txt"):
        (folder / name).write_bytes(b"x")
    assert_same(read_all(folder), model)


def test_links_within_the_folder_and_to_it(model, tmp_path):
    folder = write(tmp_path / "m", model)
    (folder / "data").mkdir()
    (folder / WEIGHTS).rename(folder / "data" / "x")
    (folder / WEIGHTS).symlink_to("data/x")
    (tmp_path / "link").symlink_to(folder)
    assert_same(read_all(folder), model)
    assert_same(read_all(tmp_path / "link"), model)
    # A file that the user names itself may be a link to anywhere.
    (tmp_path / "x.safetensors").symlink_to(folder / "data" / "x")
    assert_same(read_all(tmp_path / "x.safetensors"), model)


@pytest.mark.parametrize("code", [c for c, d in DTYPES.items() if d.kind != "float8"])
def test_every_dtype(code, tmp_path):
    array = np.arange(6).reshape(2, 3).astype(DTYPES[code].numpy)
    (tmp_path / WEIGHTS).write_bytes(encode({"x": array}))
    with open_checkpoint(str(tmp_path)) as checkpoint:
        source = checkpoint.tensors["x"]
        assert checkpoint.stored["x"].dtype.code == code
        assert source.output_dtype.code == code
        assert source.dtype.code == code
        np.testing.assert_array_equal(read_whole(source), array)
    assert_same(read_all(tmp_path, mergeable=False), {"x": array})


def test_no_tensors(tmp_path):
    (tmp_path / WEIGHTS).write_bytes(encode({}))
    assert read_all(tmp_path) == {}


def test_names_that_need_quotes(tmp_path):
    model = {name: np.zeros(1, np.float32) for name in ('q"\\/', "é😀", "", " ", "a b")}
    (tmp_path / WEIGHTS).write_bytes(encode(model))
    assert_same(read_all(tmp_path), model)


def test_many_shards_and_tensors(tmp_path):
    model = {f"t{i:04}": np.full(2, i, np.float32) for i in range(2000)}
    names = sorted(model)
    folder = write(tmp_path / "m", model, shards=[names[i::100] for i in range(100)])
    assert_same(read_all(folder), model)


def test_a_config_with_infinity(model, tmp_path):
    """As transformers writes Mamba 2's time_step_limit."""
    folder = write(
        tmp_path / "m", model, config={"time_step_limit": [0.0, float("inf")]}
    )
    assert "Infinity" in (folder / "config.json").read_text()
    with open_checkpoint(str(folder)) as checkpoint:
        assert checkpoint.config == {"time_step_limit": [0.0, float("inf")]}


def test_a_checkpoint_closes_its_files_and_only_once(model, tmp_path):
    folder = write(tmp_path / "m", model)
    checkpoint = open_checkpoint(str(folder))
    source = checkpoint.tensors["model.norm.weight"]
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        read_whole(source)
    assert caught.value.filename == str(folder / WEIGHTS)


def test_the_file_whose_header_was_read_is_the_one_that_is_read(model, tmp_path):
    """Even if another takes its name in between."""
    folder = write(tmp_path / "m", model)
    with open_checkpoint(str(folder)) as checkpoint:
        (tmp_path / "new").write_bytes(encode({"other": np.zeros(2, np.float32)}))
        shutil.move(tmp_path / "new", folder / WEIGHTS)
        for name, source in checkpoint.tensors.items():
            np.testing.assert_array_equal(read_whole(source), model[name])


def test_a_file_that_may_not_be_read(model, tmp_path, monkeypatch):
    folder = write(tmp_path / "m", model)
    real = os.open

    def denied(path, *arguments):  # root may read everything, so chmod does not do
        if str(path).endswith(WEIGHTS):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments)

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(PermissionError) as caught:
        open_checkpoint(str(folder))
    assert caught.value.filename == str(folder / WEIGHTS)


def test_an_index_that_writers_make(model, tmp_path):
    """With metadata of all kinds, in another order and with space everywhere."""
    names = sorted(model)
    folder = write(tmp_path / "m", model, shards=[names[:2], names[2:]])
    index = json.loads((folder / INDEX).read_text())
    index = {
        "weight_map": dict(reversed(index["weight_map"].items())),
        "metadata": {"total_size": 10**18, "total_parameters": 1.5, "x": [None, True]},
        "format": "pt",
    }
    (folder / INDEX).write_text("\n\t " + json.dumps(index, indent=8) + "\r\n")
    assert_same(read_all(folder), model)


def test_a_shard_that_is_cut_off_is_named(model, tmp_path):
    names = sorted(model)
    folder = write(tmp_path / "m", model, shards=[names[:2], names[2:]])
    path = folder / "model-00002-of-00002.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(
        CheckpointError, match=rf"^{path}: .* it was cut off; fetch the"
    ):
        open_checkpoint(str(folder))


def test_dtypes_are_found_by_name():
    assert of_numpy("bfloat16").code == "BF16"
    assert of_numpy("float32").code == "F32"
