"""The tokens with which a model ends what it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from m3jax.checkpoints.json_text import load_json
from m3jax.checkpoints.side_files import read_config, read_side_file

_GENERATION = "generation_config.json"


def stop_tokens_of(folder: Path, eos_token: int | None) -> tuple[int, ...]:
    """The tokens that end a text, by all that a folder's files say."""
    generation = read_side_file(folder, _GENERATION)
    sources: list[dict[str, Any]] = [
        {} if generation is None else load_json(generation, str(folder / _GENERATION)),
        read_config(folder) or {},
        {"eos_token_id": eos_token},
    ]
    found: set[int] = set()
    for source in sources:
        tokens = source.get("eos_token_id")
        tokens = tokens if isinstance(tokens, list) else [tokens]
        found |= {token for token in tokens if isinstance(token, int)}
    return tuple(sorted(found))
