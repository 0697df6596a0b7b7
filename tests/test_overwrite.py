"""The output's name: absent or a whole checkpoint at every moment, and never taken."""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import checkpoints
import pytest
from interruptions import RECIPES, Merge, Observer, partial_of, write_models

from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.output.folder import OutputError, OutputFolder
from m3jax.checkpoints.places import durable

AVERAGE = RECIPES["average"]


@pytest.fixture(scope="module")
def merge(tmp_path_factory) -> Merge:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "merged"


def folder(output: Path, *, overwrite: bool = True, resume: bool = False, **more):
    return OutputFolder(output, overwrite=overwrite, resume=resume, **more)


def write_output(output: Path, content: bytes) -> None:
    """Makes an output of two files."""
    with folder(output) as under_construction:
        under_construction.write("model.safetensors", content)
        under_construction.write("m3jax.json", content)
        under_construction.commit(fsync=True)


def below(folder: Path) -> list[Path]:
    """All that a folder of a test holds."""
    return [] if folder in (Path("/"), Path()) else sorted(folder.rglob("*"))


def state_of(folder: Path) -> list[tuple[Path, int, int]]:
    """What changes when anything below a folder is written or replaced."""
    found = [(path, path.stat()) for path in below(folder)]
    return [(path, stat.st_ino, stat.st_mtime_ns) for path, stat in found]


class TestTakenPlaces:
    def refused(self, output: Path, match: str, **how) -> None:
        before = below(output.parent)
        with pytest.raises(OutputError, match=match) as caught:
            folder(output, **how)
        assert "\n" not in str(caught.value)
        assert below(output.parent) == before

    def test_an_output_without_overwrite(self, output):
        write_output(output, b"old")
        self.refused(output, "exists already; pass --overwrite", overwrite=False)

    def test_an_empty_folder(self, output):
        output.mkdir()
        self.refused(output, "exists already; pass --overwrite", overwrite=False)
        write_output(output, b"new")
        assert (output / "m3jax.json").read_bytes() == b"new"

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_folder_of_others(self, overwrite, output):
        output.mkdir()
        (output / "thesis.tex").write_text("mine")
        self.refused(output, "choose another", overwrite=overwrite)

    @pytest.mark.parametrize("name", ["results.json", "logs", "model-1.safetensors"])
    def test_an_output_to_which_something_was_added(self, name, output):
        write_output(output, b"old")
        (output / name).mkdir()
        self.refused(output, f"also holds '{name}', which m3jax did not write")

    def test_a_file(self, output):
        output.write_text("mine")
        self.refused(output, "exists and is not a folder")

    @pytest.mark.parametrize("inner", ["merged", "a/merged"])
    def test_below_a_file(self, inner, tmp_path):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(OutputError, match="is not a folder; choose another"):
            folder(tmp_path / "file" / inner)

    @pytest.mark.parametrize("target", ["elsewhere", "nowhere"])
    def test_a_link(self, target, output):
        (output.parent / "elsewhere").mkdir()
        output.symlink_to(output.parent / target)
        self.refused(output, "exists and is not a folder")

    @pytest.mark.parametrize("name", ["", "..", "/", "a/.."])
    def test_no_name(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        self.refused(Path(name), "needs to end with the name")

    def test_a_mount_point(self):
        self.refused(Path("/proc"), "choose another")

    def test_an_empty_mount_point(self, output, monkeypatch):
        output.mkdir()
        monkeypatch.setattr(Path, "is_mount", lambda path: path == output)
        self.refused(output, "is a mount point, which cannot be replaced")

    def test_a_link_in_the_partial_folder_s_place(self, output):
        (output.parent / "precious").mkdir()
        (output.parent / "precious" / "file").write_text("mine")
        partial_of(output).symlink_to(output.parent / "precious")
        self.refused(output, "is a link; remove it")

    def test_what_came_meanwhile_is_not_replaced(self, output):
        with (
            pytest.raises(OutputError, match="exists already"),
            folder(output, overwrite=False) as under_construction,
        ):
            under_construction.journal({"worth": "keeping"})
            under_construction.write("m3jax.json", b"new")
            output.mkdir()
            (output / "m3jax.json").write_bytes(b"theirs")
            under_construction.commit(fsync=False)
        assert (output / "m3jax.json").read_bytes() == b"theirs"
        assert partial_of(output).exists()  # for --resume --overwrite

    def test_before_anything_is_read(self, merge, output):
        """Checkpoints that are not there would be another error."""
        output.mkdir()
        with pytest.raises(OutputError, match="exists already"):
            Merge(Path("none"), (Path("nothing"),))(output, AVERAGE)


class TestInputs:
    """An output that is an input, lies in one or holds one would destroy it."""

    @pytest.fixture
    def merge(self, tmp_path):
        return write_models(tmp_path / "models")

    def refused(self, merge, output):
        before = state_of(output.parent)
        with pytest.raises(CheckpointError, match=r"lies in \(or holds\) the input"):
            merge(output, AVERAGE, overwrite=True)
        assert state_of(output.parent) == before

    def inputs(self, merge, output):
        """The merge with an earlier output as its second model."""
        merge(output, AVERAGE)
        return Merge(merge.base, (merge.models[0], output))

    def test_an_earlier_output(self, merge, output):
        self.refused(self.inputs(merge, output), output)

    def test_through_a_link_to_the_input(self, merge, output, tmp_path):
        merge(output, AVERAGE)
        (tmp_path / "link").symlink_to(output)
        self.refused(Merge(merge.base, (tmp_path / "link", merge.models[1])), output)

    def test_through_a_link_in_the_output_s_path(self, merge, output, tmp_path):
        inputs = self.inputs(merge, output)
        (tmp_path / "link").symlink_to(tmp_path)
        self.refused(inputs, tmp_path / "link" / output.name)

    def test_a_file_of_it(self, merge, output):
        merge(output, RECIPES["ties after DARE"])
        models = (merge.models[0], output / "model.safetensors")
        self.refused(Merge(merge.base, models), output)

    def test_inside(self, merge):
        self.refused(merge, merge.base / "merged")

    def test_deep_inside_through_dots(self, merge):
        self.refused(merge, merge.models[0] / ".." / "a" / "new" / "merged")

    def test_around(self, merge, tmp_path):
        """The folder that the inputs lie in, disguised as an output."""
        nested = write_models(tmp_path / "merged")
        with pytest.raises(OutputError, match=r"holds no m3jax\.json"):
            nested(tmp_path / "merged", AVERAGE, overwrite=True)

    def test_beside(self, merge):
        output = merge.base.parent / "merged"
        merge(output, AVERAGE)
        assert (output / "m3jax.json").exists()


class TestLock:
    def test_a_second_merge_is_refused(self, output):
        with folder(output) as first:
            with pytest.raises(OutputError, match="another merge is writing"):
                folder(output)
            first.write("m3jax.json", b"first")
            first.commit(fsync=False)
            with pytest.raises(OutputError, match="another merge is writing"):
                folder(output)  # until it has let go
        write_output(output, b"second")

    def test_in_another_process(self, output):
        script = f"""
            import pathlib, sys
            from m3jax.checkpoints.output.folder import OutputFolder
            output = pathlib.Path({str(output)!r})
            with OutputFolder(output, overwrite=True, resume=False) as folder:
                folder.write("m3jax.json", b"first")
                print("locked", flush=True)
                sys.stdin.readline()
                folder.commit(fsync=True)
        """
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == "locked\n"
            with pytest.raises(OutputError, match="another merge is writing"):
                folder(output)
            process.communicate("go on\n")
        assert process.returncode == 0
        assert (output / "m3jax.json").read_bytes() == b"first"
        assert not partial_of(output).exists()

    def test_it_dies_with_its_owner(self, output):
        partial_of(output).mkdir()
        (partial_of(output) / "lock").touch()
        write_output(output, b"new")

    def test_a_file_system_without_locks(self, output, monkeypatch):
        def flock(fd, how):
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr(fcntl, "flock", flock)
        notes = []
        with folder(output, note=notes.append) as under_construction:
            under_construction.write("m3jax.json", b"new")
            under_construction.commit(fsync=False)
        assert "has no locks" in notes[0]
        assert output.exists()


class TestSync:
    """What is renamed is on the disk already."""

    @pytest.fixture
    def calls(self, monkeypatch):
        """The file-system calls of a commit, in order: (name, file)."""
        calls = []

        def watch(module, name, path_of):
            original = getattr(module, name)

            def call(*arguments):
                calls.append((name, path_of(*arguments)))
                return original(*arguments)

            monkeypatch.setattr(module, name, call)

        watch(os, "fsync", lambda fd: Path(f"/proc/self/fd/{fd}").readlink())
        watch(Path, "rename", lambda path, target: path)
        watch(durable, "_exchange", lambda first, second: first)
        return calls

    def test_a_new_output(self, calls, output):
        write_output(output, b"new")
        checkpoint = partial_of(output) / "checkpoint"
        assert sorted(calls[:3]) == [
            ("fsync", checkpoint),
            ("fsync", checkpoint / "m3jax.json"),
            ("fsync", checkpoint / "model.safetensors"),
        ]
        assert calls[3:] == [("rename", checkpoint), ("fsync", output.parent)]

    def test_replaced(self, calls, output):
        write_output(output, b"old")
        del calls[:]
        write_output(output, b"new")
        names = [name for name, _ in calls]
        assert names == ["fsync"] * 3 + ["_exchange", "fsync"]

    def test_not_if_unwanted(self, calls, output):
        with folder(output) as under_construction:
            under_construction.write("m3jax.json", b"new")
            under_construction.commit(fsync=False)
        assert [name for name, _ in calls] == ["rename"]

    def test_a_disk_that_fails_to_keep_it(self, output, monkeypatch):
        """What a failed fsync leaves can look whole and not be: nothing is kept."""

        def fsync(fd):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "fsync", fsync)
        with (
            pytest.raises(OSError, match=r"m3jax-partial/checkpoint/m.*") as caught,
            folder(output) as under_construction,
        ):
            under_construction.journal({"worth": "keeping"})
            under_construction.write("m3jax.json", b"new")
            under_construction.commit(fsync=True)
        assert not hasattr(caught.value, "__notes__")
        assert list(output.parent.iterdir()) == []


# Writes and commits an output, and dies at file-system call number N. Calls are seen
# by Python's audit hook; those that it does not see are wrapped.
DIE = """
import os, pathlib, shutil, signal, sys
from m3jax.checkpoints.places import durable
from m3jax.checkpoints.output.folder import OutputFolder

output, exchange, first = pathlib.Path(sys.argv[1]), sys.argv[2] == "True", sys.argv[3]
seen = limit = 0
counting = False
WATCHED = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "open", "os.truncate"}

def step(*_):
    global seen
    if counting:
        seen += 1
        if seen == limit:
            os.kill(os.getpid(), signal.SIGKILL)

def audit(event, arguments):
    if event in WATCHED and "merged" in str(arguments[0]):
        step()

def wrapped(function):
    def call(*arguments):
        step()
        result = function(*arguments)
        step()
        return result
    return call

sys.addaudithook(audit)
if exchange:
    durable._exchange = wrapped(durable._exchange)
else:
    durable._exchange = lambda first, second: False
os.fsync, os.pwrite = wrapped(os.fsync), wrapped(os.pwrite)

def write(content, resume):
    with OutputFolder(output, overwrite=True, resume=resume) as folder:
        assert resume or not folder.journalled
        folder.journal({"content": content.decode()})
        for name in ("model.safetensors", "m3jax.json"):
            folder.write(name, content)
        folder.commit(fsync=True)

def look():
    if not output.exists():
        return "nothing"
    contents = {path.read_bytes().decode() for path in output.iterdir()}
    assert len(contents) == 1 and len(list(output.iterdir())) == 2, contents
    return contents.pop()

work = output.parent / ".merged.m3jax-partial"
while True:
    limit += 1
    for path in (output, work):
        shutil.rmtree(path, ignore_errors=True)
    if first == "old":
        write(b"old", False)
    child = os.fork()
    if not child:
        counting = True
        write(b"new", False)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    found = look()
    resumable = (work / "journal.jsonl").exists()
    write(b"newer", resumable and limit % 2 == 0)
    assert look() == "newer", look()
    assert not work.exists()
    print(found, flush=True)
    if status == 0:
        break
    assert os.WIFSIGNALED(status), status
"""


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("first", ["nothing", "old"])
def test_killed_at_every_file_system_call(exchange, first, output):
    """The name holds the old, then the new, and the next merge gets through."""
    done = subprocess.run(
        [sys.executable, "-c", DIE, output, str(exchange), first],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = done.stdout.split()
    assert len(found) > 20
    changes = [found[0]] + [b for a, b in itertools.pairwise(found) if a != b]
    if first == "old" and not exchange:
        # Between two renames, where there is no swap: the next merge puts it back.
        assert changes == ["old", "nothing", "new"]
        assert found.count("nothing") == 1
    else:
        assert changes == [first, "new"]


def test_an_old_one_that_cannot_be_removed(output, monkeypatch):
    write_output(output, b"old")
    notes = []
    with folder(output, note=notes.append) as under_construction:
        under_construction.write("m3jax.json", b"new")
        under_construction.commit(fsync=False)
        monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)
    assert (output / "m3jax.json").read_bytes() == b"new"
    assert notes == [
        f"{partial_of(output)}/checkpoint: cannot be removed; remove it yourself"
    ]


def test_put_back_after_a_crash_between_two_renames(output):
    write_output(output, b"old")
    partial_of(output).mkdir()
    output.rename(partial_of(output) / "old")
    notes = []
    with pytest.raises(OutputError, match="exists already; pass --overwrite"):
        folder(output, overwrite=False, note=notes.append)
    assert (output / "m3jax.json").read_bytes() == b"old"
    assert "put back" in notes[0]
    assert not partial_of(output).exists()


@pytest.mark.parametrize("exchange", [True, False])
def test_an_error_in_the_last_step_leaves_the_old_one(exchange, output, monkeypatch):
    write_output(output, b"old")
    rename = Path.rename

    def fail(path, target):
        if path.name == "checkpoint":
            raise OSError(30, "Read-only file system", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    monkeypatch.setattr(durable, "_exchange", lambda first, second: False)
    with pytest.raises(OSError, match="Read-only"):
        write_output(output, b"new")
    assert (output / "m3jax.json").read_bytes() == b"old"
    assert not partial_of(output).exists()


class TestCtrlCInTheCommit:
    """Whichever moment it hits, what is said of the output is true."""

    @pytest.mark.parametrize(
        ("name", "after", "complete"),
        [
            ("sync", False, False),
            ("sync", True, False),
            ("put_in_place", False, False),
            ("put_in_place", True, True),
        ],
    )
    def test_what_is_said(
        self, name, after, complete, merge, output, tmp_path, monkeypatch
    ):
        merge(tmp_path / "reference", AVERAGE)
        original = getattr(durable, name)

        def interrupted(*arguments):
            if after:
                original(*arguments)
            raise KeyboardInterrupt

        monkeypatch.setattr(durable, name, interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            merge(output, AVERAGE)
        monkeypatch.undo()
        (note,) = caught.value.__notes__
        assert output.exists() == complete
        assert partial_of(output).exists() == (not complete)
        assert ("is complete" in note) == complete
        assert ("--resume" in note) == (not complete)
        if not complete:
            result = merge(output, AVERAGE, Observer(), resume=True)
            assert result.resumed > 0
        expected = checkpoints.digest(tmp_path / "reference")
        assert checkpoints.digest(output) == expected
