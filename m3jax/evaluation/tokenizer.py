"""From texts to tokens and back."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.side_files import VOCABULARY_FILES, check_side_files
from m3jax.evaluation.characters import read_characters
from m3jax.evaluation.stop_tokens import stop_tokens_of


class Tokenizer(Protocol):
    """What tasks need of a tokenizer."""

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Tokens with which a model ends what it writes."""
        ...

    @property
    def first_token(self) -> int | None:
        """What a text begins with that would be empty otherwise."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The tokens of a text."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        ...

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        """The text of a chat, up to where the assistant begins to write."""
        ...


def open_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a checkpoint's folder, by transformers unless it is a plain one.

    Raises:
      CheckpointError: there is none, or it cannot be used.
    """
    return read_characters(folder) or FolderTokenizer(folder)


class FolderTokenizer:
    """The tokenizer in a checkpoint's folder; none of the folder's code is run.

    Threads may share it: they take turns, since the library's own object raises
    "Already borrowed" where two use it (huggingface/tokenizers issue 537).

    Attributes:
      transformers: the library's own object.
    """

    def __init__(self, folder: Path):
        """Loads it.

        Raises:
          CheckpointError: there is none, or it cannot be used.
        """
        # Imported here: it takes seconds, and a merge needs no tokenizer.
        from transformers import AutoTokenizer

        self._folder = folder
        self._turn = threading.Lock()
        check_side_files(folder)  # the library would wait for a FIFO's other end
        # Without a vocabulary, the library makes up an empty one for some models.
        if not any((folder / name).exists() for name in VOCABULARY_FILES):
            raise CheckpointError(
                f"{folder}: its tokenizer cannot be used (there is none of "
                f"{', '.join(VOCABULARY_FILES)}); copy the model's tokenizer files "
                "into the folder"
            )
        try:
            self.transformers: Any = AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # the library raises a dozen unrelated types
            reason = str(error).strip().split("\n")[0]
            raise CheckpointError(
                f"{folder}: its tokenizer cannot be used ({type(error).__name__}: "
                f"{reason[:200]}); copy the model's tokenizer files into the folder"
            ) from None

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        return stop_tokens_of(self._folder, self.transformers.eos_token_id)

    @property
    def first_token(self) -> int | None:
        bos, eos = self.transformers.bos_token_id, self.transformers.eos_token_id
        return eos if bos is None else bos

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        with self._turn:
            return list(
                self.transformers.encode(text, add_special_tokens=add_special_tokens)
            )

    def decode(self, tokens: Sequence[int]) -> str:
        with self._turn:
            text = self.transformers.decode(
                list(tokens),
                skip_special_tokens=True,
                clean_up_tokenization_spaces=False,
            )
        return str(text)

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        try:
            with self._turn:
                text = self.transformers.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=True
                )
        except Exception as error:  # there is none, or it raises, or Jinja is missing
            reason = str(error).strip().split("\n")[0]
            raise CheckpointError(
                f"{self._folder}: its chat template cannot be used ({reason[:200]}); "
                "leave out chat: true, or add chat_template.jinja"
            ) from None
        return str(text)
