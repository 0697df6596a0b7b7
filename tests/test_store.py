"""Checkpoints in object stores, played by fsspec's memory:// file system."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from command_line import Run
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations
from interruptions import RECIPES, Merge, write_models

import m3jax
from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.folder import open_checkpoint
from m3jax.checkpoints.output.folder import OutputError, SpaceError
from m3jax.checkpoints.output.store_output import StoreOutput
from m3jax.checkpoints.places import files as checkpoint_files
from m3jax.checkpoints.places import store
from m3jax.checkpoints.places.store import PARTIAL, StoreError, StorePath

URL = "memory://bucket/merged"
AVERAGE = RECIPES["average"]
# Where a merge tells of its inputs by the names that it was given.
TELLING = {"m3jax.json", "README.md"}


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Merge:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def expected(local, tmp_path_factory) -> dict[str, bytes]:
    """The files that a merge on a local disk makes."""
    output = tmp_path_factory.mktemp("reference") / "merged"
    local(output, AVERAGE)
    files = {path.name: path.read_bytes() for path in output.iterdir()}
    assert len([name for name in files if name.endswith(".safetensors")]) > 2
    return files


@pytest.fixture(autouse=True)
def staging(tmp_path, monkeypatch) -> Iterator[Path]:
    """An empty staging folder and an empty store; nothing stays in either."""
    folder = tmp_path / "staging"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    yield folder
    assert not [t for t in threading.enumerate() if t.name.startswith("upload")]


@pytest.fixture
def remote(local, staging) -> Merge:
    """The models, in the store."""
    for folder in (local.base, *local.models):
        for path in folder.iterdir():
            put(f"models/{folder.name}/{path.name}", path.read_bytes())
    models = ["memory://models/a", "memory://models/b"]
    return Merge("memory://models/base", tuple(models))


def put(name: str, content: bytes) -> None:
    fsspec.filesystem("memory").pipe_file(f"/{name}", content)


def files(folder: str = "bucket/merged") -> dict[str, bytes]:
    prefix = f"/{folder}/"
    return {
        name.removeprefix(prefix): file.getvalue()
        for name, file in MemoryFileSystem.store.items()
        if name.startswith(prefix)
    }


def check_complete(expected: dict[str, bytes], staging: Path) -> None:
    """The store holds just the output; the staging folder holds nothing."""
    found = files()
    assert found.keys() == expected.keys()
    for name in found.keys() - TELLING:
        assert found[name] == expected[name], name
    assert m3jax.verify(URL) == []
    assert not [path for path in staging.rglob("*") if path.is_file()]


def fail_at(monkeypatch, method: str, *calls: int, error: type = ConnectionError):
    """Makes some calls of a method of the store fail; returns what it was called on."""
    work = getattr(MemoryFileSystem, method)
    called: list[str] = []
    lock = threading.Lock()

    def failing(self, first, *rest, **options):
        with lock:
            called.append(str(rest[0] if method == "put_file" else first))
            fails = len(called) - 1 in calls
        if fails:
            raise error("the line\nis cut")
        return work(self, first, *rest, **options)

    monkeypatch.setattr(MemoryFileSystem, method, failing)
    return called


def test_the_same_bytes_as_on_a_disk(remote, expected, staging):
    result = remote(URL + "/", AVERAGE)
    assert str(result.output) == URL
    check_complete(expected, staging)


def test_from_the_store_to_a_disk_and_back(remote, local, expected, staging, tmp_path):
    remote(tmp_path / "merged", AVERAGE)
    for name in expected.keys() - TELLING:
        assert (tmp_path / "merged" / name).read_bytes() == expected[name]
    local(URL, AVERAGE)
    check_complete(expected, staging)


def test_commands(remote, run: Run, tmp_path, local):
    remote(URL, AVERAGE)
    assert "4 shards of safetensors" in run("inspect", URL).out
    assert "every tensor" in run("verify", URL).out
    assert "A and B are equal" in run("diff", "memory://models/a", local.models[0]).out
    put("bucket/merged/model-00001-of-00004.safetensors", b"")
    assert "0 bytes is too short" in run("verify", URL).out
    single = "memory://models/a/model.safetensors"
    assert "a single safetensors file" in run("inspect", single).out
    lost = run("inspect", "memory://models/lost")
    assert lost.error.endswith("the store has no such folder or file")
    assert "Protocol not known" in run("inspect", "nosuch://models/a").error


def test_paths_of_other_libraries_are_urls(remote):
    class Path:  # as etils.epath.Path
        def __fspath__(self) -> str:
            return "memory://models/a"

    loaded = m3jax.load(Path())
    assert loaded["model"]["norm"]["weight"].shape == (29,)


def test_a_file_url_is_a_local_path(local):
    with open_checkpoint(f"file://{local.base}") as checkpoint:
        assert checkpoint.location == local.base


def test_save_and_load(staging):
    params = {"a": {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}, "b": np.ones(3)}
    saved = m3jax.save(params, "memory://bucket/saved", max_shard_size=20)
    assert PARTIAL not in files("bucket/saved")
    assert "model.safetensors.index.json" in files("bucket/saved")
    loaded = m3jax.load(saved)
    np.testing.assert_array_equal(loaded["a"]["w"], params["a"]["w"])
    with pytest.raises(OutputError, match="exists already"):
        m3jax.save(params, "memory://bucket/saved")
    assert not [path for path in staging.rglob("*") if path.is_file()]


def test_long_reads_are_cut_into_requests(remote, monkeypatch, local):
    monkeypatch.setattr(checkpoint_files, "_REQUEST", 1000)
    reads = fail_at(monkeypatch, "cat_file")
    with open_checkpoint("memory://models/a") as checkpoint:
        file = checkpoint.files[0]
        content = (local.models[0] / "model.safetensors").read_bytes()
        reads.clear()
        for start, count in ((0, 1), (7, 999), (0, 1000), (1, 1001), (500, 4000)):
            assert file.read(start, count) == content[start : start + count]
    assert len(reads) == 1 + 1 + 1 + 2 + 4


# Of the marker, 4 files of tensors, 3 others, the index and the record.
@pytest.mark.parametrize("call", range(10))
def test_an_upload_that_fails(call, remote, expected, staging, monkeypatch):
    with monkeypatch.context() as patch:
        called = fail_at(patch, "put_file", call)
        with pytest.raises(StoreError, match=r"cannot be written .* 'the line'\)") as e:
            remote(URL, AVERAGE)
        before = set(called)
    assert "--resume" in "".join(e.value.__notes__)
    assert "m3jax.json" not in files()
    if files():
        with pytest.raises(CheckpointError, match="unfinished output of m3jax"):
            m3jax.verify(URL)
        with pytest.raises(OutputError, match="--resume goes on"):
            remote(URL, AVERAGE)
    sent = {name for name in files() if name.endswith(".safetensors")}
    assert {name for name in before if name.endswith(".safetensors")} >= {
        f"/bucket/merged/{name}" for name in sent
    }
    called = fail_at(monkeypatch, "put_file")
    remote(URL, AVERAGE, resume=True)
    assert not {f"/bucket/merged/{name}" for name in sent} & set(called)
    check_complete(expected, staging)


def test_the_number_of_uploads(remote, expected, monkeypatch):
    called = fail_at(monkeypatch, "put_file")
    remote(URL, AVERAGE)
    assert len(called) == len(set(called)) == len(expected) + 1 == 10
    assert called[0].endswith(PARTIAL)
    assert called[-2].endswith("model.safetensors.index.json")
    assert called[-1].endswith("m3jax.json")


def test_what_was_sent_and_changed_is_written_again(
    remote, expected, staging, monkeypatch
):
    with monkeypatch.context() as patch:
        fail_at(patch, "put_file", 8)
        with pytest.raises(StoreError):
            remote(URL, AVERAGE)
    name = min(name for name in files() if name.endswith(".safetensors"))
    content = files()[name]
    put(f"bucket/merged/{name}", content[:-1] + bytes([content[-1] ^ 1]))
    remote(URL, AVERAGE, resume=True)
    check_complete(expected, staging)


def test_an_interrupted_merge_of_another_recipe(remote, expected, staging, monkeypatch):
    with monkeypatch.context() as patch:
        fail_at(patch, "put_file", 8)
        with pytest.raises(StoreError):
            remote(URL, m3jax.Recipe(max_shard_size="6KB"))
    other = files().keys()
    with pytest.raises(CheckpointError, match="another recipe; --overwrite in place"):
        remote(URL, AVERAGE, resume=True)
    remote(URL, AVERAGE, resume=True, overwrite=True)
    assert other - expected.keys()
    check_complete(expected, staging)


def test_an_interrupted_merge_is_overwritten(remote, expected, staging, monkeypatch):
    with monkeypatch.context() as patch:
        fail_at(patch, "put_file", 6)
        with pytest.raises(StoreError):
            remote(URL, AVERAGE)
    remote(URL, AVERAGE, overwrite=True)
    check_complete(expected, staging)


def test_overwriting(remote, expected, staging, monkeypatch):
    remote(URL, m3jax.Recipe(max_shard_size="4KB"))
    old = files()
    assert old.keys() - expected.keys()
    with pytest.raises(OutputError, match="--overwrite to replace it"):
        remote(URL, AVERAGE)
    with monkeypatch.context() as patch:
        fail_at(patch, "put_file", 0)
        with pytest.raises(StoreError):
            remote(URL, AVERAGE, overwrite=True)
    assert files() == old  # nothing had begun
    with monkeypatch.context() as patch:
        fail_at(patch, "put_file", 2)
        with pytest.raises(StoreError):
            remote(URL, AVERAGE, overwrite=True)
    with pytest.raises(CheckpointError, match="unfinished"):
        open_checkpoint(URL)
    remote(URL, AVERAGE, overwrite=True)
    check_complete(expected, staging)


def test_a_merge_that_fails_leaves_the_old_output(remote, monkeypatch):
    """Nothing is sent before everything is there."""
    remote(URL, m3jax.Recipe(max_shard_size="4KB"))
    old = files()
    with monkeypatch.context() as patch:
        fail_at(patch, "cat_file", 12, error=TimeoutError)
        with pytest.raises(StoreError, match="cannot be read"):
            remote(URL, AVERAGE, overwrite=True)
    assert files() == old
    assert m3jax.verify(URL) == []


def test_what_is_not_ours_stays(remote):
    put("bucket/merged/model.safetensors", b"mine")
    with pytest.raises(OutputError, match=r"holds no m3jax\.json"):
        remote(URL, AVERAGE, overwrite=True)
    put("bucket/merged/m3jax.json", b"{}")
    put("bucket/merged/thesis/chapter.txt", b"mine")
    with pytest.raises(OutputError, match="also holds 'thesis'"):
        remote(URL, AVERAGE, overwrite=True)
    assert len(files()) == 3


def test_an_input_that_changes_is_noticed(remote, monkeypatch, staging):
    name = "models/a/model.safetensors"
    content = MemoryFileSystem.store[f"/{name}"].getvalue()
    journal = StoreOutput.journal

    def changing(self, *entries):
        put(name, content)
        journal(self, *entries)

    monkeypatch.setattr(StoreOutput, "journal", changing)
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        remote(URL, AVERAGE)
    assert files() == {}
    assert not [path for path in staging.rglob("*") if path.is_file()]


def test_another_merge_into_the_same_output(remote, expected, monkeypatch):
    path = store.parse(URL)
    assert isinstance(path, StorePath)
    with (
        StoreOutput(path, overwrite=False, resume=False),
        pytest.raises(OutputError, match="another merge is writing"),
    ):
        remote(URL, AVERAGE)
    # From another machine nothing is known until the end.
    put_file = MemoryFileSystem.put_file

    def late(self, *arguments, **options):
        put_file(self, *arguments, **options)
        put("bucket/merged/m3jax.json", b"{}")

    monkeypatch.setattr(MemoryFileSystem, "put_file", late)
    with pytest.raises(OutputError, match="has written this output meanwhile"):
        remote(URL, AVERAGE)


def test_reads_that_fail(remote, run: Run, monkeypatch):
    with monkeypatch.context() as patch:
        fail_at(patch, "cat_file", 12, error=TimeoutError)
        with pytest.raises(StoreError, match=r"cannot be read \(TimeoutError: 'the l"):
            remote(URL, AVERAGE)
    assert "m3jax.json" not in files()
    with monkeypatch.context() as patch:
        fail_at(patch, "ls", *range(99), error=PermissionError)
        ran = run("inspect", "memory://models/a")
    assert "memory://models/a: cannot be listed (PermissionError: 'the" in ran.error
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "cat_file", lambda *a, **k: b"short")
        with pytest.raises(CheckpointError, match="came as 5 bytes"):
            open_checkpoint("memory://models/b/model.safetensors")


@pytest.mark.parametrize("size", [None, -1, "9", True])
def test_sizes_that_are_none(size, remote, monkeypatch):
    info = MemoryFileSystem.info

    def odd(self, path, **options):
        found = info(self, path, **options)
        return found if found["type"] == "directory" else {**found, "size": size}

    monkeypatch.setattr(MemoryFileSystem, "info", odd)
    with pytest.raises(CheckpointError, match="the store says its size is"):
        open_checkpoint("memory://models/b/model.safetensors")


@pytest.mark.parametrize(
    "name", ["..", ".", "../secret.safetensors", "a/b.safetensors", "x\n.safetensors"]
)
def test_listed_names_that_lead_out_are_absent(name, monkeypatch):
    entry = {"name": f"/models/c/{name}", "type": "file", "size": 9}
    put("models/c/config.json", b"{}")
    monkeypatch.setattr(MemoryFileSystem, "ls", lambda *a, **k: [entry])
    path = store.parse("memory://models/c")
    assert isinstance(path, StorePath)
    assert list(path.iterdir()) == []
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        open_checkpoint("memory://models/c")


def test_an_index_that_leads_out(remote):
    index = b'{"weight_map": {"x": "../a/model.safetensors"}}'
    put("models/c/model.safetensors.index.json", index)
    with pytest.raises(CheckpointError, match="needs the plain name of a file"):
        open_checkpoint("memory://models/c")


def test_a_package_that_is_missing(monkeypatch):
    missing = {"class": "no_such_package.FileSystem", "err": "install it"}
    for scheme, hint in (("gs", r"\.\[gcs\]'"), ("s3", r"\.\[s3\]'"), ("az", "it")):
        monkeypatch.setitem(known_implementations, scheme, missing)
        with pytest.raises(CheckpointError, match=f"install '?{hint}"):
            open_checkpoint(f"{scheme}://bucket/model")


def test_no_room_to_stage(remote, monkeypatch):
    full = os.statvfs_result((4096, 4096, 10, 0, 0, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    with pytest.raises(SpaceError, match="TMPDIR names another folder"):
        remote(URL, AVERAGE)
    assert files() == {}


def test_a_staging_folder_of_someone_else(remote, staging, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (staging / f"m3jax-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="is not your folder"):
        remote(URL, AVERAGE)


def test_an_output_in_an_input(remote):
    with pytest.raises(CheckpointError, match="lies in"):
        remote("memory://models/base/merged", AVERAGE)


def test_local_paths_import_no_store(local):
    code = (
        "import sys; from m3jax.__main__ import main; "
        f"assert main(['inspect', {str(local.base)!r}]) == 0; "
        "print(*[name for name in ('fsspec', 'etils') if name in sys.modules])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert ran.stdout.splitlines()[-1] == ""
