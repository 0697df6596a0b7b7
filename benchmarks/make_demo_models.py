"""Makes the small trio that `m3jax demo` merges, in m3jax/demo_data.

    python benchmarks/make_demo_models.py

Three Llama-shaped models of 31,000 parameters: a base with random weights, and two
that differ from it as fine-tuned models do, each most in layers of its own.
"""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import app
from safetensors.numpy import save_file

HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY, KEY_VALUE = 32, 88, 2, 128, 16
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    for layer in range(LAYERS):
        for name, shape in {
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (KEY_VALUE, HIDDEN),
            "self_attn.v_proj": (KEY_VALUE, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
            "mlp.up_proj": (INTERMEDIATE, HIDDEN),
            "mlp.down_proj": (HIDDEN, INTERMEDIATE),
        }.items():
            found[f"model.layers.{layer}.{name}.weight"] = shape
    return found


def main(argv: list[str]) -> None:
    del argv
    folder = Path(__file__).parent.parent / "m3jax" / "demo_data"
    rng = np.random.default_rng(0)
    base = {
        name: rng.standard_normal(shape, np.float32) * 0.05 + ("norm" in name)
        for name, shape in shapes().items()
    }
    models = {"base": base}
    for i, model in enumerate(("maths", "code")):
        models[model] = {
            name: weights
            + rng.standard_normal(weights.shape, np.float32)
            * np.float32(0.004 if f"layers.{i}." in name else 0.001)
            for name, weights in base.items()
        }
    for model, tensors in models.items():
        (folder / model).mkdir(parents=True, exist_ok=True)
        save_file(
            {name: w.astype(ml_dtypes.bfloat16) for name, w in tensors.items()},
            folder / model / "model.safetensors",
            metadata={"format": "pt"},
        )
        (folder / model / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
