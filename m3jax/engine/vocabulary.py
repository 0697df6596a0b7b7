"""Vocabularies of different sizes: which tensors have their rows, and how they fit."""

from __future__ import annotations

import re

from m3jax.checkpoints.folder import Checkpoint
from m3jax.checkpoints.source import FirstRows, Source, WithMeanRows

_TENSORS = re.compile(
    r"(.*\.)?(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|embed_out"
    r"|lm_head|output)\.(weight|bias)"
)


def _is_vocabulary(
    name: str, sources: list[Source], checkpoints: list[Checkpoint]
) -> bool:
    """Whether the sources differ by rows of the vocabulary alone."""
    if len({source.shape[1:] for source in sources}) > 1 or not sources[0].shape:
        return False
    sizes = [(checkpoint.config or {}).get("vocab_size") for checkpoint in checkpoints]
    rows = [source.shape[0] for source in sources]
    return sizes == rows or _TENSORS.fullmatch(name) is not None


def fit(
    name: str, sources: list[Source], checkpoints: list[Checkpoint], policy: str
) -> list[Source] | None:
    if policy == "error" or not _is_vocabulary(name, sources, checkpoints):
        return None
    rows = [source.shape[0] for source in sources]
    if policy == "truncate":
        return [FirstRows(source, min(rows)) for source in sources]
    if min(rows) == 0 or sources[0].dtype.kind == "exact":  # has no mean
        return None
    return [
        source if source.shape[0] == max(rows) else WithMeanRows(source, max(rows))
        for source in sources
    ]


def hint(name: str, sources: list[Source], checkpoints: list[Checkpoint]) -> str:
    if not _is_vocabulary(name, sources, checkpoints):
        return ""
    return " (vocabulary sizes differ: set vocabulary to mean or truncate)"
