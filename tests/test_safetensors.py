"""The header's reader and writer, against the safetensors library."""

import ctypes
import json
import math
import os
import re
import time
import tracemalloc

import numpy as np
import pytest
import safetensors
from attacks.headers import DAMAGED, STRICTER, VALID
from fuzz.targets import check_header, check_safetensors, framed
from hypothesis import example, given, settings
from hypothesis import strategies as st

from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.formats.dtypes import DTYPES, of_numpy
from m3jax.checkpoints.formats.safetensors import (
    MAX_HEADER,
    layout,
    parse_header,
    read_header,
)

names = st.text(max_size=40).filter(
    lambda name: name.isprintable() and name != "__metadata__"
)
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
tensors = st.dictionaries(
    names, st.tuples(st.sampled_from(sorted(DTYPES)), shapes), max_size=6
)
# The library writes several keys in an order of its own, see `layout`.
metadata = st.none() | st.dictionaries(
    st.text(max_size=20), st.text(max_size=20), max_size=1
)


def library_bytes(tensors, metadata):
    """What `safetensors.serialize` writes, and the data that it was given."""
    specs, data = {}, {}
    for i, (name, (code, shape)) in enumerate(tensors.items()):
        size = math.prod(shape) * DTYPES[code].itemsize
        data[name] = ctypes.create_string_buffer(bytes([i + 1]) * size, max(size, 1))
        specs[name] = safetensors.TensorSpec(
            dtype=DTYPES[code].numpy.name,
            shape=shape,
            data_ptr=ctypes.addressof(data[name]),
            data_len=size,
        )
    return bytes(safetensors.serialize(specs, metadata)), {
        name: bytes([i + 1]) * (math.prod(shape) * DTYPES[code].itemsize)
        for i, (name, (code, shape)) in enumerate(tensors.items())
    }


@given(tensors, metadata)
@example({}, None)
@example({}, {"format": "pt"})
@example(
    {'q"\\/': ("BF16", (2, 3)), "é😀": ("U8", ()), "ﬀ": ("U8", (0,))},
    {"a": "\n\x01\x7f"},
)
def test_layout_is_what_the_library_writes(tensors, metadata):
    if not tensors and metadata == {}:
        return  # safetensors 0.8 writes no valid JSON then: {},"__metadata__":{}}
    expected, data = library_bytes(tensors, metadata)
    header, entries = layout(
        ((name, DTYPES[code], shape) for name, (code, shape) in tensors.items()),
        metadata,
    )
    content = bytearray(len(expected))
    content[: len(header)] = header
    for name, entry in entries.items():
        content[entry.start : entry.stop] = data[name]
    assert bytes(content) == expected


@given(tensors, metadata)
def test_reads_what_was_written(tensors, metadata):
    header, entries = layout(
        ((name, DTYPES[code], shape) for name, (code, shape) in tensors.items()),
        metadata,
    )
    size = max([len(header), *(entry.stop for entry in entries.values())])
    read = check_safetensors(header.ljust(size, b"\0"))
    assert read is not None
    assert read.tensors == entries
    assert read.metadata == (metadata or {})
    assert read.file_size == size


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "\u202e", "n" * 5000, "\ud800"])
def test_writes_no_name_that_it_does_not_read(name):
    with pytest.raises(CheckpointError, match="cannot be written: names are"):
        layout([(name, DTYPES["F32"], (1,))])


def test_writes_no_name_twice():
    for names in (["a", "a"], ["__metadata__"]):
        with pytest.raises(
            CheckpointError, match="cannot be written: names are unique"
        ):
            layout([(name, DTYPES["F32"], (1,)) for name in names])


def test_writes_no_header_that_it_does_not_read(monkeypatch):
    monkeypatch.setattr("m3jax.checkpoints.formats.safetensors.MAX_HEADER", 64)
    with pytest.raises(CheckpointError, match="limit is 64; write several files"):
        layout([("n" * 64, DTYPES["F32"], (1,))])


@pytest.mark.parametrize("case", VALID)
def test_valid_files_are_read(case):
    assert check_safetensors(VALID[case]) is not None


@pytest.mark.parametrize("case", [*DAMAGED, *STRICTER])
def test_damaged_files_are_refused(case, tmp_path):
    content, expected = {**DAMAGED, **STRICTER}[case]
    assert check_safetensors(content) is None
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert re.search("|".join(map(re.escape, expected.split("|"))), message), message
    assert re.search("fetch (it|the file) again|no checkpoint|damaged", message), (
        message
    )


@pytest.mark.parametrize("case", STRICTER)
def test_the_library_is_less_strict(case):
    """So the list of what m3jax refuses beyond the library stays true."""
    safetensors.deserialize(STRICTER[case][0])


@pytest.mark.parametrize("case", DAMAGED)
def test_the_library_is_as_strict(case):
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(DAMAGED[case][0])


def test_the_longest_header(tmp_path):
    """100 MB is allowed; the file is sparse, and space is quickly passed over."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(framed(b"{}" + b" " * (MAX_HEADER - 2)))
    assert read_header(path).tensors == {}
    path.write_bytes(framed(b"{}", length=MAX_HEADER + 1))
    os.truncate(path, 8 + MAX_HEADER + 1)
    with pytest.raises(CheckpointError, match="limit is 100000000"):
        read_header(path)


@st.composite
def damaged_headers(draw):
    """A header and data, valid but for a few changes of its values or its text."""
    size, header = 0, {}
    for name, (code, shape) in draw(tensors).items():
        stop = size + math.prod(shape) * DTYPES[code].itemsize
        header[name] = {
            "dtype": code,
            "shape": list(shape),
            "data_offsets": [size, stop],
        }
        size = stop
    values = st.sampled_from(
        [-1, 0, 1, 2, 4, 2**31, 2**32, 2**63, 2**64 - 1, 2**64, 1.0, True]
    ) | st.sampled_from([None, "1", [], {}, [0], "F32", "BF16", "F4", "", "\ud800"])
    if header and draw(st.booleans()):
        entry = header[draw(st.sampled_from(sorted(header)))]
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
        if isinstance(entry.get(field), list) and entry[field] and draw(st.booleans()):
            entry[field][draw(st.integers(0, len(entry[field]) - 1))] = draw(values)
        else:
            entry[field] = draw(values)
    if draw(st.booleans()):
        header["__metadata__"] = draw(metadata | values)
    items = list(header.items())
    if draw(st.booleans()):
        items = draw(st.permutations(items))
    space = draw(st.sampled_from(["", " ", "\n\t"]))
    separators = (f",{space}", f":{space}")
    text = "{" + ",".join(
        json.dumps(key) + ":" + json.dumps(value, separators=separators)
        for key, value in items
    )
    text = bytearray((text + "}").encode())
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(text)))
        length = draw(st.integers(0, 4))
        text[place : place + length] = draw(
            st.binary(max_size=3)
            | st.sampled_from([b'"', b"{", b"}", b",", b"0", b"-"])
        )
    return bytes(text), max(0, size + draw(st.sampled_from([0, 0, 0, 0, 1, -1, 8])))


@settings(max_examples=400)
@given(damaged_headers())
def test_what_the_library_refuses_is_refused(case):
    text, size = case
    check_safetensors(framed(text, bytes(size)))


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_any_bytes(content):
    check_safetensors(content)
    check_header(content)


def many_tensors(count):
    entry = b'{"dtype":"F32","shape":[0,3],"data_offsets":[0,0]}'
    return b"{%s}" % b",".join(
        b'"model.layers.%d.weight":%s' % (i, entry) for i in range(count)
    )


def test_time_grows_with_the_number_of_tensors():
    seconds = []
    for count in (5_000, 40_000):
        text = many_tensors(count)
        start = time.process_time()
        assert len(parse_header(text, 0)[0]) == count
        seconds.append(time.process_time() - start)
    # Eight times as many take eight times as long; by squares it were 64 times.
    assert seconds[1] < 24 * max(seconds[0], 0.01)


SIZE = 1_000_000
HEAVY = {
    "arrays": b'{"a":[' + b"[]," * (SIZE // 3) + b"[]]}",
    "objects": b'{"a":[' + b"{}," * (SIZE // 3) + b"{}]}",
    "floats": b'{"a":[' + b"1e9," * (SIZE // 4) + b"0]}",
    "integers": b'{"a":{"shape":[' + b"999," * (SIZE // 4) + b"0]}}",
    "keys": b"{" + b",".join(b'"%x":0' % i for i in range(SIZE // 9)) + b"}",
    "keys of an entry": b'{"a":{'
    + b",".join(b'"%x":0' % i for i in range(SIZE // 9))
    + b"}}",
    "metadata": b'{"__metadata__":{'
    + b",".join(b'"%x":""' % i for i in range(SIZE // 9))
    + b"}}",
    "texts": b'{"a":[' + b'"ab",' * (SIZE // 5) + b"0]}",
    "a wide letter": b'{"a":"' + b"a" * SIZE + "😀".encode() + b'"}',
    "nesting": b'{"a":' + b"[" * SIZE,
    "quotes": b'{"' + b'\\"' * (SIZE // 2) + b'":0}',
    "space": b'{"a":{' + b" " * SIZE + b"}}",
    "tensors": many_tensors(SIZE // 76),
}


@pytest.mark.parametrize("case", HEAVY)
def test_memory_is_a_small_multiple_of_the_header(case):
    """Python's json takes up to 27 times; the limit of a real header is below 10."""
    text = HEAVY[case]
    start = time.process_time()
    tracemalloc.start()
    try:
        parse_header(text, 0)
    except CheckpointError as error:
        assert len(str(error)) < 1000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * len(text)
    assert time.process_time() - start < 10


def test_what_is_shown_is_short_and_on_one_line():
    nested = []
    for _ in range(100_000):
        nested = [nested]
    for text in ("a\nb\x1b[0m\u202e", "x" * 10**6, nested, [1] * 10**6, 10**4000):
        assert len(shown(text)) <= 120
        assert shown(text).isprintable()
    assert shown("a'b") == '"a\'b"'
    while nested:  # taken apart, since freeing it at once would overflow the stack
        nested = nested.pop()


def test_dtypes_have_their_codes():
    for code, dtype in DTYPES.items():
        assert of_numpy(dtype.numpy) is dtype
        assert dtype.code == code
    with pytest.raises(ValueError, match="complex64 cannot be written; known: U64"):
        of_numpy(np.dtype(np.complex64))
