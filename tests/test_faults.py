"""Disks that fill up, reads that fail, limits: one line, an exit code, no loss."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import checkpoints
import jax
import pytest
from command_line import Ran, Run
from interruptions import RECIPES, Merge, Observer, held, partial_of, write_models

import m3jax
from m3jax.checkpoints.output.folder import SpaceError
from m3jax.checkpoints.output.shards import ShardWriter
from m3jax.commands import process
from m3jax.engine import buffers

TIES = RECIPES["ties"]
LATE = 50  # calls of `advance`: some tensors are written, some are not
FLAGS = ["--config.method=ties", "--config.max_shard_size=9KB"]  # the same


@pytest.fixture(scope="module")
def merge(tmp_path_factory) -> Merge:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def expected(merge, tmp_path_factory) -> dict[str, str]:
    output = tmp_path_factory.mktemp("reference") / "merged"
    merge(output, TIES)
    return checkpoints.digest(output)


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "merged"


@pytest.fixture(autouse=True)
def nothing_leaks(expected) -> Iterator[None]:
    """A failure leaves no thread at work, no file open and no limit behind."""
    before = held()
    yield
    deadline = time.monotonic() + 10
    while held() != before and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.02)
    assert held() == before


@pytest.fixture(autouse=True)
def one_device(monkeypatch) -> None:
    """Chunks of the command line are then as small as asked for."""
    devices = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda **_: devices)


def merge_fails(merge: Merge, output: Path, run: Run, *more: str) -> Ran:
    ran = run(*merge.arguments(output, FLAGS), *more)
    assert not output.exists()
    assert "Traceback" not in ran.err
    return ran


def check_resumes(ran: Ran, merge: Merge, output: Path, run: Run, expected) -> None:
    """Resuming is offered, and works."""
    assert ran.error.endswith(
        f"; what is done so far is kept in {partial_of(output)}; the same command with "
        "--resume goes on from there"
    )
    resumed = run(*merge.arguments(output, FLAGS), "--resume")
    assert resumed.code == 0, resumed.err
    assert "had been written before" in resumed.out
    assert checkpoints.digest(output) == expected
    assert not partial_of(output).exists()


class FailingCall:
    """A system call that fails from call number `first` on, for paths with `part`."""

    def __init__(self, original, number: int, first: int, part: str):
        self.original, self.number, self.part = original, number, part
        self.left = first
        self.lock = threading.Lock()

    def __call__(self, target, *arguments):
        path = target
        if isinstance(target, int):
            path = Path(f"/proc/self/fd/{target}").readlink()
        if self.part in str(path):
            with self.lock:
                self.left -= 1
                if self.left < 0:
                    raise OSError(self.number, os.strerror(self.number))
        return self.original(target, *arguments)


WRITES = [
    (errno.ENOSPC, "No space left on device; the disk is full"),
    (errno.EDQUOT, "Disk quota exceeded; the disk quota is used up"),
    (errno.EFBIG, "File too large; files may not be this large here (see ulimit -f)"),
    (errno.EIO, "Input/output error; the disk failed to read or write"),
]


@pytest.mark.parametrize(("number", "text"), WRITES)
def test_a_write_fails(number, text, merge, output, run, expected, monkeypatch):
    failing = FailingCall(os.pwrite, number, 15, ".m3jax-partial/checkpoint/model-")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing)
        ran = merge_fails(merge, output, run)
    assert ran.code == 4
    assert f"{partial_of(output)}/checkpoint/model-0" in ran.error
    assert f".safetensors: {text}; what" in ran.error
    check_resumes(ran, merge, output, run, expected)


@pytest.mark.parametrize("first", [0, 3])
def test_the_first_writes_fail(first, merge, output, run, monkeypatch):
    """Headers, or tensors before one was whole: then the thresholds are kept."""
    failing = FailingCall(os.pwrite, errno.ENOSPC, first, ".m3jax-partial/")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing)
        ran = merge_fails(merge, output, run)
    assert ran.code == 4
    assert "--resume" in ran.error
    observer = Observer()
    merge(output, TIES, observer, resume=True)
    assert observer.stages == ["merging"]


def test_the_journal_fails(merge, output, run, expected, monkeypatch):
    failing = FailingCall(os.write, errno.ENOSPC, 3, "journal.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", failing)
        ran = merge_fails(merge, output, run)
    assert ran.code == 4
    assert f"{partial_of(output)}/journal.jsonl: No space left" in ran.error
    check_resumes(ran, merge, output, run, expected)


def test_half_a_line_of_the_journal(merge, output, run, expected, monkeypatch):
    write = os.write
    calls = []

    def fails(fd, data):
        if "journal" in str(Path(f"/proc/self/fd/{fd}").readlink()):
            calls.append(fd)
            if len(calls) == 4:
                return write(fd, data[:20])
            if len(calls) == 5:
                raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fails)
        ran = merge_fails(merge, output, run)
    check_resumes(ran, merge, output, run, expected)


@pytest.mark.parametrize(("first", "kept"), [(0, False), (20, False), (48, True)])
def test_a_read_fails(first, kept, merge, output, run, expected, monkeypatch):
    """Of a header, in a reading pass, and in the last pass."""
    path = merge.models[1] / "model.safetensors"
    failing = FailingCall(os.preadv, errno.EIO, first, str(path))
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing)
        ran = merge_fails(merge, output, run)
    assert ran.code == 4
    assert f"{path}: Input/output error; the disk failed" in ran.error
    if kept:
        check_resumes(ran, merge, output, run, expected)
    else:
        assert "--resume" not in ran.error
        assert not partial_of(output).exists()


def test_reading_back_fails(merge, output, run, expected, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        merge(output, TIES, Observer(LATE))
    failing = FailingCall(os.preadv, errno.EIO, 0, ".m3jax-partial/")
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing)
        ran = merge_fails(merge, output, run, "--resume")
    assert ran.code == 4
    assert f"{partial_of(output)}/checkpoint/model-0" in ran.error
    check_resumes(ran, merge, output, run, expected)


def test_too_many_open_files(merge, output, run, expected, monkeypatch):
    """The inputs fit into the limit, the outputs do not."""
    monkeypatch.setattr(process, "open_many_files", lambda: None)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = {int(name) for name in os.listdir("/proc/self/fd")}  # noqa: PTH208
    free = [number for number in range(1000) if number not in taken]
    try:
        # Three inputs, the lock and the first file of the output.
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[5], limits[1]))
        ran = merge_fails(merge, output, run)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert ran.code == 4
    assert "Too many open files; this process may not open more (see ul" in ran.error
    resumed = run(*merge.arguments(output, FLAGS), "--resume")
    assert resumed.code == 0
    assert checkpoints.digest(output) == expected


class TestMemory:
    def test_buffers(self, merge, output, run, monkeypatch):
        def aligned(size):
            raise MemoryError

        monkeypatch.setattr(buffers, "_aligned", aligned)
        ran = merge_fails(merge, output, run)
        assert ran.code == 4
        assert ran.error.endswith(
            "out of memory; a smaller --chunk_size or fewer --threads need less"
        )
        assert not partial_of(output).exists()

    @pytest.mark.parametrize(
        "error",
        [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of it")],
    )
    def test_in_a_thread(self, error, merge, output, run, expected, monkeypatch):
        write = ShardWriter.write
        calls = []

        def fails(*arguments):
            calls.append(arguments)
            if len(calls) > 12:
                raise error
            write(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(ShardWriter, "write", fails)
            ran = merge_fails(merge, output, run)
        assert ran.code == 4
        assert "out of memory; a smaller --chunk_size" in ran.error
        check_resumes(ran, merge, output, run, expected)

    def test_a_real_limit(self, tmp_path):
        """RLIMIT_AS, after a merge that shows that the rest of it fits."""
        shapes = {"model.up_proj.weight": (2048, 1024)}
        merge = write_models(tmp_path / "models", shapes)
        script = """
            import pathlib, resource, sys
            from interruptions import RECIPES, Merge
            from m3jax.__main__ import main
            output, base, *models = map(pathlib.Path, sys.argv[1:])
            merge = Merge(base, tuple(models))
            merge(output, RECIPES["average"], chunk_size=1 << 20)
            pages = int(open("/proc/self/statm").read().split()[0])
            limit = pages * resource.getpagesize() + (128 << 20)
            resource.setrlimit(resource.RLIMIT_AS, (limit, -1))
            large = ["--chunk_size=2097152", "--threads=64", "--overwrite"]
            no_draw = ["--config.mixup.alpha=None"]  # compiling it might fail instead
            sys.exit(main(merge.arguments(output, large + no_draw)))
        """
        paths = tmp_path / "merged", merge.base, *merge.models
        done = driver(script, *map(str, paths))
        assert done.returncode == 4, done.stderr
        assert "m3jax merge: out of memory; a smaller --chunk_size" in done.stderr
        assert "Traceback" not in done.stderr
        assert m3jax.verify(tmp_path / "merged") == []


def driver(script: str, *arguments: str, before: tuple[str, ...] = ()):
    return subprocess.run(
        [*before, sys.executable, "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(Path(__file__).parent)},
    )


class TestSpace:
    @pytest.fixture
    def sizes(self, merge, tmp_path):
        """Of the files to be written."""
        merge(tmp_path / "other", TIES)
        return [p.stat().st_size for p in (tmp_path / "other").glob("*.safetensors")]

    def test_free_space_is_checked_first(self, merge, output, run, sizes, monkeypatch):
        stats = os.statvfs(output.parent)
        few = os.statvfs_result([*stats[:3], 1, 1, *stats[5:]])
        monkeypatch.setattr(os, "statvfs", lambda path: few)
        ran = merge_fails(merge, output, run)
        assert ran.code == 4
        assert ran.error == (
            f"m3jax merge: {output.parent}: the merged model needs {sum(sizes):,} "
            f"bytes, {stats.f_frsize:,} are free; free some space or choose another "
            "--output"
        )
        assert not partial_of(output).exists()

    def test_what_is_there_is_not_needed_again(self, merge, output, monkeypatch):
        with pytest.raises(KeyboardInterrupt):
            merge(output, TIES, Observer(LATE))
        stats = os.statvfs(output.parent)
        few = os.statvfs_result([*stats[:3], 3, 3, *stats[5:]])
        monkeypatch.setattr(os, "statvfs", lambda path: few)
        assert merge(output, TIES, resume=True).resumed > 0
        with pytest.raises(SpaceError, match=r"bytes, [0-9,]+ are free"):
            merge(output.parent / "other", TIES)

    def test_a_file_size_limit_is_checked_first(self, merge, output, run, sizes):
        with file_size_limit(5000):
            ran = merge_fails(merge, output, run)
        assert ran.code == 4
        assert ran.error == (
            f"m3jax merge: {output}: needs a file of {max(sizes):,} bytes, this "
            "process may write 5,000; allow more (ulimit -f); files of safetensors get "
            "smaller with --config.max_shard_size"
        )
        assert not partial_of(output).exists()

    def test_a_file_size_limit_midway(self, merge, output, run, expected, monkeypatch):
        """The kernel's own refusal, in the middle of a file."""
        write = ShardWriter.write
        with contextlib.ExitStack() as stack:

            def limited(writer, shard, offset, values):
                if shard == 1:
                    stack.enter_context(file_size_limit(offset))
                write(writer, shard, offset, values)

            with monkeypatch.context() as patch:
                patch.setattr(ShardWriter, "write", limited)
                ran = merge_fails(merge, output, run)
        assert ran.code == 4
        assert "File too large; files may not be this large here" in ran.error
        check_resumes(ran, merge, output, run, expected)

    def test_a_full_disk(self, merge, expected, tmp_path):
        """A file system of 300 KB: too small, then filled up midway, then resumed."""
        private = ("unshare", "--mount", "--map-root-user")
        (tmp_path / "disk").mkdir()
        mount = ("mount", "-t", "tmpfs", "-o", "size=300k", "none", tmp_path / "disk")
        if (
            shutil.which("unshare") is None
            or subprocess.run(
                [*private, *mount], capture_output=True, check=False
            ).returncode
        ):
            pytest.skip("mounting a tmpfs is not permitted here")
        script = """
            import json, pathlib, sys
            import checkpoints
            from interruptions import RECIPES, Merge, Observer, partial_of
            disk, base, *models = map(pathlib.Path, sys.argv[2:])
            merge = Merge(base, tuple(models))
            output, filler = disk / "merged", disk / "filler"

            def fill(left):
                filler.unlink(missing_ok=True)
                with filler.open("wb") as file:
                    file.write(bytes((300 - left) << 10))

            class Fill(Observer):
                def advance(self, count):
                    super().advance(count)
                    if self.calls == int(sys.argv[1]):
                        try:
                            fill(0)
                        except OSError:
                            pass

            for left, observer in ((20, Observer()), (200, Fill())):
                fill(left)
                try:
                    merge(output, RECIPES["ties"], observer)
                except OSError as error:
                    print(error, *getattr(error, "__notes__", []))
                assert not output.exists()
                print(partial_of(output).exists())
            filler.unlink()
            print(merge(output, RECIPES["ties"], resume=True).resumed)
            print(json.dumps(checkpoints.digest(output)))
        """
        shell = 'mount -t tmpfs -o size=300k none "$0" && exec "$@"'
        done = driver(
            script,
            *map(str, (LATE, tmp_path / "disk", merge.base, *merge.models)),
            before=(*private, "sh", "-c", shell, str(tmp_path / "disk")),
        )
        assert done.returncode == 0, done.stderr
        early, no, midway, yes, resumed, digest = done.stdout.splitlines()
        assert "bytes, 20,480 are free" in early
        assert "No space left on device: '" in midway
        assert "--resume" in midway
        assert (no, yes) == ("False", "True")
        assert int(resumed) > 0
        assert digest == checkpoints.json.dumps(expected)


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class TestExitCodes:
    """Those that commands/cli.py documents."""

    def test_done(self, merge, output, run, expected):
        assert run(*merge.arguments(output, FLAGS)).code == 0
        assert checkpoints.digest(output) == expected
        assert run("verify", output).code == 0

    def test_different(self, merge, output, run):
        run(*merge.arguments(output, FLAGS))
        (output / "tokenizer.json").write_text("{}")
        assert run("verify", output).code == 1

    @pytest.mark.parametrize(
        "more", ["--config.method=mean", "--seed=-1", "--no_such_flag", "--threads=0"]
    )
    def test_usage(self, more, merge, output, run):
        assert merge_fails(merge, output, run, more).code == 2
        assert not partial_of(output).exists()

    def test_an_input(self, merge, output, run):
        other = dataclasses.replace(merge, base=output)
        assert run(*other.arguments(output, FLAGS)).code == 3

    def test_the_output_s_place(self, merge, output, run):
        output.mkdir()
        assert run(*merge.arguments(output, FLAGS)).code == 3

    def test_the_disk(self, merge, run):
        ran = run(*merge.arguments(Path("/proc/nothing/merged"), FLAGS))
        assert ran.code == 4
        assert "/proc/nothing" in ran.error

    @pytest.mark.parametrize(
        ("number", "code", "text"),
        [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
    )
    def test_stopped(
        self, number, code, text, merge, output, run, expected, monkeypatch
    ):
        write = ShardWriter.write
        main = threading.main_thread().ident
        calls = []
        assert main is not None

        def signals(*arguments):
            write(*arguments)
            calls.append(arguments)
            if len(calls) == 12:
                signal.pthread_kill(main, number)

        with monkeypatch.context() as patch:
            patch.setattr(ShardWriter, "write", signals)
            ran = merge_fails(merge, output, run)
        assert ran.code == code
        assert ran.error.startswith(f"m3jax merge: {text}; what is done so far")
        check_resumes(ran, merge, output, run, expected)

    def test_a_bug(self, merge, output, run, monkeypatch):
        def broken(*arguments):
            raise AssertionError("cannot happen")

        monkeypatch.setattr(ShardWriter, "write", broken)
        ran = merge_fails(merge, output, run)
        assert ran.code == 4
        assert "AssertionError: cannot happen; this is a bug: --debug shows" in ran.err

    def test_debug_shows_the_traceback(self, merge, output, run):
        other = dataclasses.replace(merge, base=Path("nowhere"))
        ran = run(*other.arguments(output, FLAGS), "--debug")
        assert ran.code == 3
        assert "Traceback (most recent call last)" in ran.err
        assert ran.err.splitlines()[-1].startswith("m3jax merge: ")
