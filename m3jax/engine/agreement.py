"""What several processes must have in common to do one merge."""

from __future__ import annotations

import hashlib
import json

import jax
import jaxlib
import numpy as np

import m3jax
from m3jax.checkpoints.folder import Checkpoint
from m3jax.engine.prepared import Prepared


def facts(prepared: Prepared) -> dict[str, str]:
    """All that decides the output's bytes, by the name it has in an error.

    A checkpoint counts by its files' names and sizes and its tensors' names, dtypes
    and shapes, not by its path: every machine may have its own copy.
    """
    versions = {"m3jax": m3jax, "jax": jax, "jaxlib": jaxlib, "numpy": np}
    devices = {device.device_kind for device in prepared.devices}
    return {
        **{f"version of {name}": m.__version__ for name, m in versions.items()},
        "kind of device": ", ".join(sorted(devices)),
        "recipe": json.dumps(prepared.recipe.to_dict(), sort_keys=True),
        "seed": str(prepared.seed),
        "tokenizers": prepared.rows,
        **{
            f"setting {name}": str(getattr(prepared.execution, name))
            for name in ("allow_nonfinite", "executor", "mesh", "output_format")
        },
        "base": "none" if prepared.base is None else _digest(prepared.base),
        **{
            f"model {i}": _digest(model)
            for i, model in enumerate(prepared.models, start=1)
        },
    }


def _digest(checkpoint: Checkpoint) -> str:
    files = [[file.path.name, file.size] for file in checkpoint.files]
    tensors = [
        [name, tensor.dtype.code, list(tensor.shape)]
        for name, tensor in checkpoint.tensors.items()
    ]
    return hashlib.sha256(json.dumps([files, tensors]).encode()).hexdigest()
