"""Flax's msgpack files: read as flax.serialization restores them, with suspicion."""

from __future__ import annotations

import contextlib
import math
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checkpoints
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from command_line import Run
from flax import serialization
from fuzz.targets import check_msgpack
from hypothesis import given
from hypothesis import strategies as st

import m3jax
from m3jax.checkpoints.folder import open_checkpoint
from m3jax.checkpoints.formats.dtypes import DTYPES
from m3jax.checkpoints.formats.flax_msgpack import read_tensors
from m3jax.checkpoints.formats.tree import flatten, nest
from m3jax.checkpoints.source import read_whole

TREE = {
    "params": {
        "dense": {
            "kernel": np.arange(24, dtype=np.float32).reshape(4, 6),
            "bias": jnp.arange(3, dtype=jnp.bfloat16),
        },
        "scale": np.float32(1.5),
        "empty": np.zeros((0, 3), np.float16),
        "wide": np.arange(300, dtype=np.uint8).reshape(2, 150),
    },
    "step": 70000,
    "minus": -3,
    "rate": 0.5,
    "big": 2**63 + 1,
    "on": True,
    "nothing": None,
    "state": {},
    "list": [np.ones(2, np.int32), np.zeros(1, bool)],
}


def write(path: Path, tree: Any) -> Path:
    path.write_bytes(serialization.to_bytes(tree))
    return path


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    with open_checkpoint(str(path), mergeable=False) as opened:
        assert opened.format == "msgpack"
        return {name: read_whole(source) for name, source in opened.stored.items()}


def check(path: Path) -> None:
    """Against what Flax itself restores."""
    expected, _ = flatten(serialization.msgpack_restore(path.read_bytes()))
    found = tensors_of(path)
    assert set(found) == set(expected)
    for name, wanted in expected.items():
        np.testing.assert_array_equal(found[name], wanted, err_msg=name)
        if hasattr(wanted, "dtype"):
            assert found[name].dtype == wanted.dtype
            assert found[name].shape == wanted.shape


def test_as_flax_restores_it(tmp_path: Path):
    check(write(tmp_path / "x.msgpack", TREE))


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype(code: str, tmp_path: Path):
    values = np.arange(6).astype(DTYPES[code].numpy).reshape(2, 3)
    path = write(tmp_path / "x.msgpack", {"a": values, "number": values[0, 1]})
    found = tensors_of(path)
    assert found["a"].dtype == found["number"].dtype == values.dtype
    assert found["a"].tobytes() == values.tobytes()


@pytest.mark.parametrize("limit", [40, 7, 95])
def test_arrays_in_parts(limit: int, tmp_path: Path, monkeypatch):
    """As those of more than 1 GiB are."""
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", limit)
    path = write(tmp_path / "x.msgpack", TREE)
    assert b"__msgpack_chunked_array__" in path.read_bytes()
    check(path)
    with open_checkpoint(str(path)) as opened:
        source = opened.tensors["params.dense.kernel"]
        for start in range(24):
            for count in range(25 - start):
                out = np.empty(count, np.float32)
                source.read_into(out, start)
                assert out.tolist() == list(range(start, start + count))


@pytest.mark.parametrize("parts", [1, 4])
def test_memory(parts: int, tmp_path: Path):
    """As is said while it is opened, and once the file from then on."""
    arrays = {str(i): np.zeros(10**6 // parts) for i in range(parts)}
    path = write(tmp_path / "x.msgpack", arrays)
    size = path.stat().st_size
    with traced() as peak, open_checkpoint(str(path)) as opened:
        assert peak() <= opened.cache_bytes + 500_000 == 4 * size + 500_000
        assert tracemalloc.get_traced_memory()[0] <= size + 500_000


@contextlib.contextmanager
def traced() -> Iterator[Callable[[], int]]:
    tracemalloc.start()
    try:
        yield lambda: tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_merges_as_safetensors_do(tmp_path: Path, run: Run):
    base = checkpoints.random_model(0, dtype=checkpoints.BFLOAT16)
    models = [
        base,
        *(
            checkpoints.random_model(i, dtype=checkpoints.BFLOAT16, base=base)
            for i in (1, 2)
        ),
    ]
    for name, tensors in zip(("base", "a", "b"), models, strict=True):
        checkpoints.write(tmp_path / name, tensors, {"model_type": "llama"})
        (tmp_path / f"{name}_flax").mkdir()
        write(tmp_path / f"{name}_flax" / "flax_model.msgpack", nest(tensors))
    outputs = []
    for kind in ("", "_flax"):
        out = tmp_path / f"out{kind}"
        ran = run(
            "merge",
            f"--base={tmp_path}/base{kind}",
            f"--models={tmp_path}/a{kind},{tmp_path}/b{kind}",
            f"--output={out}",
            "--config=ties_m3_dare",
        )
        assert ran.code == 0, ran.err
        outputs.append((out / "model.safetensors").read_bytes())
    assert outputs[0] == outputs[1]
    ran = run("inspect", tmp_path / "a_flax")
    assert "folder with Flax's msgpack" in ran.out and "4,0" not in ran.err
    ran = run("diff", tmp_path / "a", tmp_path / "a_flax", "--exit_code")
    assert ran.code == 0
    loaded = m3jax.load(tmp_path / "b_flax" / "flax_model.msgpack")
    assert loaded["model"]["norm"]["weight"].dtype == jnp.bfloat16


def array(shape: Any, dtype: Any, content: Any) -> msgpack.ExtType:
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, content)))


FOUR = bytes(4)
ONE = array([1], "float32", FOUR)
TWO = array([1], "int32", FOUR)
PARTS = "__msgpack_chunked_array__"


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"x": array([2], "float32", FOUR)},
            "at 'x' has 4 bytes for float32 of shape [2]",
        ),
        ({"x": array([2**62, 2**62], "float32", FOUR)}, "at 'x' has 4 bytes"),
        ({"x": array([-1], "float32", FOUR)}, "at 'x' has 4 bytes"),
        ({"x": array([1.0], "float32", FOUR)}, "at 'x' has 4 bytes"),
        ({"x": array([math.nan], "float32", FOUR)}, "at 'x' has 4 bytes"),
        ({"x": array([True], "float32", FOUR)}, "at 'x' has 4 bytes"),
        ({"x": array([1], "object", FOUR)}, "at 'x' has dtype b'object'; known: "),
        ({"x": array([1], "float32" * 2000, FOUR)}, "has dtype b'float32float32float"),
        ({"x": array([1], "(9999999999,)f4", FOUR)}, "at 'x' has dtype"),
        ({"x": array([1], "f4,f4", bytes(8))}, "at 'x' has dtype"),
        ({"x": array([1], None, bytes(8))}, "without shape, dtype and bytes"),
        ({"x": array([1], [["a", "f4"]], FOUR)}, "without shape, dtype and bytes"),
        ({"x": array([1], {"names": []}, FOUR)}, "max_map_len"),
        ({"x": array([1] * 65, "float32", FOUR)}, "65 exceeds max_array_len(64)"),
        ({"x": array("no", "float32", FOUR)}, "without shape, dtype and bytes"),
        ({"x": array([1], "float32", 7)}, "without shape, dtype and bytes"),
        ({"x": msgpack.ExtType(1, b"\x92\x90\x90")}, "without shape, dtype and bytes"),
        ({"x": msgpack.ExtType(2, b"\x90")}, "no array"),
        ({"x": "text"}, "at 'x' has what is no array"),
        ({"x": [1]}, "at 'x' has what is no array"),
        ({"x": []}, "at 'x' has what is no array"),
        ({"x": msgpack.Timestamp(1)}, "at 'x' has what is no array"),
        ({"x": {PARTS: True}}, "that make no array"),
        ({"x": {PARTS: 1, "shape": 3, "chunks": {"0": ONE}}}, "that make no array"),
        ({"x": {PARTS: 1, "shape": {"0": -1}, "chunks": {"0": ONE}}}, "make no array"),
        ({"x": {PARTS: 1, "shape": {"1": 1}, "chunks": {"0": ONE}}}, "make no array"),
        ({"x": {PARTS: 1, "shape": {}, "chunks": {"0": {}}}}, "make no array"),
        ({"x": {PARTS: 1, "shape": {"0": 2}, "chunks": {"0": ONE, "1": TWO}}}, "make"),
        ({"x": {PARTS: True, "shape": {"0": 1}, "chunks": {}}}, "that make no array"),
        (
            {
                "x": {
                    PARTS: True,
                    "shape": {"0": 2},
                    "chunks": {"0": ONE},
                }
            },
            "has parts that make no array ('cannot reshape array of size 1",
        ),
        ({"a": {"b": 1}, "a.b": 2}, "two tensors named 'a.b'"),
        ({"a\n": 1}, "rename it"),
    ],
)
def test_hostile_trees(tree: Any, message: str, tmp_path: Path):
    path = tmp_path / "x.msgpack"
    path.write_bytes(msgpack.packb(tree))
    with pytest.raises(m3jax.CheckpointError) as caught:
        tensors_of(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "ends at byte 0 in the middle"),
        (b"\x81\xa1x\xc9\xff\xff\xff\xff\x01", "exceeds max_ext_len"),
        (b"\xdf\xff\xff\xff\xff", "ends at byte 5 in the middle"),
        (b"\x81\xa1x\xc6\xff\xff\xff\xff", "ends at byte 8 in the middle of 'x'"),
        (b"\x81\xa1x\xc4\x01\0", "at 'x' has what is no array"),
        (b"\x81\xa1x\xde\x00", "ends at byte 5 in the middle of 'x'"),
        (b"\x80\x80", "has 1 bytes behind its end"),
        (b"\x82\xa1x\x01\xa1x\x02", "has the key 'x' twice"),
        (b"\x81\xa1x" * 100 + b"\x80", "nested too deeply"),
        (b"\x81\xa2\xff\xfe\x01", "UnicodeDecodeError"),
        (b"\x81\x01\x01", "has the key 1 which is no text"),
        (b"\x81\x90\x01", "has the key [] which is no text"),
        (b"\x07", "has a tensor named ''"),
        (b"\xc1", "no array"),
    ],
)
def test_hostile_bytes(content: bytes, message: str, tmp_path: Path):
    path = tmp_path / "x.msgpack"
    path.write_bytes(content)
    with pytest.raises(m3jax.CheckpointError) as caught:
        tensors_of(path)
    assert message in str(caught.value)


@given(data=st.data())
def test_any_bytes_give_one_line_or_tensors(data: st.DataObject):
    """A file that was changed or cut off anywhere raises nothing else."""
    content = bytearray(serialization.to_bytes(TREE))
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    check_msgpack(bytes(content[: data.draw(st.integers(1, len(content)))]))


# Lists that say they are long, in each other; maps, likewise; and many small ones.
@pytest.mark.parametrize(
    "head",
    [b"\xdd\x00\x0f\xff\xff", b"\x81\xa1x\xdd\x00\x0f\xff\xff", b"\xdf\0\7\xff\xff"],
)
def test_no_memory_on_a_header_s_word(head: bytes, tmp_path: Path):
    with traced() as peak:
        check_msgpack(head * 500 + bytes(2**20))
        inner = msgpack.packb([head * 500, "f4", bytes(9)])[:-9]
        check_msgpack(b"\x81\xa1x" + msgpack.packb(msgpack.ExtType(1, inner)))
        check_msgpack(b"\x81\xa1x" + msgpack.packb(msgpack.ExtType(1, head * 500)))
        assert peak() < 2**23


def test_seeds_of_the_fuzzer():
    for name in ("parts", "plain"):
        path = Path(__file__).parent / "fuzz" / "corpus" / "msgpack" / name
        assert check_msgpack(path.read_bytes())


def test_two_files_are_not_one(tmp_path: Path, run: Run):
    for name in ("a.msgpack", "b.msgpack"):
        write(tmp_path / name, TREE)
    assert run("inspect", tmp_path).code == 3
    assert run("inspect", tmp_path / "a.msgpack").code == 0


def test_read_tensors_leaves_the_file_open(tmp_path: Path):
    from m3jax.checkpoints.places.files import InputFile

    with InputFile(write(tmp_path / "x.msgpack", {"a": np.arange(3)})) as file:
        assert read_whole(read_tensors(file)["a"]).tolist() == [0, 1, 2]
