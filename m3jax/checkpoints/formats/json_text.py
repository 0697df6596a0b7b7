"""Parses JSON that may be hostile.

`load_json` makes Python objects of the whole text, up to 27 bytes for each byte of
it, and is for files with a small limit. `JsonCursor` walks through an object of any
size and keeps what its caller keeps.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from m3jax.checkpoints.errors import CheckpointError, shown

BOM = "\ufeff".encode()  # which some editors put before a text, and loaders refuse
_SPACE = re.compile(r"[ \t\n\r]*")


def load_json(text: bytes, what: str, *, constants: bool = False) -> dict[str, Any]:
    """Parses an object; duplicate keys and deep nesting are refused, a BOM is not.

    Args:
      text: the JSON.
      what: its name in errors.
      constants: allow NaN and Infinity, which Python writes though JSON has none.

    Raises:
      CheckpointError: one line that says what is wrong with it.
    """
    try:
        decoder = _LENIENT if constants else _STRICT
        value = decoder.decode(text.removeprefix(BOM).decode())
    except RecursionError:
        raise CheckpointError(f"{what} is nested too deeply") from None
    except ValueError as error:  # bad UTF-8, bad JSON, an integer of 5000 digits
        raise CheckpointError(_invalid(what, error)) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is not a JSON object")
    return value


class JsonCursor:
    """Walks through the text of a JSON object, member by member.

    Attributes:
      what: the text's name in errors.
    """

    def __init__(self, text: bytes, what: str):
        self.what = what
        self._at = 0
        try:
            self._text = text.decode()
        except ValueError as error:
            raise CheckpointError(_invalid(what, error)) from None

    def members(self) -> Iterator[str]:
        """Yields each key of the object that begins here.

        The caller reads the key's value before it asks for the next key.
        """
        self._take("{", "an object")
        if self._peek() == "}":
            self._at += 1
            return
        while True:
            key = self.string()
            self._take(":", "':'")
            yield key
            if self._peek() != ",":
                break
            self._at += 1
        self._take("}", "',' or '}'")

    def string(self) -> str:
        """Reads a string."""
        if self._peek() != '"':
            self._fail("a string")
        try:
            value, self._at = _STRICT.raw_decode(self._text, self._at)
            if not value.isascii():
                value.encode()  # a lone surrogate is no text
        except ValueError as error:
            raise CheckpointError(_invalid(self.what, error)) from None
        return value

    def value(self, limit: int) -> Any:
        """Reads a value whose text has at most `limit` characters."""
        self._peek()
        part = self._text[self._at : self._at + limit]
        try:
            value, length = _STRICT.raw_decode(part)
        except RecursionError:
            raise CheckpointError(f"{self.what} is nested too deeply") from None
        except ValueError as error:
            near = f"near character {self._at}: {error}"
            if len(part) == limit:
                near += f"; or a part is longer than {limit} characters"
            raise CheckpointError(_invalid(self.what, near)) from None
        self._at += length
        return value

    def end(self) -> None:
        """Checks that nothing but space is left."""
        if self._peek():
            self._fail("its end")

    def _peek(self) -> str:
        """The next character that is not space, or "" at the end."""
        found = _SPACE.match(self._text, self._at)
        assert found is not None  # it matches nothing, too
        self._at = found.end()
        return self._text[self._at : self._at + 1]

    def _take(self, character: str, wanted: str) -> None:
        if self._peek() != character:
            self._fail(wanted)
        self._at += 1

    def _fail(self, wanted: str) -> NoReturn:
        found = self._text[self._at : self._at + 20]
        raise CheckpointError(
            f"{self.what} needs {wanted} at character {self._at}, "
            f"has {shown(found) if found else 'nothing more'}"
        )


def _invalid(what: str, flaw: object) -> str:
    return f"{what} is not valid JSON ({shown(str(flaw), 200)})"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {shown(key)} stands there twice")
            seen.add(key)
    return found


def _integer(digits: str) -> int:
    if digits == "-0":  # a float, says the safetensors library
        raise ValueError("-0 is no integer")
    return int(digits)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_STRICT = json.JSONDecoder(
    object_pairs_hook=_unique, parse_int=_integer, parse_constant=_no_constant
)
_LENIENT = json.JSONDecoder(object_pairs_hook=_unique)
