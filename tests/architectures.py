"""Tiny random models of the architectures that the installed transformers can make.

Each is a class of transformers and the fields of its config that make it tiny. The
weights are drawn wide enough that a swapped or unmerged tensor changes what comes out.
"""

from __future__ import annotations

from typing import Any

_TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WIDE = {**_TEXT, "head_dim": 4}  # as hidden_size // heads says it for the others
_BERT = {n: v for n, v in _TEXT.items() if n != "num_key_value_heads"}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
_SHARED = {"shared_expert_intermediate_size": 8}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}
_TOWER = {**_VISION, "model_type": "siglip_vision_model"}
_BART = {
    "vocab_size": 64,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_SSM = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "vocab_size": 64}
_GPT = {"n_embd": 16, "n_head": 4, "n_layer": 2, "n_positions": 32, "vocab_size": 64}

# By name: the model's class, the config's fields. The config's class is the model's
# `config_class`.
CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", _TEXT),
    "qwen2_tied": ("Qwen2ForCausalLM", {**_TEXT, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", _WIDE),
    "gemma": ("GemmaForCausalLM", _WIDE),
    "gemma2": ("Gemma2ForCausalLM", _WIDE),
    "gemma3_text": ("Gemma3ForCausalLM", _WIDE),
    "mistral": ("MistralForCausalLM", _TEXT),
    "phi": ("PhiForCausalLM", _TEXT),
    "phi3": ("Phi3ForCausalLM", _TEXT),
    "olmo2": ("Olmo2ForCausalLM", _TEXT),
    "granite": ("GraniteForCausalLM", _TEXT),
    "smollm3": ("SmolLM3ForCausalLM", _TEXT),
    "cohere": ("CohereForCausalLM", _TEXT),
    "glm4": ("Glm4ForCausalLM", _WIDE),
    "starcoder2": ("Starcoder2ForCausalLM", _TEXT),
    "stablelm": ("StableLmForCausalLM", _TEXT),
    "mixtral": ("MixtralForCausalLM", {**_TEXT, "num_local_experts": 4}),
    "phimoe": ("PhimoeForCausalLM", {**_TEXT, "num_local_experts": 4}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {**_TEXT, **_MOE, **_SHARED}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**_WIDE, **_MOE}),
    "olmoe": ("OlmoeForCausalLM", {**_TEXT, **_MOE}),
    "gpt_oss": ("GptOssForCausalLM", {**_WIDE, "num_local_experts": 4}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {
            **_TEXT,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 4,
            "first_k_dense_replace": 1,
        },
    ),
    "qwen3_next": ("Qwen3NextForCausalLM", {**_WIDE, **_MOE, **_SHARED, **_LINEAR}),
    "qwen3_5_text": ("Qwen3_5ForCausalLM", {**_WIDE, **_LINEAR}),
    "llama4_text": (
        "Llama4ForCausalLM",
        {
            **_WIDE,
            "intermediate_size_mlp": 32,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
        },
    ),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        {
            **_WIDE,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "mamba": ("MambaForCausalLM", _SSM),
    "mamba2": (
        "Mamba2ForCausalLM",
        {**_SSM, "num_heads": 4, "head_dim": 8, "expand": 2, "n_groups": 1},
    ),
    "lfm2": (
        "Lfm2ForCausalLM",
        {**_TEXT, "full_attn_idxs": [1], "block_multiple_of": 8},
    ),
    "gpt2": ("GPT2LMHeadModel", _GPT),
    "gptj": ("GPTJForCausalLM", {**_GPT, "rotary_dim": 4}),
    "gpt_neox": ("GPTNeoXForCausalLM", _BERT),
    "opt": (
        "OPTForCausalLM",
        {
            "hidden_size": 16,
            "ffn_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 64,
            "word_embed_proj_dim": 16,
            "max_position_embeddings": 32,
        },
    ),
    "bloom": (
        "BloomForCausalLM",
        {"hidden_size": 16, "n_layer": 2, "n_head": 4, "vocab_size": 64},
    ),
    "falcon": (
        "FalconForCausalLM",
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 64,
        },
    ),
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", _BERT),
    "bert_bare": ("BertModel", _BERT),
    "bert_classifier": ("BertForSequenceClassification", _BERT),
    "roberta": ("RobertaForMaskedLM", _BERT),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"vocab_size": 64, "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 4},
    ),
    "electra": ("ElectraForMaskedLM", {**_BERT, "embedding_size": 16}),
    "albert": ("AlbertForMaskedLM", {**_BERT, "embedding_size": 8}),
    "deberta": ("DebertaV2ForMaskedLM", _BERT),
    "modernbert": ("ModernBertForMaskedLM", _BERT),
    "t5": (
        "T5ForConditionalGeneration",
        {
            "d_model": 16,
            "d_kv": 4,
            "d_ff": 32,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": 64,
            "decoder_start_token_id": 0,
        },
    ),
    "bart": ("BartForConditionalGeneration", _BART),
    "whisper": (
        "WhisperForConditionalGeneration",
        {**_BART, "num_mel_bins": 8, "max_source_positions": 8},
    ),
    "vit": ("ViTForImageClassification", _VISION),
    "dinov2": ("Dinov2Model", _VISION),
    "siglip": (
        "SiglipModel",
        {"text_config": {**_BERT, "projection_size": 16}, "vision_config": _VISION},
    ),
    "clip": (
        "CLIPModel",
        {"text_config": _BERT, "vision_config": _VISION, "projection_dim": 8},
    ),
    "clip_vision": ("CLIPVisionModel", _VISION),
    "llava": (
        "LlavaForConditionalGeneration",
        {
            "text_config": {**_TEXT, "model_type": "llama"},
            "vision_config": {**_VISION, "model_type": "clip_vision_model"},
            "image_token_index": 63,
        },
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**_WIDE, "model_type": "gemma3_text"},
            "vision_config": _TOWER,
            "mm_tokens_per_image": 4,
        },
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {
                **_TEXT,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [1, 1, 0],
                },
            },
            "vision_config": {
                "depth": 1,
                "embed_dim": 16,
                "hidden_size": 16,
                "num_heads": 2,
            },
        },
    ),
}
