"""What mergekit 0.1.5's tests take from tests/common.py, which its source distribution
lacks: tiny models, and merges, which are calls of m3jax's command line here.

It is loaded as a plugin of pytest (see black_box.py), so that a test which imports
`mergekit.merge.run_merge` gets the one below.
"""

from __future__ import annotations

import logging
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mergekit.merge
import torch
import transformers
from mergekit.options import MergeOptions
from safetensors.torch import load_file

_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
}


def run_merge(config: Any, out_path: str, options: MergeOptions) -> None:
    """Merges by `m3jax merge`; what it refuses is a ValueError with what it printed."""
    config_file = Path(f"{out_path}.yml")
    config_file.write_text(config.to_yaml())
    command = [
        os.environ["M3JAX_PYTHON"],
        *("-m", "m3jax", "merge", f"--config={config_file}", f"--output={out_path}"),
        *["--config.vocabulary=truncate"] * options.unsafe_truncate_embeddings,
        *["--nocopy_tokenizer"] * (not options.copy_tokenizer),
        "--nofsync",
    ]
    environment = {**os.environ, "PYTHONPATH": os.environ["M3JAX_PYTHONPATH"]}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    said = ran.stderr
    if ran.returncode:
        # In the words that mergekit's tests look for, where it says what they mean.
        shapes = "Tensor size mismatch: " if " has shape " in said else ""
        raise ValueError(f"{shapes}{said}")
    if "truncated" in said:
        logging.warning("UNSAFE vocabulary truncation: %s", said)


mergekit.merge.run_merge = run_merge


def run_and_check_merge(
    config: Any,
    validate: Callable[[str], None] | None = None,
    auto_arch: bool = False,
) -> None:
    """Merges; the output has a config, tensors without NaN, and is as `validate` says.

    Args:
      auto_arch: mergekit is to infer the architecture, which m3jax does not look at.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = f"{folder}/out"
        run_merge(config, output, MergeOptions(quiet=True))
        transformers.AutoConfig.from_pretrained(output)
        files = list(Path(output).glob("model*.safetensors"))
        assert files, "no tensors"
        for file in files:
            for name, tensor in load_file(file).items():
                assert not tensor.isnan().any(), name
        if validate is not None:
            validate(output)


def _saved(model: Any, path: Any) -> str:
    model.save_pretrained(path)
    return str(path)


def make_picollama(path: Any, vocab_size: int = 64) -> str:
    config = transformers.LlamaConfig(vocab_size=vocab_size, **_LLAMA)
    return _saved(transformers.LlamaForCausalLM(config), path)


def make_picogranite(path: Any, vocab_size: int = 64) -> str:
    config = transformers.GraniteConfig(vocab_size=vocab_size, **_LLAMA)
    return _saved(transformers.GraniteForCausalLM(config), path)


def make_gpt2size(path: Any, vocab_size: int = 64) -> str:
    """GPT-2's 12 layers, narrower."""
    config = transformers.GPT2Config(
        vocab_size=vocab_size, n_embd=32, n_head=4, n_layer=12, n_positions=64
    )
    return _saved(transformers.GPT2LMHeadModel(config).to(torch.float32), path)


def make_picoLlaVa(path: Any) -> str:
    vision = transformers.CLIPVisionConfig(**_LLAMA, image_size=32, patch_size=16)
    text = transformers.LlamaConfig(vocab_size=64, **_LLAMA)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text)
    return _saved(transformers.LlavaForConditionalGeneration(config), path)
