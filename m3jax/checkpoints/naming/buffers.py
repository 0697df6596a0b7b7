"""Tensors that are no weights: they follow from config.json, or count steps.

Older programs stored them, newer ones do not; loaders compute them anew. Their mean
would mean nothing.
"""

from __future__ import annotations

import re

from m3jax.checkpoints.source import Source

_NAMES = re.compile(
    r"(.*\.)?("
    # Rotary embeddings: Llama's of 2023, GPT-NeoX's, ESM's.
    r"(rotary_emb|rotary_pos_emb|rotary_embedding|rotary_embeddings)"
    r"\.(inv_freq|original_inv_freq|cos_cached|sin_cached)"
    # Causal masks: GPT-2's, GPT-Neo's, GPT-NeoX's.
    r"|(attn|attention|self_attn)\.masked_bias"
    # BERT's and CLIP's positions, Swin's and BEiT's.
    r"|embeddings\.(position_ids|token_type_ids)|position_ids"
    r"|relative_position_index"
    # BatchNorm's count of steps.
    r"|num_batches_tracked)"
)
# What their names end with: most tensors are told by it at once.
_ENDS = {
    "inv_freq",
    "original_inv_freq",
    "cos_cached",
    "sin_cached",
    "masked_bias",
    "position_ids",
    "token_type_ids",
    "relative_position_index",
    "num_batches_tracked",
    "bias",
}
_MASK = re.compile(r"(.*\.)?(attn|attention|self_attn)\.bias")


def is_buffer(name: str, source: Source) -> bool:
    """Whether a tensor is one; an attention's `bias` is where it is a square mask."""
    if name.rpartition(".")[2] not in _ENDS:
        return False
    if _NAMES.fullmatch(name):
        return True
    shape = source.shape
    mask = len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    return mask and _MASK.fullmatch(name) is not None
