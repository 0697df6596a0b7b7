"""Hostile checkpoints: one line each, at once, and nothing left open or read."""

import json
import os
import re
import resource
import shutil
import signal
import tracemalloc
from pathlib import Path

import pytest
from attacks.folders import ATTACKS, INDEX, SECRET, WEIGHTS, link_to_secret, tensors
from attacks.headers import DAMAGED, STRICTER
from checkpoints import random_model, write
from command_line import Run
from fuzz import targets
from fuzz.targets import LONGEST_MESSAGE, check_config, check_index
from hypothesis import given, settings
from hypothesis import strategies as st

import m3jax
from m3jax.checkpoints import side_files
from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.folder import open_checkpoint
from m3jax.checkpoints.places.files import InputFile, open_regular

SECONDS = 30  # a FIFO blocks for ever; everything here takes a fraction of a second


def descriptors():
    """The numbers of this process's open files."""
    open_now = {int(path.name) for path in Path("/proc/self/fd").iterdir()}
    return {number for number in open_now if Path(f"/proc/self/fd/{number}").exists()}


@pytest.fixture(autouse=True)
def nothing_hangs_or_stays_open():
    """Every test here ends soon, and closes what it opened."""

    def too_long(signum, frame):
        raise AssertionError(f"hangs for {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    before_it = descriptors()
    yield
    assert descriptors() == before_it
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def check_message(message, expected):
    assert re.search("|".join(map(re.escape, expected.split("|"))), message), message
    assert "\n" not in message
    assert len(message) < LONGEST_MESSAGE + 5000  # the longest path that is typed here
    assert SECRET.decode() not in message


@pytest.mark.parametrize("case", ATTACKS)
@pytest.mark.parametrize("mergeable", [True, False])
def test_attacks_are_refused(case, mergeable, tmp_path):
    build, expected = ATTACKS[case]
    (tmp_path / "model").mkdir()
    typed = str(build(tmp_path / "model"))
    tracemalloc.start()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(typed, mergeable=mergeable)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    check_message(str(caught.value), expected)
    assert str(caught.value).startswith(typed)
    assert peak < 20_000_000


@pytest.mark.parametrize("case", [*DAMAGED, *STRICTER])
def test_damaged_shards_are_named(case, tmp_path):
    content, _ = {**DAMAGED, **STRICTER}[case]
    (tmp_path / "one.safetensors").write_bytes(tensors("x"))
    (tmp_path / "two.safetensors").write_bytes(content)
    (tmp_path / INDEX).write_text(
        '{"weight_map":{"x":"one.safetensors","a":"two.safetensors"}}'
    )
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}/two\.safetensors: "):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    "case", ["FIFO as weights", "index leads up", "pickle typed", "config is deep"]
)
def test_commands_end_with_one_line(case, tmp_path, run: Run):
    build, expected = ATTACKS[case]
    (tmp_path / "model").mkdir()
    model = build(tmp_path / "model")
    merge = ("merge", f"--models={model},{model}", f"--output={tmp_path}/out")
    for arguments in (("inspect", model), ("diff", model, model), merge):
        ran = run(*arguments)
        assert ran.code == 3
        assert ran.out == ""
        assert ran.err.startswith(f"m3jax {arguments[0]}: {model}")
        assert ran.err.endswith("\n")
        check_message(ran.err[:-1], expected)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", side_files.SIDE_FILES)
def test_no_side_file_is_taken_from_elsewhere(name, tmp_path):
    """Or a downloaded model could have its user publish a private file."""
    folder = tmp_path / "model"
    folder.mkdir()
    link_to_secret(folder / name)
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        side_files.read_side_file(folder, name)


def test_a_merge_copies_no_private_file(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / WEIGHTS).write_bytes(tensors("a"))
    link_to_secret(folder / "tokenizer.json")
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        m3jax.merge(None, [folder, folder], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "secret"]


def test_side_files_have_a_limit(tmp_path):
    (tmp_path / "vocab.txt").write_bytes(b"x")
    os.truncate(tmp_path / "vocab.txt", side_files.MAX_SIDE_FILE + 1)
    with pytest.raises(CheckpointError, match="has 256000001 bytes, at most 256000000"):
        side_files.read_side_file(tmp_path, "vocab.txt")
    with pytest.raises(CheckpointError, match=r"'merges\.txt' is a link to nothing"):
        (tmp_path / "merges.txt").symlink_to("nothing")
        side_files.read_side_file(tmp_path, "merges.txt")
    assert side_files.read_side_file(tmp_path, "vocab.json") is None


def test_nothing_is_done_to_a_device_by_opening_it(monkeypatch):
    """A tape rewinds and a watchdog starts when it is opened."""
    opened = []
    monkeypatch.setattr(os, "open", lambda *arguments: opened.append(arguments))
    with pytest.raises(CheckpointError, match="is a device"):
        open_checkpoint("/dev/null")
    assert not opened


def test_a_file_that_becomes_a_fifo(tmp_path, monkeypatch):
    """It is looked at once more when it has been opened."""
    path = tmp_path / WEIGHTS
    os.mkfifo(path)
    regular = Path(__file__).stat()
    monkeypatch.setattr(type(path), "stat", lambda path, **_: regular)
    with pytest.raises(CheckpointError, match="is a FIFO"):
        open_regular(path)


def test_too_many_open_files(tmp_path):
    names = [f"{i:03}.safetensors" for i in range(60)]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(tensors(f"t{i}"))
    weight_map = ",".join(f'"t{i}":"{name}"' for i, name in enumerate(names))
    (tmp_path / INDEX).write_text(f'{{"weight_map":{{{weight_map}}}}}')
    with open_checkpoint(str(tmp_path)) as checkpoint:
        assert len(checkpoint.tensors) == 60
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [number for number in range(1000) if number not in descriptors()]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[40], limits[1]))
    try:
        with pytest.raises(OSError, match=r"may not open more files; allow more"):
            open_checkpoint(str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("when", range(12))
def test_no_descriptor_leaks_when_reading_fails(when, tmp_path, monkeypatch):
    (tmp_path / "one.safetensors").write_bytes(tensors("a"))
    (tmp_path / "two.safetensors").write_bytes(tensors("b"))
    (tmp_path / INDEX).write_text(
        '{"weight_map":{"a":"one.safetensors","b":"two.safetensors"}}'
    )
    (tmp_path / "config.json").write_text("{}")
    calls = iter(range(100))
    read = os.preadv

    def fails(fd, buffers, offset):
        if next(calls) == when:
            raise OSError(5, "Input/output error")
        return read(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", fails)
    if when < 10:  # index, config, shards: if they are pointers; then what they hold
        with pytest.raises(
            OSError, match=r"Input/output error: '/.*\.(json|safetensors)'"
        ) as caught:
            open_checkpoint(str(tmp_path))
        assert caught.value.filename.startswith(str(tmp_path))
    else:
        open_checkpoint(str(tmp_path)).close()


def test_an_interrupt_closes_everything(tmp_path, monkeypatch):
    (tmp_path / WEIGHTS).write_bytes(tensors("a"))

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("m3jax.checkpoints.sources.quantised.weights_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_checkpoint(str(tmp_path))
    monkeypatch.setattr(os, "fstat", interrupted)
    with pytest.raises(KeyboardInterrupt):
        InputFile(tmp_path / WEIGHTS)
    monkeypatch.undo()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


@st.composite
def damaged_json(draw, values):
    text = bytearray(
        json.dumps(draw(values), ensure_ascii=draw(st.booleans())).encode(
            "utf-8", "surrogatepass"
        )
    )
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(text)))
        text[place : place + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(text)


@settings(max_examples=300)
@given(damaged_json(json_values))
def test_any_config(text):
    check_config(text)


names = st.sampled_from(["x.safetensors", "../x", "/x", "", ".", "..", "a\\b"])
indexes = st.fixed_dictionaries(
    {
        "weight_map": st.dictionaries(
            st.text(max_size=8), names | json_values, max_size=4
        )
    },
    optional={"metadata": json_values, "x": json_values},
)


@settings(max_examples=300)
@given(damaged_json(indexes))
def test_any_index(text):
    check_index(text)


CORPUS = sorted((Path(__file__).parent / "fuzz" / "corpus").glob("*/*"))


@pytest.mark.parametrize(
    "path", CORPUS, ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_what_the_fuzzers_start_from_and_found(path):
    getattr(targets, f"check_{path.parent.name}")(path.read_bytes())


def test_what_git_lfs_leaves_in_a_files_place(tmp_path, run: Run):
    """A clone without git-lfs has three lines of text where the weights belong."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 135\n"
    for name in ("model.safetensors", "tokenizer.json"):
        for folder in ("base", "a"):
            shutil.rmtree(tmp_path / folder, ignore_errors=True)
            write(tmp_path / folder, random_model(0), {})
        (tmp_path / "base" / name).write_text(pointer)
        flags = f"--base={tmp_path / 'base'}", f"--models={tmp_path / 'a'}"
        ran = run("merge", *flags, f"--output={tmp_path / 'out'}")
        assert ran.code == 3
        assert f"{name}: a pointer of Git LFS, not the file itself" in ran.error
        assert not (tmp_path / "out").exists()
