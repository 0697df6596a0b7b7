"""Runs of a tensor's elements, plain and derived, against NumPy slices."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
from checkpoints import encode
from hypothesis import given
from hypothesis import strategies as st

import m3jax
from m3jax.checkpoints import source as sources
from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.formats.dtypes import DTYPES, FLOAT32, of_numpy
from m3jax.checkpoints.formats.safetensors import header_of, layout
from m3jax.checkpoints.places.files import InputFile
from m3jax.checkpoints.source import (
    Converted,
    FileTensor,
    FirstRows,
    WithMeanRows,
    read_whole,
)

FLOATS = [code for code, dtype in DTYPES.items() if dtype.kind == "float"]
shapes = st.lists(st.integers(0, 6), max_size=3).map(tuple)


@dataclasses.dataclass(frozen=True)
class InMemory:
    """A source that is an array."""

    array: np.ndarray

    @property
    def dtype(self):
        return of_numpy(self.array.dtype)

    @property
    def shape(self):
        return self.array.shape

    output_dtype = dtype

    def read_into(self, out, start):
        assert out.dtype == self.array.dtype
        run = self.array.reshape(-1)[start : start + len(out)]
        assert len(run) == len(out), "reads beyond the end"
        out[:] = run


def array_of(dtype, shape, data):
    """An array of random bits (of 0 and 1 for bool)."""
    size = int(np.prod(shape))
    content = data.draw(
        st.binary(min_size=size * dtype.itemsize, max_size=size * dtype.itemsize)
    )
    if dtype == np.bool_:
        content = bytes(byte & 1 for byte in content)
    return np.frombuffer(content, dtype).reshape(shape)


def check_run(source, expected, data):
    """Any run of elements is that of `expected`, bit by bit, and no byte more."""
    start = data.draw(st.integers(0, expected.size), label="start")
    count = data.draw(st.integers(0, expected.size - start), label="count")
    buffer = np.full((count + 2) * expected.dtype.itemsize, 0xAB, np.uint8)
    out = buffer.view(expected.dtype)[1:-1]
    source.read_into(out, start)
    assert out.tobytes() == expected.reshape(-1)[start : start + count].tobytes()
    edge = b"\xab" * expected.dtype.itemsize
    assert buffer.tobytes().startswith(edge)
    assert buffer.tobytes().endswith(edge)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that small tensors take several."""
    monkeypatch.setattr(sources, "_BLOCK", 5)


@pytest.mark.parametrize("code", DTYPES)
@given(shape=shapes, data=st.data())
def test_a_tensor_of_a_file(code, shape, data):
    array = array_of(DTYPES[code].numpy, shape, data)
    other = np.arange(3, dtype=np.uint8)
    header, entries = layout([("x", DTYPES[code], shape), ("y", DTYPES["U8"], (3,))])
    content = bytearray(max(entry.stop for entry in entries.values()))
    content[: len(header)] = header
    for name, values in (("x", array), ("y", other)):
        content[entries[name].start : entries[name].stop] = values.tobytes()
    fd = os.memfd_create("file")
    try:
        os.pwrite(fd, content, 0)
        with InputFile(Path(f"/proc/self/fd/{fd}")) as file:
            tensors = header_of(file).tensors
            check_run(FileTensor(file, tensors["x"]), array, data)
            check_run(FileTensor(file, tensors["y"]), other, data)
            whole = read_whole(FileTensor(file, tensors["x"]))
    finally:
        os.close(fd)
    assert whole.shape == shape
    assert whole.tobytes() == array.tobytes()


@pytest.mark.parametrize("code", DTYPES)
@given(shape=shapes.filter(len), rows=st.integers(0, 6), data=st.data())
def test_first_rows(code, shape, rows, data):
    array = array_of(DTYPES[code].numpy, shape, data)
    rows = min(rows, shape[0])
    source = FirstRows(InMemory(array), rows)
    assert source.shape == (rows, *shape[1:])
    assert source.dtype.code == source.output_dtype.code == code
    check_run(source, array[:rows], data)


@pytest.mark.parametrize("code", FLOATS)
@given(
    rows=st.integers(1, 12),
    rest=st.lists(st.integers(0, 4), max_size=2).map(tuple),
    more=st.integers(0, 5),
    data=st.data(),
)
def test_mean_rows(code, rows, rest, more, data):
    # Eighths, so that their sums are exact and the mean is rounded once.
    size = rows * int(np.prod(rest))
    eighths = data.draw(st.lists(st.integers(-800, 800), min_size=size, max_size=size))
    array = (np.array(eighths, np.float64) / 8).astype(DTYPES[code].numpy)
    array = array.reshape(rows, *rest)
    mean = array.astype(np.float64).mean(axis=0, keepdims=True).astype(array.dtype)
    source = WithMeanRows(InMemory(array), rows + more)
    assert source.shape == (rows + more, *rest)
    assert source.dtype.code == source.output_dtype.code == code
    check_run(source, np.concatenate([array, *[mean] * more]), data)


def test_the_mean_of_many_rows_is_that_of_float64(monkeypatch):
    """And not that of a running sum in bfloat16, which stops growing at 256."""
    monkeypatch.undo()
    array = np.full((32_000, 40), 1.0, DTYPES["BF16"].numpy)
    array[::3] = 1.5
    source = WithMeanRows(InMemory(array), 32_001)
    expected = array.astype(np.float64).mean(axis=0).astype(array.dtype)
    assert source.mean.tobytes() == expected.tobytes()
    assert source.mean[0] == array.dtype.type(7 / 6)


def test_a_mean_of_infinities_is_left_to_the_check_of_values():
    array = np.array([[np.inf, np.nan, 1], [-np.inf, 1, 3]], np.float32)
    mean = WithMeanRows(InMemory(array), 3).mean
    np.testing.assert_array_equal(mean, [np.nan, np.nan, 2])


def test_integers_have_no_mean(tmp_path):
    for name, rows in (("a", 2), ("b", 3)):
        (tmp_path / name).mkdir()
        weights = encode({"model.embed_tokens.weight": np.ones((rows, 2), np.int32)})
        (tmp_path / name / "model.safetensors").write_bytes(weights)
    recipe = m3jax.Recipe(vocabulary="mean")
    with pytest.raises(CheckpointError, match=r"has shape \[2, 2\] in .*, \[3, 2\] in"):
        m3jax.merge(None, [tmp_path / "a", tmp_path / "b"], tmp_path / "out", recipe)


@pytest.mark.parametrize("code", FLOATS)
@given(shape=shapes, data=st.data())
def test_float32(code, shape, data):
    array = array_of(DTYPES[code].numpy, shape, data)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = array.astype(np.float32)
    source = Converted(InMemory(array), FLOAT32)
    assert (source.dtype.code, source.output_dtype.code) == ("F32", code)
    assert source.shape == shape
    check_run(source, expected, data)


def test_float64_is_rounded_once_to_nearest_even():
    exact = np.array([1 + 2**-24, 1 + 3 * 2**-24, 1e300, -1e-50, 2**-149], np.float64)
    out = np.empty(5, np.float32)
    Converted(InMemory(exact), FLOAT32).read_into(out, 0)
    np.testing.assert_array_equal(out, [1, 1 + 2**-22, np.inf, -0.0, 2**-149])


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(range(100)))
    with InputFile(path) as file:
        yield file


def test_a_system_that_reads_in_small_pieces(file, monkeypatch):
    read = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda fd, out, offset: read(fd, [out[0][:7]], offset)
    )
    assert file.read(10, 80) == bytes(range(10, 90))


def test_a_file_that_becomes_shorter(file):
    os.truncate(file.path, 50)
    with pytest.raises(
        CheckpointError, match=r"ends at byte 50, 10 bytes short; .*fetch"
    ):
        file.read(20, 40)
    with pytest.raises(
        CheckpointError, match=r"was changed while it was read; merge ag"
    ):
        file.check_unchanged()


def test_a_file_that_changes(file):
    file.check_unchanged()
    assert file.size == 100
    os.utime(file.path, ns=(1, 1))
    assert file.version > 1
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        file.check_unchanged()


def test_a_file_that_is_replaced_is_read_on(file):
    """The old one stays as long as it is open."""
    new = file.path.with_name("new")
    new.write_bytes(b"new")
    new.rename(file.path)
    assert file.read(0, 100) == bytes(range(100))


def test_a_read_error_names_the_file(file, monkeypatch):
    def fails(*arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(OSError, match="Input/output error") as caught:
        file.read(0, 1)
    assert caught.value.filename == str(file.path)


def test_a_closed_file_cannot_be_read_nor_closed_twice(file):
    file.close()
    other = os.open(file.path, os.O_RDONLY)  # takes the number of the closed one
    file.close()
    os.fstat(other)
    with pytest.raises(OSError, match="Bad file descriptor"):
        file.read(0, 1)
    os.close(other)
