"""What PyTorch pickles, taken apart without running any of it.

Python's own unpickler imports what a file names and calls it. This one has no way to
import or call: it knows the opcodes that dicts of tensors are made of, a list of names
that stand for tensors, storages and dtypes, and makes of them plain data: `View`, that
is a storage's key, a place in it, a shape and strides. Every other opcode or name is an
error that names it, before anything that follows is looked at.

Memory: the number of opcodes and of entries on the stack is limited, and nothing is
taken on the file's word: an opcode makes an empty dict at most, or as much as it pops.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from m3jax.checkpoints.errors import CheckpointError, shown

_MAX_STEPS = 5_000_000  # opcodes; a tensor takes forty
_MAX_STACK = 100_000  # entries; the pickler writes thousands at a time
_MAX_TEXT = 4096  # characters of a key or name
_MAX_SIZE = 2**63

# PyTorch's types of storages and dtypes, as safetensors calls what they hold.
_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
}
_UNTYPED = "torch.storage.UntypedStorage"
_ORDERED_DICT = "collections.OrderedDict"
_FROM_TYPE = "torch._tensor._rebuild_from_type_v2"
_CALLED = {  # of torch._utils
    *("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"),
    *("_rebuild_parameter", "_rebuild_parameter_with_state"),
}
_TYPES = {
    **{f"torch.{name}": code for name, code in _STORAGES.items()},
    **{f"torch.cuda.{name}": code for name, code in _STORAGES.items()},
}
_KNOWN = {
    *(_ORDERED_DICT, _FROM_TYPE, _UNTYPED, "torch.Size"),
    *("torch.Tensor", "torch.nn.parameter.Parameter"),
    *(f"torch._utils.{name}" for name in _CALLED),
    *(f"torch.{name}" for name in _DTYPES),
    *_TYPES,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """A stretch of elements; `code` is None where the tensors say what they are.

    Attributes:
      key: its name in the file.
      code: of the dtype, as in safetensors.
      count: elements, or bytes where the dtype is open.
    """

    key: str
    code: str | None
    count: int


@dataclasses.dataclass(frozen=True, slots=True)
class View:
    """A tensor: elements of a storage.

    Attributes:
      storage, code: where they are, and their dtype, as in safetensors.
      offset: of the first of them, in elements.
      shape, strides: in elements.
    """

    storage: Storage
    code: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class _Global:
    """A name that the file gives; nothing is imported for it."""

    name: str


class ForeignError(CheckpointError):
    """A pickle has what no tensors are made of, and what may run code elsewhere."""


class Pickle(NamedTuple):
    """What one pickle holds.

    Attributes:
      value: dicts, lists, tuples, texts, numbers, `View`.
      stop: the place behind it.
      storages: all that it names, by key.
    """

    value: Any
    stop: int
    storages: dict[str, Storage]


class _Mark:
    """The opcode MARK on the stack."""


_MARK = _Mark()


def load(text: bytes, start: int = 0) -> Pickle:
    """Takes a pickle apart.

    Args:
      text: the pickle, and perhaps more behind it.
      start: where it begins.

    Raises:
      ForeignError: it has what tensors are not made of.
      CheckpointError: it is damaged. Neither names the file.
    """
    return _Machine(text, start).run()


class _Machine:
    """One run through a pickle: its stack, its memo, the place in its bytes."""

    def __init__(self, text: bytes, start: int):
        self._text = text
        self._at = start
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._storages: dict[str, Storage] = {}

    def run(self) -> Pickle:
        for _ in range(_MAX_STEPS):
            code = self._take(1)
            if code == b".":
                return Pickle(self._pop(), self._at, self._storages)
            step = _OPCODES.get(code)
            if step is None:
                raise ForeignError(
                    f"has opcode {shown(code)} at byte {self._at - 1} of its pickle, "
                    "of which no tensors are made"
                )
            step(self)
            if len(self._stack) > _MAX_STACK:
                break
        raise CheckpointError("holds too many values in its pickle")

    def _take(self, count: int) -> bytes:
        part = self._text[self._at : self._at + count]
        if len(part) < count:
            raise CheckpointError("ends in the middle of its pickle; it was cut off")
        self._at += count
        return part

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise _damaged()
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        for place in range(len(self._stack) - 1, -1, -1):
            if self._stack[place] is _MARK:
                values = self._stack[place + 1 :]
                del self._stack[place:]
                return values
        raise _damaged()

    def _text_of(self, size: int) -> None:
        try:
            self._push(self._take(size).decode())
        except UnicodeDecodeError:
            raise CheckpointError("has a text that is no UTF-8 in its pickle") from None

    def _long(self) -> None:
        self._push(int.from_bytes(self._take(self._number("B")), "little", signed=True))

    def _tuple(self, count: int) -> None:
        values = [self._pop() for _ in range(count)]
        self._push(tuple(reversed(values)))

    def _set_items(self, values: list[Any]) -> None:
        target = self._top(dict)
        if len(values) % 2:
            raise _damaged()
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, str | int):
                raise ForeignError("has a key that is neither text nor number")
            target[key] = value

    def _append(self, values: list[Any]) -> None:
        self._top(list).extend(values)

    def _top(self, kind: type) -> Any:
        if not self._stack or not isinstance(self._stack[-1], kind):
            raise _damaged()
        return self._stack[-1]

    def _global(self) -> None:
        names = []
        for _ in range(2):
            stop = self._text.find(b"\n", self._at, self._at + _MAX_TEXT)
            if stop < 0:
                raise _damaged()
            names.append(self._text[self._at : stop].decode(errors="replace"))
            self._at = stop + 1
        self._push(_known(".".join(names)))

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise _damaged()
        self._push(_known(f"{module}.{name}"))

    def _reduce(self) -> None:
        arguments, called = self._pop(), self._pop()
        self._push(_reduced(called, arguments))

    def _build(self) -> None:
        # The state of a dict of tensors is its `_metadata`: versions of modules.
        self._pop()
        self._top(dict)

    def _persistent(self) -> None:
        storage = _storage(self._pop())
        self._storages.setdefault(storage.key, storage)
        self._push(storage)

    def _put(self, place: int) -> None:
        if not self._stack:
            raise _damaged()
        self._memo[place] = self._stack[-1]

    def _get(self, place: int) -> None:
        if place not in self._memo:
            raise _damaged()
        self._push(self._memo[place])


_OPCODES: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": lambda m: m._take(1),  # PROTO
    b"\x95": lambda m: m._take(8),  # FRAME
    b"(": lambda m: m._push(_MARK),
    b"}": lambda m: m._push({}),
    b"]": lambda m: m._push([]),
    b")": lambda m: m._push(()),
    b"N": lambda m: m._push(None),
    b"\x88": lambda m: m._push(True),
    b"\x89": lambda m: m._push(False),
    b"J": lambda m: m._push(m._number("<i")),
    b"K": lambda m: m._push(m._number("B")),
    b"M": lambda m: m._push(m._number("<H")),
    b"\x8a": lambda m: m._long(),
    b"G": lambda m: m._push(m._number(">d")),
    b"X": lambda m: m._text_of(m._number("<I")),
    b"\x8c": lambda m: m._text_of(m._number("B")),
    b"T": lambda m: m._text_of(m._number("<I")),  # BINSTRING, of Python 2
    b"U": lambda m: m._text_of(m._number("B")),
    b"t": lambda m: m._push(tuple(m._pop_to_mark())),
    b"\x85": lambda m: m._tuple(1),
    b"\x86": lambda m: m._tuple(2),
    b"\x87": lambda m: m._tuple(3),
    b"a": lambda m: m._append([m._pop()]),
    b"e": lambda m: m._append(m._pop_to_mark()),
    b"s": lambda m: m._set_items(list(reversed([m._pop(), m._pop()]))),
    b"u": lambda m: m._set_items(m._pop_to_mark()),
    b"0": lambda m: m._pop(),
    b"c": lambda m: m._global(),
    b"\x93": lambda m: m._stack_global(),
    b"R": lambda m: m._reduce(),
    b"b": lambda m: m._build(),
    b"Q": lambda m: m._persistent(),
    b"q": lambda m: m._put(m._number("B")),
    b"r": lambda m: m._put(m._number("<I")),
    b"\x94": lambda m: m._put(len(m._memo)),
    b"h": lambda m: m._get(m._number("B")),
    b"j": lambda m: m._get(m._number("<I")),
}


def _known(name: str) -> _Global:
    if name not in _KNOWN:
        raise ForeignError(f"names {shown(name)}, which is no tensor's")
    return _Global(name)


def _storage(described: Any) -> Storage:
    match described:
        case ("storage", _Global(name=kind), str(key), str(), int(count), *rest) if (
            rest in ([], [None])
        ):
            if (kind in _TYPES or kind == _UNTYPED) and 0 <= count < _MAX_SIZE:
                return Storage(key, _TYPES.get(kind), count)
    raise ForeignError("has a storage that is none of PyTorch's tensors")


def _reduced(called: Any, arguments: Any) -> Any:
    """What a call that is known would make."""
    if not isinstance(called, _Global) or not isinstance(arguments, tuple):
        raise _damaged()
    short = called.name.removeprefix("torch._utils.")
    match short, arguments:
        case "collections.OrderedDict", ():
            return {}
        case "torch.Size", (tuple(sizes),):
            return sizes
        case "_rebuild_tensor", (Storage() as storage, offset, shape, strides):
            return _view(storage, None, offset, shape, strides)
        case "_rebuild_tensor_v2", (
            Storage() as s,
            offset,
            shape,
            strides,
            _,
            _,
            *rest,
        ):
            _check_plain(rest)
            return _view(s, None, offset, shape, strides)
        case "_rebuild_tensor_v3", (
            Storage() as s,
            offset,
            shape,
            strides,
            _,
            _,
            _Global(name=dtype),
            *rest,
        ):
            _check_plain(rest)
            return _view(s, dtype, offset, shape, strides)
        case "_rebuild_parameter", (View() as view, _, _):
            return view
        case "_rebuild_parameter_with_state", (View() as view, _, _, _):
            return view
        case "torch._tensor._rebuild_from_type_v2", (
            _Global() as inner,
            _Global(name="torch.Tensor" | "torch.nn.parameter.Parameter"),
            tuple(own),
            _,
        ) if inner.name != _FROM_TYPE:
            return _reduced(inner, own)
    raise ForeignError(f"calls {shown(called.name)} as no tensor does")


def _check_plain(metadata: list[Any]) -> None:
    """Refuses tensors that are to be negated or conjugated when they are used."""
    if any(metadata):
        raise CheckpointError("has a tensor that is a conjugate or negative view")


def _view(
    storage: Storage, dtype: str | None, offset: Any, shape: Any, strides: Any
) -> View:
    code = storage.code
    if dtype is not None:
        code = _DTYPES.get(dtype.removeprefix("torch."))
    if (
        code is None
        or not (isinstance(shape, tuple) and isinstance(strides, tuple))
        or len(shape) != len(strides)
        or not all(map(_is_size, (offset, *shape, *strides)))
    ):
        raise CheckpointError("has a tensor whose dtype, shape or strides make none")
    return View(storage, code, offset, shape, strides)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_SIZE


def _damaged() -> CheckpointError:
    return CheckpointError("has a damaged pickle")
