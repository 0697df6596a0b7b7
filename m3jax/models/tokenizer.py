"""From texts to tokens and back, with the files in a checkpoint's folder."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.formats.json_text import load_json
from m3jax.checkpoints.side_files import (
    VOCABULARY_FILES,
    check_side_files,
    names_of,
    read_config,
    read_side_file,
)

_SETTINGS, _GENERATION = "tokenizer_config.json", "generation_config.json"
# The library's class that is tokenizer.json and no more, as its releases call it.
_PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend")


class Tokenizer:
    """The tokenizer in a checkpoint's folder; none of the folder's code is run.

    Threads may share it: they take turns, since the library's own object raises
    "Already borrowed" where two use it (huggingface/tokenizers issue 537).

    Attributes:
      transformers: the library's own object.
      stop_tokens: with which a model ends what it writes, by all that the folder says.
      first_token: what a text begins with that would be empty otherwise.
    """

    def __init__(self, folder: Path):
        """Loads it.

        Raises:
          CheckpointError: there is none, or it cannot be used.
        """
        self._folder = folder
        self._turn = threading.Lock()
        # The library would wait for a FIFO's other end.
        check_side_files(dict.fromkeys(names_of(folder), folder))
        # Without a vocabulary, the library makes up an empty one for some models.
        if not any((folder / name).exists() for name in VOCABULARY_FILES):
            raise self._unusable(f"there is none of {', '.join(VOCABULARY_FILES)}")
        plain = _fields(folder, _SETTINGS).get("tokenizer_class") in _PLAIN
        try:
            self.transformers: Any = _library(plain).from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # the library raises a dozen unrelated types
            raise self._unusable(f"{type(error).__name__}: {_reason(error)}") from None
        first, last = self.transformers.bos_token_id, self.transformers.eos_token_id
        self.first_token: int | None = last if first is None else first
        self.stop_tokens = _stop_tokens(folder, last)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The tokens of a text."""
        with self._turn:
            return list(
                self.transformers.encode(text, add_special_tokens=add_special_tokens)
            )

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        with self._turn:
            text = self.transformers.decode(
                list(tokens),
                skip_special_tokens=True,
                clean_up_tokenization_spaces=False,
            )
        return str(text)

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        """The text of a chat, up to where the assistant begins to write."""
        try:
            with self._turn:
                text = self.transformers.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=True
                )
        except Exception as error:  # there is none, or it raises, or Jinja is missing
            raise CheckpointError(
                f"{self._folder}: its chat template cannot be used ({_reason(error)}); "
                "leave out chat: true, or add chat_template.jinja"
            ) from None
        return str(text)

    def _unusable(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self._folder}: its tokenizer cannot be used ({why}); copy the model's "
            "tokenizer files into the folder"
        )


def _library(plain: bool) -> Any:
    """What loads a tokenizer.

    AutoTokenizer finds any, for which it imports PyTorch where that is installed: two
    seconds, which a folder that asks for no model's own class need not wait for.
    """
    if plain:
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def _stop_tokens(folder: Path, last: int | None) -> tuple[int, ...]:
    """The tokens that end a text."""
    found: set[int] = set()
    for fields in (
        _fields(folder, _GENERATION),
        read_config(folder) or {},
        {"eos_token_id": last},
    ):
        tokens = fields.get("eos_token_id")
        tokens = tokens if isinstance(tokens, list) else [tokens]
        found |= {token for token in tokens if isinstance(token, int)}
    return tuple(sorted(found))


def _fields(folder: Path, name: str) -> dict[str, Any]:
    """The object in a file; {} if there is none."""
    content = read_side_file(folder, name)
    return {} if content is None else load_json(content, str(folder / name))


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
