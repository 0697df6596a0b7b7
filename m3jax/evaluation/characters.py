"""Tokenizers of single characters, read without any other library.

Only a tokenizer.json that says nothing but "every character is a token" is read; all
others are left to transformers, which gives the same tokens for these.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.json_text import load_json
from m3jax.checkpoints.side_files import TOKENIZER_FILES, read_side_file
from m3jax.evaluation.stop_tokens import stop_tokens_of

_FILES = ("tokenizer.json", "tokenizer_config.json")
_LARGEST = 1_000_000  # bytes; a larger one has more tokens than characters


class CharacterTokenizer:
    """Implements `Tokenizer`: a token for each character, and special ones."""

    def __init__(
        self,
        folder: Path,
        vocabulary: Mapping[str, int],
        special: Sequence[str],
        *,
        begin: str,
        end: str,
        unknown: str,
    ):
        """Makes one.

        Args:
          folder: its own, named in errors and searched for stop tokens.
          vocabulary: the token of each character and of the special texts.
          special: texts of several characters that are one token and never written.
          begin, end, unknown: three of them.
        """
        self._folder = folder
        self._vocabulary, self._unknown = vocabulary, vocabulary[unknown]
        self._texts = {
            token: text for text, token in vocabulary.items() if text not in special
        }
        whole = sorted(special, key=len, reverse=True)
        self._parts = re.compile("|".join([*map(re.escape, whole), r"[\s\S]"]))
        self.first_token = vocabulary[begin]
        self.stop_tokens = stop_tokens_of(folder, vocabulary[end])

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        parts = self._parts.findall(text)
        tokens = [self._vocabulary.get(part, self._unknown) for part in parts]
        return [self.first_token, *tokens] if add_special_tokens else tokens

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self._texts.get(token, "") for token in tokens)

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        raise CheckpointError(
            f"{self._folder}: its tokenizer has no chat template; leave out chat: true"
        )


def read_characters(folder: Path) -> CharacterTokenizer | None:
    """The tokenizer of a folder, if it is one of single characters and no more."""
    found = {name: read_side_file(folder, name) for name in TOKENIZER_FILES}
    files = {name: raw for name, raw in found.items() if raw is not None}
    if set(files) != set(_FILES) or any(len(raw) > _LARGEST for raw in files.values()):
        return None
    fields, settings = (load_json(files[name], str(folder / name)) for name in _FILES)
    begin, end, unknown = (
        str(settings.pop(f"{name}_token", None)) for name in ("bos", "eos", "unk")
    )
    if settings.keys() - {"tokenizer_class"}:
        return None
    model = fields.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict):
        return None
    if not all(isinstance(token, int) for token in vocabulary.values()):
        return None
    special = [text for text in vocabulary if len(text) != 1]
    if not {begin, end, unknown} <= set(special):
        return None
    if fields != tokenizer_fields(vocabulary, special, begin=begin, unknown=unknown):
        return None
    return CharacterTokenizer(
        folder, vocabulary, special, begin=begin, end=end, unknown=unknown
    )


def tokenizer_fields(
    vocabulary: Mapping[str, int], special: Sequence[str], *, begin: str, unknown: str
) -> dict[str, Any]:
    """The content of the tokenizer.json of a tokenizer of single characters."""
    whole = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": vocabulary[text], "content": text, "special": True, **whole}
            for text in special
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": r"[\s\S]"},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": begin, "type_id": 0}}, sequence],
            "pair": [sequence],
            "special_tokens": {
                begin: {"id": begin, "ids": [vocabulary[begin]], "tokens": [begin]}
            },
        },
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": dict(vocabulary), "unk_token": unknown},
    }
