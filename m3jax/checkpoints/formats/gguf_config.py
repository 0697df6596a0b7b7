"""config.json of a GGUF file that has none beside it, made of the file's metadata.

The metadata say all that a Llama, Mistral, Qwen2 or Qwen3 needs. Only the factors of a
rope that is scaled by frequency stand in a tensor: then there is no config.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from m3jax.checkpoints.source import Stored

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_SIZES = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}
_TOKENS = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What a file says of the model.

    Attributes:
      architecture: as llama.cpp calls it.
      fields: numbers and short texts, by their full names.
      names: of the tensors, as the file has them.
    """

    architecture: str
    fields: Mapping[str, Any]
    names: frozenset[str]

    def count(self, name: str) -> int | None:
        """A field that is a positive integer."""
        found = self.fields.get(f"{self.architecture}.{name}")
        return found if type(found) is int and found > 0 else None

    def number(self, name: str) -> float | None:
        """A field that is a positive float32, as people write it: 1e-05."""
        found = self.fields.get(f"{self.architecture}.{name}")
        if type(found) is not float or not 0 < found < math.inf:
            return None
        return float(str(np.float32(found)))


def config_of(
    metadata: Metadata, tensors: Mapping[str, Stored]
) -> tuple[dict[str, Any] | None, str]:
    """config.json in transformers' fields, or None and what is lacking.

    Args:
      metadata: of the (first) file.
      tensors: by transformers' names.
    """
    counts = {ours: metadata.count(name) for name, ours in _SIZES.items()}
    lacking = [name for name, ours in _SIZES.items() if counts[ours] is None]
    epsilon = metadata.number("attention.layer_norm_rms_epsilon")
    embedding = tensors.get("model.embed_tokens.weight")
    if lacking or epsilon is None or embedding is None:
        return None, [*lacking, "the norms' epsilon or an embedding"][0]
    width, heads = counts["hidden_size"], counts["num_attention_heads"]
    assert width is not None
    assert heads is not None
    head_dim = metadata.count("attention.key_length") or width // heads
    rope, unknown = _rope(metadata, head_dim)
    if unknown:
        return None, unknown
    window = metadata.count("attention.sliding_window")
    kind = metadata.architecture
    kind = "mistral" if kind == "llama" and window else kind
    biased = any(name.endswith("q_proj.bias") for name in tensors)
    numbers = {ours: metadata.fields.get(own) for own, ours in _TOKENS.items()}
    return {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        **counts,
        "num_key_value_heads": metadata.count("attention.head_count_kv") or heads,
        "head_dim": head_dim,
        "rms_norm_eps": epsilon,
        **rope,
        "vocab_size": embedding.shape[0],
        "hidden_act": "silu",
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        **({"attention_bias": biased} if kind in ("llama", "qwen3") else {}),
        **({"sliding_window": window} if kind == "mistral" else {}),
        **{name: own for name, own in numbers.items() if type(own) is int},
        "torch_dtype": embedding.output_dtype.numpy.name,
    }, ""


def _rope(metadata: Metadata, head_dim: int) -> tuple[dict[str, Any], str]:
    """Its fields, or what is lacking for them."""
    if any(name.startswith("rope_") for name in metadata.names):
        return {}, "the scaling of its rope, of which it has the factors alone"
    if metadata.count("rope.dimension_count") not in (None, head_dim):
        return {}, "a rope of the heads' whole width"
    fields: dict[str, Any] = {"rope_theta": metadata.number("rope.freq_base") or 1e4}
    kind = metadata.fields.get(f"{metadata.architecture}.rope.scaling.type")
    if kind in (None, "none"):
        return fields, ""
    factor = metadata.number("rope.scaling.factor")
    if kind not in ("linear", "yarn") or factor is None:
        return {}, "a rope scaling of a known kind"
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    original = metadata.count("rope.scaling.original_context_length")
    if original is not None:
        scaling["original_max_position_embeddings"] = original
    return {**fields, "rope_scaling": scaling}, ""
