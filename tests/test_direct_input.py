"""Reading past the page cache: the same bytes, or the ordinary way."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import checkpoints
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interruptions import RECIPES, Observer, held, write_models

from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.places import caching, direct
from m3jax.checkpoints.places.direct import BLOCK
from m3jax.checkpoints.places.files import InputFile

PREADV = os.preadv
SIZE = 5 * BLOCK + 123
CONTENT = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8).tobytes()


def opened(folder: Path) -> InputFile:
    """A file that is read past the cache; the test is skipped where that cannot be."""
    path = folder / "file"
    path.write_bytes(CONTENT)
    file = InputFile(path)
    if not file.read_directly(direct.Buffers()):
        pytest.skip("no direct reads here")
    return file


def read(file: InputFile, offset: int, count: int) -> bytes:
    return file.read(offset, count)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Every read is large enough to go past the cache."""
    monkeypatch.setattr(direct, "LEAST", 0)


@given(st.integers(0, SIZE), st.integers(0, SIZE), st.sampled_from([1, 2, 1024]))
@settings(max_examples=80, deadline=None)
def test_the_same_bytes(first: int, last: int, blocks: int):
    """Any part of a file, with buffers of any number of blocks."""
    first, last = sorted((first, last))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct, "BUFFER", blocks * BLOCK)
        with opened(Path(folder)) as file:
            assert read(file, first, last - first) == CONTENT[first:last]


@pytest.mark.parametrize("cut", [0, 1, 100, BLOCK, BLOCK + 1])
def test_short_reads(cut: int, tmp_path, monkeypatch):
    """The ordinary way reads what a direct read has left."""

    def preadv(fd, views, offset, *flags):
        if not is_direct(fd):
            return PREADV(fd, views, offset, *flags)
        return PREADV(fd, [views[0][: max(BLOCK, cut)]], offset) and cut

    with opened(tmp_path) as file:
        monkeypatch.setattr(os, "preadv", preadv)
        assert read(file, 77, 4 * BLOCK) == CONTENT[77 : 77 + 4 * BLOCK]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_refused(number: int, tmp_path, monkeypatch):
    with opened(tmp_path) as file:
        monkeypatch.setattr(os, "preadv", failing(number))
        assert read(file, 5, 3 * BLOCK) == CONTENT[5 : 5 + 3 * BLOCK]


def test_an_error_of_the_disk_names_the_file(tmp_path, monkeypatch):
    with opened(tmp_path) as file:
        monkeypatch.setattr(os, "preadv", failing(errno.EIO))
        with pytest.raises(OSError, match=os.strerror(errno.EIO)) as caught:
            read(file, 5, 3 * BLOCK)
    assert caught.value.filename == str(tmp_path / "file")


def test_a_file_that_became_shorter(tmp_path):
    with opened(tmp_path) as file:
        os.truncate(tmp_path / "file", 2 * BLOCK + 5)
        with pytest.raises(CheckpointError, match=f"ends at byte {2 * BLOCK + 5}, "):
            read(file, 0, SIZE)


def test_a_file_that_was_replaced_is_not_read_so(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    with InputFile(path) as file:
        path.unlink()
        path.write_bytes(b"another")
        assert not file.read_directly(direct.Buffers())
        assert file.read(0, SIZE) == CONTENT


def test_descriptors_are_closed(tmp_path):
    before = held()
    opened(tmp_path).close()
    assert held() == before


SHAPES = {"model.layers.0.weight": (101, 271), "model.norm.weight": (29,)}


@pytest.fixture(scope="module")
def merge(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"), SHAPES)


@pytest.mark.parametrize(
    ("room", "share", "said"),
    [
        (1 << 40, 0.0, None),
        (None, 0.0, None),
        (1000, 0.0, "reading past the page cache"),
        (1000, 0.9, "reading through the page cache (90% of them lie there)"),
        (1000, None, "reading through the page cache (unknown)"),
    ],
)
def test_merges(room, share, said, merge, tmp_path, monkeypatch):
    """Which way is chosen, is said, and makes no difference to what is written."""
    merge(tmp_path / "expected", RECIPES["ties after DARE"])
    monkeypatch.setattr(caching, "available_memory", lambda: room)
    monkeypatch.setattr(caching, "cached_share", lambda files: share)
    progress, counted = Observer(), []

    def preadv(fd, views, offset, *flags):
        counted.append(is_direct(fd))
        return PREADV(fd, views, offset, *flags)

    monkeypatch.setattr(os, "preadv", preadv)
    merge(tmp_path / "merged", RECIPES["ties after DARE"], progress)
    assert checkpoints.digest(tmp_path / "merged") == checkpoints.digest(
        tmp_path / "expected"
    )
    found = [line for line in progress.notes if line.startswith("reading ")]
    assert len(found) == (said is not None)
    if said and not found[0].endswith("here"):
        assert found[0].startswith(said)
        assert any(counted) == ("past" in said)


def test_what_is_cached(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    with InputFile(path) as file:
        file.read(0, SIZE)
        assert caching.cached_share([file]) in (1.0, None)
    assert caching.cached_share([]) == 1.0


def is_direct(fd: int) -> bool:
    flags = Path(f"/proc/self/fdinfo/{fd}").read_text().split("flags:")[1].split()[0]
    return bool(int(flags, 8) & os.O_DIRECT)


def failing(number: int):
    def preadv(fd, views, offset, *flags):
        if is_direct(fd):
            raise OSError(number, os.strerror(number))
        return PREADV(fd, views, offset, *flags)

    return preadv
