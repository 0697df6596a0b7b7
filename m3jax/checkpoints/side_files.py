"""The files beside the tensors: configuration, tokenizer, chat template.

They are copied from a fixed list of names, up to a size limit, and never executed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.safetensors import load_json, open_regular

CONFIG = "config.json"
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
SIDE_FILES = (CONFIG, "generation_config.json", *TOKENIZER_FILES)
MAX_SIDE_FILE = 256_000_000  # bytes; the largest tokenizers are a tenth of it


def read_side_file(folder: Path, name: str) -> bytes | None:
    """The content of a side file, or None where the folder has none.

    Raises:
      CheckpointError: if it is not a regular file within the size limit.
    """
    path = folder / name
    if not path.is_file() and not path.exists():
        return None
    with os.fdopen(open_regular(path), "rb") as file:
        content = file.read(MAX_SIDE_FILE + 1)
    if len(content) > MAX_SIDE_FILE:
        raise CheckpointError(f"{path}: larger than {MAX_SIDE_FILE} bytes")
    return content


def read_config(folder: Path) -> dict[str, Any] | None:
    """config.json as a dict, or None where there is none."""
    content = read_side_file(folder, CONFIG)
    return None if content is None else load_json(content, str(folder / CONFIG))
