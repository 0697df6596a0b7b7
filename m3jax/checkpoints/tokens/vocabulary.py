"""The vocabulary of a tokenizer: which token has which id, as its loaders number them.

tokenizer.json is read by the library that transformers reads it with; without one,
tokenizer.model (SentencePiece, ids in the order of its pieces), vocab.json and
vocab.txt. To these come tokens that only the files beside them name, in transformers'
order: added_tokens_decoder of tokenizer_config.json (else added_tokens.json), then
special tokens that no file has given a number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import xxhash

from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.formats.json_text import load_json
from m3jax.checkpoints.places.files import Location
from m3jax.checkpoints.side_files import VOCABULARY_FILES, read_side_file

JSON, SETTINGS, ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
_MAX_ID = 1 << 28
_NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_FLAGS = {
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": True,
    "special": False,
}


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer knows.

    Attributes:
      ids: of all tokens, added ones among them.
      added: those that stand outside the model of the tokenizer, with the fields that
        tokenizer.json has for them, but for the id.
    """

    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.ids.values(), default=-1) + 1


def fingerprint(folder: Location) -> str | None:
    """A hash of the files that number tokens; None where there are none."""
    found = xxhash.xxh3_128()
    some = False
    for name in (*VOCABULARY_FILES, ADDED):
        content = read_side_file(folder, name)
        if content is not None:
            some = True
            found.update(f"{name} {len(content)} ".encode() + content)
    return found.hexdigest() if some else None


def read_vocabulary(name: str, folder: Location) -> Vocabulary | None:
    """The vocabulary of a checkpoint's tokenizer, or None where there is none.

    Args:
      name: of the checkpoint, for errors.
      folder: that holds its files.

    Raises:
      CheckpointError: it cannot be read.
    """
    ids: dict[str, int] = {}
    added: dict[str, dict[str, Any]] = {}
    text = read_side_file(folder, JSON)
    if text is not None:
        ids, added = _of_json(text, str(folder / JSON))
    elif (text := read_side_file(folder, "tokenizer.model")) is not None:
        what = str(folder / "tokenizer.model")
        ids = {piece: i for i, piece in enumerate(_pieces(text, what))}
    elif (text := read_side_file(folder, "vocab.json")) is not None:
        ids = load_json(text, str(folder / "vocab.json"))
    elif (text := read_side_file(folder, "vocab.txt")) is not None:
        lines = text.decode(errors="replace").splitlines()
        ids = {line: i for i, line in enumerate(lines)}
    else:
        for other in VOCABULARY_FILES:
            if read_side_file(folder, other) is not None:
                raise CheckpointError(
                    f"{name}: its tokenizer stands in {other} alone, which is not read "
                    "token by token; let transformers write a tokenizer.json: "
                    "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
                )
        return None
    _check_ids(name, ids)
    taken = set(ids.values())
    numbered = {ids[token] for token in added}
    for token, number, fields in _beside(folder, read_settings(folder), numbered):
        if token not in ids:
            if number is None or number in taken:
                number = max(taken, default=-1) + 1
            ids[token] = number
            taken.add(number)
        added.setdefault(token, fields)
    _check_ids(name, ids)
    return Vocabulary(ids, added)


def _check_ids(name: str, ids: Mapping[str, Any]) -> None:
    for token, number in ids.items():
        if type(number) is not int or not 0 <= number < _MAX_ID:
            raise CheckpointError(
                f"{name}: token {shown(token)} has the id {shown(number)}; needs a "
                f"number from 0 to {_MAX_ID - 1}"
            )


def read_settings(folder: Location) -> dict[str, Any]:
    """tokenizer_config.json; {} where there is none."""
    text = read_side_file(folder, SETTINGS)
    return {} if text is None else load_json(text, str(folder / SETTINGS))


def library_ids(text: bytes, what: str) -> tuple[dict[str, int], list[Any]]:
    """The ids that the tokenizers library gives, and its added tokens by id.

    Raises:
      CheckpointError: it cannot read the file.
    """
    from tokenizers import Tokenizer

    try:
        made = Tokenizer.from_buffer(text)
        return made.get_vocab(with_added_tokens=True), sorted(
            made.get_added_tokens_decoder().items()
        )
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # its panics are no Exceptions
        why = str(error).strip().split("\n")[0][:200]
        raise CheckpointError(
            f"{what} cannot be read ({why}); fetch it again, or let transformers write "
            "it anew"
        ) from None


def _of_json(text: bytes, what: str) -> tuple[dict[str, int], dict[str, Any]]:
    ids, added = library_ids(text, what)
    return ids, {
        token.content: {name: getattr(token, name) for name in _FLAGS}
        for _, token in added
    }


def _beside(
    folder: Location, settings: Mapping[str, Any], numbered: set[int]
) -> Iterator[tuple[str, int | None, dict[str, Any]]]:
    """Tokens that stand beside the vocabulary: token, id if it is said, fields.

    `numbered` are the ids of tokenizer.json's added tokens, which transformers prefers
    to added_tokens.json's.
    """
    text = read_side_file(folder, "special_tokens_map.json")
    specials = {} if text is None else load_json(text, "special_tokens_map.json")
    named = [
        _token(fields.get(f"{name}_token"))
        for fields in (settings, specials)
        for name in _NAMED
    ]
    for fields in (settings, specials):
        extra = fields.get("extra_special_tokens")
        extra = extra or fields.get("additional_special_tokens") or []
        extra = list(extra.values()) if isinstance(extra, dict) else extra
        named += [_token(own) for own in extra] if isinstance(extra, list) else []
    decoder = settings.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        listed = [
            (int(number), own)
            for number, own in decoder.items()
            if number.isdecimal() and isinstance(own, dict) and _token(own)
        ]
        for number, own in sorted(listed, key=lambda pair: pair[0]):
            flags = {flag: own.get(flag, value) for flag, value in _FLAGS.items()}
            yield str(own["content"]), number, flags
    elif (text := read_side_file(folder, ADDED)) is not None:
        for token, number in load_json(text, str(folder / ADDED)).items():
            if number in numbered:
                continue
            special = token in named
            yield (
                token,
                number,
                {**_FLAGS, "normalized": not special, "special": special},
            )
    for name in named:
        if name is not None:
            yield name, None, {**_FLAGS, "normalized": False, "special": True}


def _token(value: Any) -> str | None:
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) and value else None


def _pieces(text: bytes, what: str) -> Iterator[str]:
    """The pieces of a SentencePiece model: field 1 of each message in its field 1."""
    for number, value in _fields(text, what):
        if number == 1:
            found = [own for field, own in _fields(value, what) if field == 1]
            yield found[-1].decode(errors="replace") if found else ""


def _fields(text: bytes, what: str) -> Iterator[tuple[int, bytes]]:
    """The fields of a protobuf message; numbers are passed over."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = 0
        for shift in range(0, 64, 7):
            byte = text[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise IndexError

    try:
        while at < len(text):
            key = varint()
            kind = key & 7
            if kind == 0:
                varint()
            elif kind == 2:
                size = varint()
                if size > len(text) - at:
                    raise IndexError
                yield key >> 3, text[at : at + size]
                at += size
            else:
                at += {1: 8, 5: 4}[kind]
    except (IndexError, KeyError):
        raise CheckpointError(
            f"{what} is no SentencePiece model; fetch it again"
        ) from None
