"""Hugging Face ids: what the cache holds is used, and everything else is one line."""

import hashlib
import os
import re
import socket
import subprocess
import sys
import time

import hub_server
import numpy as np
import pytest
from checkpoints import encode
from huggingface_hub import constants

from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.folder import open_checkpoint
from m3jax.checkpoints.places import hub
from m3jax.checkpoints.source import read_whole

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "fedcba9876543210fedcba9876543210fedcba98"


def cache(home, files, commit=COMMIT, refs=("main",), repo="org/name"):
    """The hub's cache as huggingface_hub lays it out: links to blobs."""
    model = home / "hub" / f"models--{repo.replace('/', '--')}"
    snapshot = model / "snapshots" / commit
    for folder in (model / "blobs", model / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    for ref in refs:
        (model / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (model / "refs" / ref).write_text(commit)
    for name, content in files.items():
        blob = hashlib.sha256(content).hexdigest()
        (model / "blobs" / blob).write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    return snapshot


def model(value):
    weights = encode({"x": np.full(3, value, np.float32)})
    return {"model.safetensors": weights, "config.json": b'{"vocab_size": 3}'}


def value_of(name):
    with open_checkpoint(name) as checkpoint:
        return read_whole(checkpoint.tensors["x"])[0], checkpoint


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty cache, and no network (conftest.py sets HF_HUB_OFFLINE)."""
    assert constants.HF_HUB_OFFLINE
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_cached_model(home):
    snapshot = cache(home, model(1))
    value, checkpoint = value_of("org/name")
    assert value == 1
    assert checkpoint.name == "org/name"
    assert checkpoint.revision == COMMIT
    assert checkpoint.location == snapshot
    assert checkpoint.config == {"vocab_size": 3}


def test_cached_revisions(home):
    cache(home, model(1))
    cache(home, model(2), commit=OTHER, refs=("v2.0", "refs/pr/7"))
    for revision, value in ((COMMIT, 1), ("main", 1), (OTHER, 2), ("v2.0", 2)):
        assert value_of(f"org/name@{revision}")[0] == value
    found, checkpoint = value_of("org/name@refs/pr/7")
    assert (found, checkpoint.revision) == (2, OTHER)
    assert checkpoint.name == "org/name@refs/pr/7"


def test_an_address_as_a_browser_shows_it(home):
    cache(home, model(1), commit=COMMIT, refs=("main", "v2.0"))
    for end in ("", "/", "/tree/main", "/tree/v2.0/"):
        assert value_of(f"https://huggingface.co/org/name{end}")[0] == 1


def test_a_cached_model_in_shards(home):
    shards = {f"{name}.safetensors": encode({name: np.zeros(2)}) for name in "ab"}
    index = b'{"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}'
    cache(home, {**shards, "model.safetensors.index.json": index})
    with open_checkpoint("org/name") as checkpoint:
        assert list(checkpoint.tensors) == ["a", "b"]


def test_a_snapshot_typed_as_a_path(home):
    snapshot = cache(home, model(1))
    value, checkpoint = value_of(str(snapshot))
    assert (value, checkpoint.revision) == (1, None)
    assert value_of(str(snapshot / "model.safetensors"))[0] == 1


def test_a_folder_has_precedence(home):
    cache(home, model(1))
    (home / "org" / "name").mkdir(parents=True)
    (home / "org" / "name" / "model.safetensors").write_bytes(
        model(2)["model.safetensors"]
    )
    value, checkpoint = value_of("org/name")
    assert (value, checkpoint.revision) == (2, None)


def test_a_cache_that_holds_a_part(home):
    cache(home, {"config.json": b"{}"})
    with pytest.raises(
        CheckpointError, match="fetch it again if its download was inter"
    ):
        open_checkpoint("org/name")
    index = b'{"weight_map": {"a": "a.safetensors"}}'
    cache(home, {"model.safetensors.index.json": index}, commit=OTHER)
    with pytest.raises(
        CheckpointError, match=r"'a\.safetensors' is missing; copy or do"
    ):
        open_checkpoint("org/name")
    snapshot = cache(home, model(1), repo="org/gone")
    (snapshot / "model.safetensors").resolve().unlink()
    with pytest.raises(
        CheckpointError, match="is a link to nothing; copy or download it"
    ):
        open_checkpoint("org/gone")


@pytest.mark.parametrize("name", ["org/name", "org/name@main", f"org/name@{COMMIT}"])
def test_not_cached_and_offline(home, name):
    start = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(name)
    assert str(caught.value) == (
        f"{name}: no such folder here, and Hugging Face's org/name is neither in the "
        "cache nor to be fetched: HF_HUB_OFFLINE is set: unset it, or fetch it "
        "elsewhere"
    )
    assert time.monotonic() - start < 5


def test_a_revision_that_is_not_cached(home):
    cache(home, model(1))
    with pytest.raises(CheckpointError, match="org/name@v3: no such folder here"):
        open_checkpoint("org/name@v3")


NO_IDS = (
    "model a/b/c ./org/name ../org/name -org/name org/ /name @ org/name@ a:b/c "
    "org\\name org/name@../../x org/..name"
)


@pytest.mark.parametrize("name", [*NO_IDS.split(), "", "org/na me", "org/name\n"])
def test_what_is_no_id_is_not_looked_up(home, name, monkeypatch):
    monkeypatch.setattr(hub, "_snapshot", lambda *_: pytest.fail("looks it up"))
    with pytest.raises(CheckpointError, match="no such file or folder; give a folder"):
        hub.locate(name)


@pytest.mark.parametrize("name", ["org--x/name", "org/-name", f"org/{'n' * 100}"])
def test_what_the_hub_does_not_allow(home, name):
    with pytest.raises(CheckpointError, match=r"is no name of a model|HF_HUB_OFF"):
        hub.locate(name)


def errors():
    from huggingface_hub import errors

    return errors


@pytest.mark.parametrize(
    ("kind", "hint"),
    [
        (
            "GatedRepoError",
            "accept its terms on huggingface.co and run `hf auth login`",
        ),
        ("RepositoryNotFoundError", "there is no such model, or it is private: check"),
        ("RevisionNotFoundError", "it has no such revision"),
        ("IncompleteSnapshotError", "the cache holds only a part of it"),
        ("HFValidationError", "it is no name of a model"),
        (
            "HfHubHTTPError",
            "check the network (HfHubHTTPError: '503'), or give a local",
        ),
    ],
)
def test_each_refusal_of_the_hub_has_a_way_out(home, kind, hint, monkeypatch):
    error_type = getattr(errors(), kind, None) or type(kind, (Exception,), {})

    def refused(*arguments):
        error = error_type.__new__(error_type)
        Exception.__init__(error, "503\nsecond line")
        raise error

    monkeypatch.setattr(hub, "_snapshot", refused)
    with pytest.raises(CheckpointError) as caught:
        hub.locate("org/name")
    message = str(caught.value)
    assert hint in message
    assert message.startswith("org/name: no such folder here")
    assert "\n" not in message


SCRIPT = """
import sys
from m3jax.checkpoints.places import hub
hub.TIMEOUT = 0.5
try:
    print(*hub.locate(sys.argv[1]))
except hub.CheckpointError as error:
    print(error)
"""


def locate_elsewhere(home, endpoint, name="org/name"):
    """In a process of its own, since huggingface_hub reads its settings once."""
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    environment |= {
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home),
        "HF_ENDPOINT": endpoint,
    }
    start = time.monotonic()
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, name],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    assert re.sub(r"\n?Fetching .*", "", ran.stderr).strip() == ""  # a progress bar
    return ran.stdout.strip(), time.monotonic() - start


@pytest.fixture
def silent_server():
    """Takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return f"http://127.0.0.1:{port}"


def test_a_model_is_fetched_and_then_cached(tmp_path):
    """What a merge needs and no more; then the network can go."""
    wanted = {**model(1), "tokenizer.json": b"{}", "README.md": b"# card"}
    wanted |= {"modeling_x.py": b"", "LICENSE": b"", "2_Dense/config.json": b"{}"}
    others = ("pytorch_model.bin", "consolidated.safetensors", "x/a.py", "x/a.json")
    others += ("original/model.safetensors",)
    files = wanted | dict.fromkeys(others, b"large")
    with hub_server.serve(files) as (endpoint, asked):
        said, _ = locate_elsewhere(tmp_path, endpoint, "org/name")
        folder = tmp_path / "hub/models--org--name/snapshots" / hub_server.COMMIT
        assert said == f"{folder} {hub_server.COMMIT}"
        there = (path for path in folder.rglob("*") if not path.is_dir())
        assert {str(path.relative_to(folder)) for path in there} == set(wanted)
        assert not any(path.endswith(others) for path in asked)
        missing, _ = locate_elsewhere(tmp_path, endpoint, "org/nothing")
        assert "or it is private: check the name, or run `hf auth login`" in missing
        missing, _ = locate_elsewhere(tmp_path, endpoint, "org/name@v9")
        assert missing.startswith("org/name@v9: no such folder here")
    assert value_of(str(folder))[0] == 1
    said, _ = locate_elsewhere(tmp_path, endpoint, "org/name")
    assert said == f"{folder} {hub_server.COMMIT}"


def test_of_several_formats_the_first_that_is_read_is_fetched():
    names = ["model.safetensors", "pytorch_model.bin", "flax_model.msgpack", "m.gguf"]
    assert hub.wanted_of(names) == names[:1]
    assert hub.wanted_of(names[1:]) == names[1:2]
    assert hub.wanted_of([*names[2:], "optimizer.pt"]) == names[2:3]
    assert hub.wanted_of(names[3:]) == names[3:]
    with pytest.raises(CheckpointError, match="holds 2 files of GGUF"):
        hub.wanted_of(["a.gguf", "b.gguf", "config.json"])
    parts = ["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"]
    assert hub.wanted_of(parts) == parts


@pytest.mark.parametrize("server", ["silent_server", "closed_port"])
def test_a_network_that_does_not_answer(server, tmp_path, request):
    """It must end soon, with one line; or with what the cache holds."""
    endpoint = request.getfixturevalue(server)
    said, seconds = locate_elsewhere(tmp_path, endpoint)
    assert said.startswith(
        "org/name: no such folder here, and Hugging Face's org/name is neither in the "
        "cache nor to be fetched: check the network ("
    )
    assert said.endswith("), or give a local folder")
    assert seconds < 30  # two or three, most of it Python's start
    snapshot = cache(tmp_path, model(1))
    said, seconds = locate_elsewhere(tmp_path, endpoint)
    assert said == f"{snapshot} {COMMIT}"
    assert seconds < 30


def test_a_local_path_needs_no_hub(tmp_path):
    """huggingface_hub takes a third of a second to import."""
    script = (
        "import sys; from m3jax.checkpoints.places import hub; "
        "hub.locate(sys.argv[1]); assert 'huggingface_hub' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path], check=True, timeout=60)
