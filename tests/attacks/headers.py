"""Safetensors files that break a rule; each is refused."""

from __future__ import annotations

from fuzz.targets import framed

_TENSOR = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
_DATA = b"1234"


def _entry(
    dtype: str = '"F32"',
    shape: str = "[1]",
    offsets: str = "[0,4]",
    more: str = "",
) -> str:
    return f'{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}{more}}}'


def _one(**fields: str) -> bytes:
    """A file of one tensor, described by the given JSON."""
    return framed(f'{{"a":{_entry(**fields)}}}'.encode(), _DATA)


def _text(header: str | bytes, data: bytes = _DATA) -> bytes:
    return framed(header if isinstance(header, bytes) else header.encode(), data)


_OVERFLOW = _entry(shape="[4294967296,4294967296,0]", offsets="[0,0]")
_PAIRS = [f'"{i}":""' for i in range(65537)]
_C64 = _entry(dtype='"C64"', offsets="[0,8]")

VALID = {
    "one tensor": _one(),
    "no tensors": framed(b"{}"),
    "trailing space": _text(f'{{"a":{_TENSOR}}}  \n\t\r'),
    "an empty tensor at an edge": _text(
        f'{{"a":{_TENSOR},"b":{_entry(shape="[0]", offsets="[4,4]")}}}'
    ),
    "a scalar": _one(shape="[]"),
    "header not in order of the data": _text(
        f'{{"a":{_entry(offsets="[4,8]")},"b":{_TENSOR}}}', _DATA * 2
    ),
    "escaped letters": _text(
        '{"\\u0061\\ud83d\\ude00":{"d\\u0074ype":"F32","shape":[1],'
        '"data_offsets":[0,4]}}'
    ),
    "space everywhere": _text(
        '{ "a" : { "dtype" : "F32" , "shape" : [ 1 ] , "data_offsets" : [ 0 , 4 ] } }'
    ),
    "metadata": _text(f'{{"__metadata__":{{"format":"pt"}},"a":{_TENSOR}}}'),
    "zero before an overflow": framed(
        f'{{"a":{_entry(shape="[0,4294967296,4294967296]", offsets="[0,0]")}}}'.encode()
    ),
    "64 dimensions": _one(shape=f"[{','.join(['1'] * 64)}]"),
}

# What its message has to say: one of the texts between bars.
DAMAGED = {
    "empty file": (b"", "too short"),
    "seven bytes": (b"1234567", "too short"),
    "length beyond the file": (framed(b"{}", length=3), "claims to end at byte 11"),
    "length beyond the limit": (
        framed(b"{}", length=100_000_001),
        "limit is 100000000",
    ),
    "length of 2**64 - 1": (framed(b"{}", length=2**64 - 1), "limit is 100000000"),
    "empty header": (framed(b""), "does not|starts with ''|starts with b''"),
    "a pickle": (b"\x80\x02}q\x00.        ", "limit is|starts with|claims"),
    "a zip": (b"PK\x03\x04" + bytes(60), "limit is|starts with|claims"),
    "an array": (framed(b"[]"), "starts with"),
    "byte order mark": (_text("\ufeff{}", b""), "starts with"),
    "text behind the object": (_text(f'{{"a":{_TENSOR}}}x'), "its end"),
    "NUL behind the object": (_text(f'{{"a":{_TENSOR}}}\0'), "its end"),
    "cut-off JSON": (_text(f'{{"a":{_TENSOR}'), "nothing more"),
    "trailing comma": (_text(f'{{"a":{_TENSOR},}}'), "needs a string"),
    "single quotes": (_text("{'a':1}"), "needs a string"),
    "a comment": (_text(f'{{/* */"a":{_TENSOR}}}'), "needs a string"),
    "form feed as space": (_text(f'{{\f"a":{_TENSOR}}}'), "needs a string"),
    "not UTF-8": (_text(b'{"\xff":' + _TENSOR.encode() + b"}"), "not valid JSON"),
    "UTF-8 of a surrogate": (
        _text(b'{"\xed\xa0\x80":' + _TENSOR.encode() + b"}"),
        "not valid JSON",
    ),
    "lone surrogate in a name": (_text(f'{{"\\ud800":{_TENSOR}}}'), "not valid JSON"),
    "raw newline in a name": (_text(f'{{"a\n":{_TENSOR}}}'), "not valid JSON"),
    "entry is a number": (_text('{"a":1}'), "'a' needs dtype, shape and data_offsets"),
    "no dtype": (_text('{"a":{"shape":[1],"data_offsets":[0,4]}}'), "needs dtype"),
    "dtype is a number": (_one(dtype="1"), "has dtype 1"),
    "unknown dtype": (_one(dtype='"F33"'), "has dtype 'F33'; known: U64"),
    "dtype in small letters": (_one(dtype='"f32"'), "has dtype 'f32'"),
    "dtype twice": (_one(more=',"dtype":"F32"'), "'dtype' stands there twice"),
    "shape is a number": (_one(shape="1"), "has shape 1"),
    "negative size": (_one(shape="[-1]"), "has shape [-1]"),
    "minus zero": (_one(offsets="[-0,4]"), "-0 is no integer"),
    "size as a float": (_one(shape="[1.0]"), "has shape [1.0]"),
    "size with an exponent": (_one(shape="[1e0]"), "has shape [1.0]"),
    "size as a truth": (_one(shape="[true]"), "has shape [True]"),
    "size as text": (_one(shape='["1"]'), "has shape ['1']"),
    "size null": (_one(shape="[null]"), "has shape [None]"),
    "size with a leading zero": (_one(shape="[01]"), "not valid JSON"),
    "size NaN": (_one(shape="[NaN]"), "NaN is not JSON"),
    "size Infinity": (_one(shape="[Infinity]"), "Infinity is not JSON"),
    "size 2**64": (_one(shape=f"[{2**64}]"), "has shape"),
    "size of 3000 digits": (_one(shape=f"[{'9' * 3000}]"), "has shape"),
    "size of 5000 digits": (_one(shape=f"[{'9' * 5000}]"), "not valid JSON"),
    "shape that overflows": (_one(shape="[4294967296,4294967296]"), "overflows"),
    "shape that overflows before a zero": (
        framed(b'{"a":%s}' % _OVERFLOW.encode()),
        "overflows",
    ),
    "bytes that overflow": (_one(shape=f"[{2**63}]"), "needs 36893488147419103232 b"),
    "deep array": (_one(shape="[" * 900 + "]" * 900), "has shape|nested|not valid"),
    "deeper array": (_one(shape="[" * 3000), "nested|not valid JSON"),
    "deepest array": (_text("{" + '"a":[' * 200_000), "nested|not valid JSON"),
    "one offset": (_one(offsets="[0]"), "has offsets [0]"),
    "three offsets": (_one(offsets="[0,4,4]"), "has offsets [0, 4, 4]"),
    "negative offset": (_one(offsets="[-4,0]"), "has offsets [-4, 0]"),
    "offsets in reverse": (_one(shape="[0]", offsets="[4,0]"), "has offsets [4, 0]"),
    "offset beyond 64 bits": (_one(offsets=f"[0,{2**64}]"), "has offsets"),
    "offset that wraps": (
        _one(offsets=f"[{2**64 - 4},{2**64 - 1}]"),
        "needs 4 bytes, its offsets give 3",
    ),
    "offsets of another size": (_one(shape="[2]"), "needs 8 bytes, its offsets give 4"),
    "data cut off": (framed(f'{{"a":{_TENSOR}}}'.encode(), b"123"), "was cut off"),
    "data too long": (
        framed(f'{{"a":{_TENSOR}}}'.encode(), b"12345"),
        "has bytes that are no tensor's",
    ),
    "data without tensors": (framed(b"{}", b"1"), "has bytes that are no tensor's"),
    "hole at the start": (
        _text(f'{{"a":{_entry(offsets="[4,8]")}}}', _DATA * 2),
        "there is a hole",
    ),
    "hole in the middle": (
        _text(f'{{"a":{_TENSOR},"b":{_entry(offsets="[8,12]")}}}', _DATA * 3),
        "there is a hole",
    ),
    "overlap": (
        _text(f'{{"a":{_TENSOR},"b":{_entry(offsets="[2,6]")}}}', b"123456"),
        "they overlap",
    ),
    "two tensors of the same bytes": (
        _text(f'{{"a":{_TENSOR},"b":{_TENSOR}}}'),
        "they overlap",
    ),
    "an empty tensor inside another": (
        _text(f'{{"a":{_TENSOR},"b":{_entry(shape="[0]", offsets="[2,2]")}}}'),
        "they overlap|there is a hole",
    ),
    "metadata twice": (
        _text(f'{{"__metadata__":{{}},"__metadata__":{{}},"a":{_TENSOR}}}'),
        "'__metadata__' twice",
    ),
    "metadata that is a number": (
        _text(f'{{"__metadata__":{{"a":1}},"a":{_TENSOR}}}'),
        "needs a string",
    ),
    "metadata that is a tensor": (_text(f'{{"__metadata__":{_TENSOR}}}'), "a string"),
    "metadata that is text": (
        _text(f'{{"__metadata__":"x","a":{_TENSOR}}}'),
        "an object",
    ),
    "lone surrogate in the metadata": (
        _text(f'{{"__metadata__":{{"a":"\\udfff"}},"a":{_TENSOR}}}'),
        "not valid JSON",
    ),
}

# The library reads these. No writer makes them, and they mean different things to
# different readers, or would have to be shown on a terminal.
STRICTER = {
    "space before the object": (_text(f' {{"a":{_TENSOR}}}'), "starts with"),
    "tensor twice": (_text(f'{{"a":{_TENSOR},"a":{_TENSOR}}}'), "'a' twice"),
    "metadata key twice": (
        _text(f'{{"__metadata__":{{"a":"b","a":"c"}},"a":{_TENSOR}}}'),
        "'a' twice",
    ),
    "metadata null": (_text(f'{{"__metadata__":null,"a":{_TENSOR}}}'), "an object"),
    "65537 pairs of metadata": (
        _text(
            f'{{"__metadata__":{{{",".join(_PAIRS)}}},"a":{_TENSOR}}}',
        ),
        "too long",
    ),
    "entry as an array": (_text('{"a":["F32",[1],[0,4]]}'), "needs dtype"),
    "entry with another field": (_one(more=',"x":1'), "needs dtype"),
    "entry of 5000 characters": (_one(shape=f"[{' ' * 5000}1]"), "longer than 4096"),
    "65 dimensions": (_one(shape=f"[{','.join(['1'] * 65)}]"), "up to 64 sizes"),
    "newline in a name": (_text(f'{{"a\\nb":{_TENSOR}}}'), "name that is not allowed"),
    "escape sequence in a name": (
        _text(f'{{"\\u001b[2J":{_TENSOR}}}'),
        "name that is not allowed",
    ),
    "right-to-left override in a name": (
        _text(f'{{"\u202e":{_TENSOR}}}'),
        "name that is not allowed",
    ),
    "name of 4097 characters": (
        _text(f'{{"{"n" * 4097}":{_TENSOR}}}'),
        "name that is not allowed",
    ),
    "F4": (_one(dtype='"F4"', shape="[8]"), "has dtype 'F4'"),
    "F8_E4M3FNUZ": (_one(dtype='"F8_E4M3FNUZ"', shape="[4]"), "'F8_E4M3FNUZ'"),
    "C64": (
        _text(f'{{"a":{_C64}}}', _DATA * 2),
        "has dtype 'C64'; known: U64",
    ),
}
