"""Shapes of Llamas of several sizes."""

from __future__ import annotations

SIZES = {  # hidden, intermediate, layers, heads, key-value heads
    "10m": (256, 688, 4, 4, 2),
    "160m": (768, 2048, 16, 12, 12),
    "1.1b": (2048, 5632, 22, 32, 4),
    "7b": (4096, 11008, 32, 32, 32),
    "70b": (8192, 28672, 80, 64, 8),
}
VOCABULARY = 32000


def config(size: str) -> dict[str, object]:
    """config.json of a Llama of this size."""
    hidden, intermediate, layers, heads, kv_heads = SIZES[size]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
    }


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, as transformers names them."""
    hidden, intermediate, layers, heads, kv_heads = SIZES[size]
    kv = hidden // heads * kv_heads
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (VOCABULARY, hidden),
    }
    for layer in range(layers):
        own = {
            "input_layernorm.weight": (hidden,),
            "mlp.down_proj.weight": (hidden, intermediate),
            "mlp.gate_proj.weight": (intermediate, hidden),
            "mlp.up_proj.weight": (intermediate, hidden),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.k_proj.weight": (kv, hidden),
            "self_attn.o_proj.weight": (hidden, hidden),
            "self_attn.q_proj.weight": (hidden, hidden),
            "self_attn.v_proj.weight": (kv, hidden),
        }
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in own.items()}
    return found
