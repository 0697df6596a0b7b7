"""The files beside the tensors: configuration, tokenizer, chat template.

They are copied from a fixed list of names, up to a size limit, and never executed.
A link that leads out of the folder is refused: a downloaded model could otherwise
have a private file of its user's published with the merge.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.formats.json_text import load_json
from m3jax.checkpoints.places.files import (
    Location,
    exists,
    inside,
    open_small,
    read_small,
)

CONFIG = "config.json"
VOCABULARY_FILES = (  # a tokenizer has at least one of them
    "sentencepiece.bpe.model",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
SIDE_FILES = (CONFIG, "generation_config.json", *TOKENIZER_FILES)
MAX_SIDE_FILE = 256_000_000  # bytes; the largest tokenizers are a tenth of it
_MAX_CONFIG = 8_000_000  # bytes; the longest lists of labels take an eighth of it


def check_side_files(folder: Location) -> None:
    """Checks that all side files can be read, before a long merge begins.

    Raises:
      CheckpointError: one is no regular file of the folder, or larger than the limit.
    """
    for name in SIDE_FILES:
        if exists(folder / name):
            open_small(inside(folder, name), MAX_SIDE_FILE).close()


def read_side_file(
    folder: Location, name: str, limit: int = MAX_SIDE_FILE
) -> bytes | None:
    """The content of a side file, or None where the folder has none.

    Raises:
      CheckpointError: it is no regular file of the folder, or larger than `limit`.
    """
    if not exists(folder / name):
        return None
    return read_small(inside(folder, name), limit)


def read_config(folder: Location) -> dict[str, Any] | None:
    """config.json as a dict, or None where there is none."""
    content = read_side_file(folder, CONFIG, _MAX_CONFIG)
    if content is None:
        return None
    # State-space models' time_step_limit is written as [0.0, Infinity].
    try:
        return load_json(content, str(folder / CONFIG), constants=True)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; fetch it again, or mend it") from None


def changed_config(content: bytes, changes: Mapping[str, Any]) -> bytes:
    """config.json with other fields: their dotted names and values, None to remove."""
    config = json.loads(content)
    for name, value in changes.items():
        *path, field = name.split(".")
        fields = functools.reduce(
            lambda own, key: own.setdefault(key, {}), path, config
        )
        fields.pop(field, None) if value is None else fields.update({field: value})
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
