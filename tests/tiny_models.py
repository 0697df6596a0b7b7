"""Tiny random models of every family, in transformers' (torch) and in ours.

The weights are scaled so that attention is sharp, and norms, biases and their epsilon
matter: a model of freshly initialised weights attends evenly and would hide mistakes.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from m3jax.checkpoints.formats import tree
from m3jax.models.config import Config
from m3jax.models.decoder import parameter_shapes, read_config

VOCABULARY = 61
WINDOW = 5
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def _rope(kind: str, **numbers: float) -> dict[str, Any]:
    return {
        "rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **numbers},
    }


FAMILIES: dict[str, dict[str, Any]] = {
    "llama2": {"model_type": "llama"},
    "llama_linear": {"model_type": "llama", **_rope("linear", factor=3.0)},
    "llama3": {
        "model_type": "llama",
        **_rope(
            "llama3",
            factor=8.0,
            # One of the four wavelengths, 6 to 6283, is stretched in part.
            low_freq_factor=0.5,
            high_freq_factor=1.5,
            original_max_position_embeddings=64,
        ),
    },
    "llama_biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "smollm2": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": WINDOW},
    "mistral_nemo": {"model_type": "mistral", "sliding_window": None, "head_dim": 16},
    "qwen2": {"model_type": "qwen2"},
    "qwen2_window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    # Where depth does not matter: it compiles in half the time.
    "one_layer": {
        "model_type": "qwen3",
        "head_dim": 16,
        "tie_word_embeddings": True,
        "num_hidden_layers": 1,
    },
    "gpt2": {"model_type": "gpt2", "n_inner": 48},
    "gpt2_exact": {
        "model_type": "gpt2",
        "activation_function": "gelu",
        "tie_word_embeddings": False,
    },
}


def config_dict(family: str) -> dict[str, Any]:
    own = FAMILIES[family]
    return {**(_GPT2 if own["model_type"] == "gpt2" else _COMMON), **own}


@functools.cache
def config(family: str) -> Config:
    return read_config(config_dict(family))


@functools.cache
def tensors(family: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights of the family's shapes."""
    generator = np.random.default_rng(seed)
    found = {}
    for name, shape in parameter_shapes(config(family)).items():
        values = generator.standard_normal(shape)
        fan_in = shape[0] if ".c_" in name else shape[-1]
        if name.endswith("bias"):
            values = 0.5 * values
        elif "norm" in name or "ln_" in name:
            values = 1 + 0.3 * values
        elif "embed" in name or "wte" in name or "wpe" in name:
            values = 0.1 * values  # a mean square that the norm's epsilon touches
        elif "q_proj" in name or "k_proj" in name or "c_attn" in name:
            values = 1.5 * values / np.sqrt(fan_in)
        else:
            values = values / np.sqrt(fan_in)
        found[name] = values.astype(np.float32)
    return found


def parameters(family: str, seed: int = 0) -> dict[str, Any]:
    return tree.nest({n: jnp.asarray(t) for n, t in tensors(family, seed).items()})


@functools.cache
def reference(family: str) -> Any:
    """The same model in transformers, float32, with the plainest attention."""
    import torch
    import transformers

    fields = dict(config_dict(family))
    made = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    made._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(made).eval()
    state = {name: torch.tensor(tensor) for name, tensor in tensors(family).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    if missing:
        model.tie_weights()
    return model


def prompts(batch: int, length: int, seed: int = 1) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.integers(0, VOCABULARY, (batch, length), dtype=np.int32)
