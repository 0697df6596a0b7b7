"""Small checkpoints for tests, written and read with the safetensors library alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

Tensors = dict[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

# Llama's names over shapes that no tile, mask block or vector register divides: a
# scalar, an empty tensor, a single element, three axes, and one of several tiles.
ODD_SHAPES: Shapes = {
    "model.embed_tokens.weight": (131, 29),
    "model.layers.0.self_attn.q_proj.weight": (1, 1),
    "model.layers.0.mlp.experts.weight": (3, 5, 7),
    "model.layers.0.norm.weight": (1025,),
    "model.layers.1.scale": (),
    "model.layers.1.nothing.weight": (0, 4),
    "model.layers.10.mlp.up_proj.weight": (43, 61),
    "model.norm.weight": (3,),
    "lm_head.weight": (131, 29),
}

_NAMES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def random_model(
    seed: int | np.random.Generator,
    shapes: Shapes = ODD_SHAPES,
    dtype: np.dtype | type = np.float32,
    base: Tensors | None = None,
) -> Tensors:
    """Normal tensors of deviation 0.02; with `base`, the base plus half as much."""
    generator = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        values = generator.normal(0, 0.02, shape)
        if base is not None:
            values = base[name].astype(np.float64) + values / 2
        tensors[name] = np.asarray(values).astype(dtype)
    return tensors


def encode(tensors: Tensors) -> bytes:
    """The bytes of a safetensors file, as the safetensors library writes it."""
    return safetensors.numpy.save(tensors, metadata={"format": "pt"})


def decode(content: bytes) -> Tensors:
    """The tensors of a safetensors file's bytes."""
    return {
        name: np.frombuffer(entry["data"], _NAMES[entry["dtype"]]).reshape(
            entry["shape"]
        )
        for name, entry in safetensors.deserialize(content)
    }


def write(
    folder: Path,
    tensors: Tensors,
    config: Mapping[str, Any] | None = None,
    shards: Sequence[Sequence[str]] | None = None,
) -> Path:
    """Writes a checkpoint folder, with an index where `shards` lists names per file."""
    folder.mkdir(parents=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if shards is None:
        (folder / "model.safetensors").write_bytes(encode(tensors))
        return folder
    weight_map = {}
    for i, names in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        (folder / file).write_bytes(encode({name: tensors[name] for name in names}))
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read(folder: Path) -> Tensors:
    """All tensors of a checkpoint folder."""
    found: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(decode(path.read_bytes()))
    return found


def digest(folder: Path) -> dict[str, str]:
    """A checksum of every file of a folder: equal where all bytes are."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }
