"""Direct writes: the same bytes, no page written both ways, faults, file systems."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import checkpoints
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interruptions import RECIPES, Observer, partial_of, write_models

import m3jax
from m3jax.checkpoints.folder import open_checkpoint
from m3jax.checkpoints.formats.dtypes import of_numpy
from m3jax.checkpoints.output.shards import Shard, ShardWriter
from m3jax.checkpoints.places import direct, durable
from m3jax.checkpoints.source import checksum

BLOCK = direct.BLOCK
UINT8 = of_numpy(np.dtype(np.uint8))
PWRITE = os.pwrite


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """Direct from the first whole block on, and in small pieces."""
    monkeypatch.setattr(direct, "LEAST", BLOCK)
    monkeypatch.setattr(direct, "LEAST_FILE", 0)
    monkeypatch.setattr(direct, "BUFFER", 3 * BLOCK)


@pytest.fixture
def calls(monkeypatch) -> list[tuple[bool, range]]:
    """What is written from here on: whether directly, and which bytes."""
    found = []

    def watched(fd, view, offset):
        count = PWRITE(fd, view, offset)
        found.append((is_direct(fd), range(offset, offset + count)))
        return count

    monkeypatch.setattr(os, "pwrite", watched)
    return found


def is_direct(fd: int) -> bool:
    flags = Path(f"/proc/self/fdinfo/{fd}").read_text()
    (line,) = [line for line in flags.splitlines() if line.startswith("flags:")]
    return bool(int(line.split()[1], 8) & os.O_DIRECT)


def has_direct_writes(folder: Path) -> bool:
    probe = folder / "probe"
    probe.touch()
    fd = direct._open_direct(probe, os.O_WRONLY)
    if fd >= 0:
        os.close(fd)
    probe.unlink()
    return fd >= 0


def content_of(size: int) -> np.ndarray:
    return np.random.default_rng(size).integers(0, 256, size, np.uint8)


@contextlib.contextmanager
def writers(folder: Path, size: int, count: int = 1) -> Iterator[tuple]:
    """A shard that holds `size` bytes in one tensor, and writers of it."""
    shard = Shard("file", [("tensor", UINT8, (size,))])
    place = SimpleNamespace(path=folder)
    with contextlib.ExitStack() as stack:
        found = []
        for i in range(count):
            writer = ShardWriter(place, [shard], create=i == 0)
            stack.callback(writer.close)
            found.append(writer)
        yield shard, found


def write_all(folder: Path, content: np.ndarray, cuts: list[int], count: int = 1):
    """Writes a tensor in runs that end at `cuts`, from four threads."""
    ends = sorted({*cuts, len(content)})
    runs = list(zip([0, *ends[:-1]], ends, strict=True))
    with writers(folder, len(content), count) as (shard, own):
        start = shard.entries["tensor"].start

        def write(i: int) -> None:
            first, last = runs[i]
            own[i % count].write(0, start + first, content[first:last])

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(write, range(len(runs))))
        for writer in own:
            writer.close()
        back = np.empty_like(content)
        own[0].read(0, start, back)
    np.testing.assert_array_equal(back, content)
    written = (folder / "file").read_bytes()
    assert written == shard.header + content.tobytes()


sizes = st.integers(1, 40 * BLOCK)


@st.composite
def contents_and_cuts(draw) -> tuple[int, list[int]]:
    size = draw(sizes)
    near = st.builds(
        lambda block, byte: min(size, max(1, block * BLOCK + byte)),
        st.integers(0, size // BLOCK),
        st.integers(-80, 80),
    )
    return size, draw(st.lists(near | st.integers(1, size), max_size=12))


@given(contents_and_cuts(), st.integers(1, 3))
@settings(max_examples=60)
def test_the_same_bytes(example: tuple[int, list[int]], count: int):
    """Any sizes and offsets, one writer or several of the same file."""
    size, cuts = example
    with tempfile.TemporaryDirectory() as folder:
        write_all(Path(folder), content_of(size), cuts, count)


@given(contents_and_cuts())
@settings(max_examples=20)
def test_short_writes(example: tuple[int, list[int]]):
    """A direct write that ends anywhere is ended by the ordinary way."""
    size, cuts = example
    rng = np.random.default_rng(size)

    def short(fd, view, offset):
        few = len(view) if len(view) < 2 else int(rng.integers(1, len(view) + 1))
        if is_direct(fd):
            few = max(512, few // 512 * 512)
        return PWRITE(fd, view[:few], offset)

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(os, "pwrite", short)
        write_all(Path(folder), content_of(size), cuts)


def test_no_page_is_written_both_ways(tmp_path, calls):
    if not has_direct_writes(tmp_path):
        pytest.skip("no direct writes here")
    content = content_of(64 * BLOCK + 99)
    cuts = [1, 5 * BLOCK - 7, 9 * BLOCK, 9 * BLOCK + 1, 30 * BLOCK + 2000]
    write_all(tmp_path, content, cuts, count=2)
    pages = {
        how: {
            page
            for was_direct, span in calls
            if was_direct is how and span
            for page in range(span.start // BLOCK, -(-span.stop // BLOCK))
        }
        for how in (True, False)
    }
    assert len(pages[True]) > 50
    assert not pages[True] & pages[False]
    # Nobody writes bytes that are not its own.
    assert sum(len(span) for _, span in calls) == (tmp_path / "file").stat().st_size


def test_small_writes_and_files_take_the_ordinary_way(tmp_path, calls, monkeypatch):
    monkeypatch.setattr(direct, "LEAST", 8 * BLOCK)
    write_all(tmp_path, content_of(64 * BLOCK), [8 * BLOCK, 20 * BLOCK])
    if has_direct_writes(tmp_path):
        sizes = [len(span) for was_direct, span in calls if was_direct]
        assert sum(sizes) in range(50 * BLOCK, 56 * BLOCK)
    calls.clear()
    monkeypatch.setattr(direct, "LEAST_FILE", 1 << 30)
    write_all(tmp_path, content_of(64 * BLOCK), [8 * BLOCK, 20 * BLOCK])
    assert not any(was_direct for was_direct, _ in calls)


class TestRefused:
    """File systems without direct writes."""

    @pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="Linux has /dev/shm")
    def test_in_memory(self):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            write_all(Path(folder), content_of(50 * BLOCK + 3), [7 * BLOCK + 5])

    @pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
    def test_on_opening(self, number, tmp_path, calls, monkeypatch):
        monkeypatch.setattr(os, "open", refusing_open(number))
        write_all(tmp_path, content_of(50 * BLOCK + 3), [7 * BLOCK + 5])
        assert not any(was_direct for was_direct, _ in calls)

    @pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
    @pytest.mark.parametrize("after", [0, 3])
    def test_at_a_write(self, number, after, tmp_path, monkeypatch):
        refused = []

        def pwrite(fd, view, offset):
            if is_direct(fd):
                refused.append(offset)
                if len(refused) > after:
                    raise OSError(number, os.strerror(number))
            return PWRITE(fd, view, offset)

        monkeypatch.setattr(os, "pwrite", pwrite)
        with writers(tmp_path, 50 * BLOCK) as (shard, (writer,)):
            content, start = content_of(50 * BLOCK), shard.entries["tensor"].start
            for first in range(0, len(content), 10 * BLOCK):
                part = content[first : first + 10 * BLOCK]
                writer.write(0, start + first, part)
        assert (tmp_path / "file").read_bytes()[start:] == content.tobytes()
        if has_direct_writes(tmp_path):
            assert len(refused) == after + 1  # it is asked no more

    def test_on_a_mac(self, tmp_path, monkeypatch):
        asked = []
        monkeypatch.delattr(os, "O_DIRECT")
        monkeypatch.setattr(direct.fcntl, "F_NOCACHE", 48, raising=False)
        monkeypatch.setattr(direct.fcntl, "fcntl", lambda *what: asked.append(what))
        write_all(tmp_path, content_of(50 * BLOCK + 3), [7 * BLOCK + 5])
        assert [what[1:] for what in asked] == [(48, 1)]

    def test_nowhere(self, tmp_path, monkeypatch):
        monkeypatch.delattr(os, "O_DIRECT")
        write_all(tmp_path, content_of(50 * BLOCK + 3), [7 * BLOCK + 5])


def refusing_open(number: int):
    real = os.open

    def opened(path, flags, *more, **named):
        if flags & os.O_DIRECT:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, flags, *more, **named)

    return opened


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_an_error_of_the_disk_names_the_file(number, tmp_path, monkeypatch):
    if not has_direct_writes(tmp_path):
        pytest.skip("no direct writes here")
    monkeypatch.setattr(os, "pwrite", failing_pwrite(number, after=1))
    with (
        pytest.raises(OSError) as caught,
        writers(tmp_path, 50 * BLOCK) as (shard, (writer,)),
    ):
        writer.write(0, shard.entries["tensor"].start, content_of(50 * BLOCK))
    assert caught.value.errno == number
    assert caught.value.filename == str(tmp_path / "file")


def failing_pwrite(number: int, after: int):
    """The real one, but for direct writes after the first few."""
    count = []

    def pwrite(fd, view, offset):
        if is_direct(fd):
            count.append(offset)
            if len(count) > after:
                raise OSError(number, os.strerror(number))
        return PWRITE(fd, view, offset)

    return pwrite


def test_descriptors_are_closed(tmp_path):
    before = sorted(Path("/proc/self/fd").iterdir())
    with writers(tmp_path, 50 * BLOCK) as (_, (writer,)):
        writer.close()
    assert sorted(Path("/proc/self/fd").iterdir()) == before


SHAPES = {
    "model.embed_tokens.weight": (997, 29),
    "model.layers.0.norm.weight": (1025,),
    "model.layers.0.up_proj.weight": (101, 271),
    "model.layers.1.up_proj.weight": (101, 271),
    "model.norm.weight": (29,),
}
SMALL = {"chunk_size": 8192}


@pytest.fixture(scope="module")
def merge(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"), SHAPES)


@pytest.fixture(scope="module")
def ordinary(merge, tmp_path_factory):
    """What is written the ordinary way, and in how many steps."""
    output = tmp_path_factory.mktemp("expected") / "merged"
    observer = Observer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct, "LEAST_FILE", 1 << 40)
        merge(output, RECIPES["ties after DARE"], observer, **SMALL)
    return checkpoints.digest(output), observer.calls


@pytest.fixture
def expected(ordinary):
    return ordinary[0]


class TestMerges:
    """Whole merges that write directly."""

    def test_bytes(self, merge, expected, tmp_path, calls):
        merge(tmp_path / "merged", RECIPES["ties after DARE"], **SMALL)
        assert checkpoints.digest(tmp_path / "merged") == expected
        assert m3jax.verify(tmp_path / "merged") == []
        if has_direct_writes(tmp_path):
            assert sum(len(span) for was_direct, span in calls if was_direct) > 100_000

    @pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
    def test_a_failed_one_goes_on(self, number, merge, expected, tmp_path, monkeypatch):
        if not has_direct_writes(tmp_path):
            pytest.skip("no direct writes here")
        output, recipe = tmp_path / "merged", RECIPES["ties after DARE"]
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", failing_pwrite(number, after=6))
            with pytest.raises(OSError, match=os.strerror(number)):
                merge(output, recipe, **SMALL)
        assert not output.exists()
        assert merge(output, recipe, resume=True, **SMALL).resumed > 0
        assert checkpoints.digest(output) == expected

    def test_journalled_is_written(self, merge, tmp_path, monkeypatch):
        """Whatever the journal says of a tensor, its file holds those bytes by then."""
        output, seen = tmp_path / "merged", []
        append, files = durable.append_lines, partial_of(output) / "checkpoint"

        def slow(fd, view, offset):
            time.sleep(0.002 * is_direct(fd))
            return PWRITE(fd, view, offset)

        def checked(path, entries):
            for entry in entries:
                if "tensor" in entry:
                    (file,) = files.glob("*.safetensors")
                    with open_checkpoint(str(file)) as written:
                        found = checksum(written.tensors[entry["tensor"]])
                    assert found == entry["checksums"][""]
                    seen.append(entry["tensor"])
            append(path, entries)

        monkeypatch.setattr(os, "pwrite", slow)
        monkeypatch.setattr(durable, "append_lines", checked)
        merge(output, RECIPES["ties after DARE"], **SMALL)
        assert sorted(seen) == sorted(SHAPES)

    @pytest.mark.parametrize("first", [True, False])
    def test_either_way_goes_on_with_the_other(
        self, first, merge, ordinary, tmp_path, monkeypatch
    ):
        expected, steps = ordinary
        output, recipe = tmp_path / "merged", RECIPES["ties after DARE"]
        for is_first in (True, False):
            least = 0 if first is is_first else 1 << 40
            monkeypatch.setattr(direct, "LEAST_FILE", least)
            if is_first:
                with pytest.raises(KeyboardInterrupt):
                    merge(output, recipe, Observer(steps - 5), **SMALL)
                assert partial_of(output).exists()
            else:
                assert merge(output, recipe, resume=True, **SMALL).resumed > 0
        assert checkpoints.digest(output) == expected

    @pytest.mark.parametrize("lines", [2, 4])
    def test_a_killed_one_goes_on(self, lines, merge, expected, tmp_path):
        """SIGKILL when so many lines were journalled."""
        output = tmp_path / "merged"
        script = """
            import os, signal, sys
            sys.path.insert(0, sys.argv[1])
            from pathlib import Path
            from interruptions import RECIPES, Merge
            from m3jax.checkpoints.places import direct, durable
            direct.LEAST, direct.LEAST_FILE = direct.BLOCK, 0
            output, base, *models = map(Path, sys.argv[3:])
            append, left = durable.append_lines, [int(sys.argv[2])]

            def counted(*arguments):
                append(*arguments)
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)

            durable.append_lines = counted
            merge = Merge(base, tuple(models))
            merge(output, RECIPES["ties after DARE"], chunk_size=8192)
        """
        tests = Path(__file__).parent
        arguments = (tests, lines, output, merge.base, *merge.models)
        killed = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
            check=False,
        )
        assert killed.returncode == -signal.SIGKILL
        recipe = RECIPES["ties after DARE"]
        resumed = merge(output, recipe, resume=True, **SMALL).resumed
        assert resumed > 0 or lines == 2
        assert checkpoints.digest(output) == expected

    def test_orbax(self, merge, tmp_path, calls):
        recipe, how = RECIPES["average"], {**SMALL, "output_format": "orbax"}
        merge(tmp_path / "merged", recipe, **how)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(direct, "LEAST_FILE", 1 << 40)
            merge(tmp_path / "ordinary", recipe, **how)
        both = [m3jax.load(tmp_path / own) for own in ("merged", "ordinary")]
        jax.tree.map(np.testing.assert_array_equal, *both)


def test_processes_write_one_file(tmp_path):
    """Two processes write every other run, at offsets within each other's blocks."""
    size, runs, count = 200 * BLOCK + 17, 40, 2
    script = """
        import sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        import test_direct
        from test_direct import *
        folder, index = Path(sys.argv[2]), int(sys.argv[3])
        direct.LEAST, direct.LEAST_FILE = BLOCK, 0
        size, runs, count = map(int, sys.argv[4:])
        content = content_of(size)
        place = SimpleNamespace(path=folder)
        shard = Shard("file", [("tensor", UINT8, (size,))])
        writer = ShardWriter(place, [shard], create=False)
        step = -(-size // runs)
        for i in range(index, runs, count):
            first = i * step
            part = content[first : first + step]
            writer.write(0, shard.entries["tensor"].start + first, part)
        writer.sync()
        writer.close()
    """
    script = textwrap.dedent(script)
    folders, numbers = (Path(__file__).parent, tmp_path), (size, runs, count)
    with writers(tmp_path, size) as (shard, _):
        children = [
            subprocess.Popen(
                [sys.executable, "-c", script, *map(str, (*folders, i, *numbers))]
            )
            for i in range(count)
        ]
        assert [child.wait() for child in children] == [0] * count
    written = (tmp_path / "file").read_bytes()
    assert written == shard.header + content_of(size).tobytes()
