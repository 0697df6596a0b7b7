"""Vocabularies: which tensors have their rows, and how those of the models fit."""

from __future__ import annotations

import re
from collections.abc import Sequence

from m3jax.checkpoints.folder import Checkpoint
from m3jax.checkpoints.side_files import sizes
from m3jax.checkpoints.source import FirstRows, Source, WithMeanRows

_EMBEDDING = re.compile(
    r"(.*\.)?(embed_tokens|wte|word_embeddings|tok_embeddings|token_embedding|embed_in"
    r"|shared)\.weight|((backbone|rwkv|model)\.)?embeddings\.weight"
)
_HEAD = re.compile(
    r"(.*\.)?(lm_head|embed_out|output_layer|generator_lm_head|proj_out"
    r"|lm_head\.decoder|predictions(\.decoder)?)\.(weight|bias)"
    r"|(model\.)?output\.(weight|bias)"
)
_IN_A_LAYER = re.compile(r"(^|\.)\d+\.")
# Named so, a tensor whose rows differ is taken to have a row for each token.
_TENSORS = re.compile(
    r"(.*\.)?(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|embed_out"
    r"|lm_head|output)\.(weight|bias)"
)


def is_named(name: str) -> bool:
    """Whether it is the name of an embedding of tokens, or of a head over them."""
    known = _EMBEDDING.fullmatch(name) or _HEAD.fullmatch(name)
    return known is not None and _IN_A_LAYER.search(name) is None


def num_rows(checkpoint: Checkpoint) -> int | None:
    """Rows of a checkpoint's embedding of tokens; None where it has none."""
    found = [
        tensor.shape[0]
        for name, tensor in checkpoint.tensors.items()
        if _EMBEDDING.fullmatch(name) and is_named(name) and len(tensor.shape) == 2
    ]
    told = [size for _, size in sizes(checkpoint.config or {}) if size in found]
    return (told or found or [None])[0]


def _is_vocabulary(
    name: str, sources: Sequence[Source], checkpoints: Sequence[Checkpoint]
) -> bool:
    """Whether the sources differ by rows of the vocabulary alone."""
    if len({source.shape[1:] for source in sources}) > 1 or not sources[0].shape:
        return False
    told = all(
        source.shape[0] in dict(sizes(checkpoint.config or {})).values()
        for source, checkpoint in zip(sources, checkpoints, strict=True)
    )
    return told or _TENSORS.fullmatch(name) is not None or is_named(name)


def fit(
    name: str, sources: list[Source], checkpoints: list[Checkpoint], policy: str
) -> list[Source] | None:
    """Sources of the same number of rows, by row; None where that cannot be."""
    if policy not in ("mean", "truncate"):
        return None
    if not _is_vocabulary(name, sources, checkpoints):
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
    return (
        " (vocabulary sizes differ: set vocabulary to union or base, in mergekit's "
        "YAML tokenizer: {source: base}, to merge by token, to mean or truncate to "
        "merge by row)"
    )
