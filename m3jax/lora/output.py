"""Writes an adapter as PEFT does: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import m3jax
from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.formats import peft
from m3jax.checkpoints.formats.dtypes import of_numpy
from m3jax.checkpoints.output.destination import open_writer
from m3jax.checkpoints.output.folder import OutputFolder
from m3jax.checkpoints.output.shards import Shard
from m3jax.checkpoints.source import Array, Source, read
from m3jax.lora.factors import Pair

RECORD = "m3jax_lora.json"
DTYPES = ("float32", "bfloat16", "float16")  # of factors
_PART = 1 << 20  # elements that are copied at a time


class AdapterWriter:
    """Gathers what an adapter is to hold, and writes it at the end.

    Attributes:
      ranks: of each module that has a pair.
    """

    def __init__(self, dtype: str):
        """`dtype`: that of the factors."""
        self._dtype = of_numpy(dtype).numpy
        self._tensors: dict[str, Source] = {}
        self._saved: dict[str, None] = {}
        self._biases: list[str] = []
        self.ranks: dict[str, int] = {}

    def pair(self, module: str, pair: Pair, *, embedding: bool = False) -> Pair:
        """A module's low-rank change; returns it as it is stored, rounded."""
        rounded = Pair(*(own.astype(self._dtype) for own in pair))
        ends = ("_embedding_{}",) if embedding else ("_{}.weight",)
        for letter, own in zip("AB", rounded, strict=True):
            name = f"{peft.PREFIX}{module}.lora{ends[0].format(letter)}"
            self._tensors[name] = Array(np.ascontiguousarray(own), name)
        self.ranks[module] = pair.rank
        return Pair(*(own.astype(np.float64) for own in rounded))

    def whole(self, name: str, source: Source) -> None:
        """A tensor that stands as it is: of a module to save, or a bias."""
        module, _, kind = name.rpartition(".")
        if kind == "bias":
            self._biases.append(name)
        else:
            self._saved[module] = None
        self._tensors[peft.PREFIX + name] = source

    def write(
        self,
        output: str,
        *,
        base: str | None,
        modules: Collection[str],
        transposed: bool,
        task: str | None,
        record: Mapping[str, Any],
    ) -> None:
        """Writes the folder.

        Args:
          output: of this machine; there is none yet.
          base: what the adapter is put on.
          modules: of the base, so that short names can stand for many; none: unknown.
          transposed: its weights are stored (in, out).
          task: PEFT's ``task_type``.
          record: of how it was made.
        """
        if not self._tensors:
            raise CheckpointError(
                f"{output}: nothing to write, the adapter would change no tensor"
            )
        tensors = self._named_tensors()
        config = self._config(base, modules, transposed, task)
        shard = Shard(peft.WEIGHTS, [(n, s.dtype, s.shape) for n, s in tensors.items()])
        with OutputFolder(Path(output), overwrite=False, resume=False) as folder:
            folder.check_space(shard.size, largest=shard.size)
            writer = open_writer(folder, [shard])
            try:
                for name, source in tensors.items():
                    _copy(source, writer, shard.entries[name].start)
            finally:
                writer.close()
            folder.write(peft.CONFIG, _json(config))
            record = {"m3jax": m3jax.__version__, **record}
            folder.write(RECORD, _json(record))
            folder.commit(fsync=True)

    def _named_tensors(self) -> dict[str, Source]:
        """A targeted module's bias is that of its base layer."""
        made = dict(self._tensors)
        for name in self._biases:
            module = name.removesuffix(".bias")
            if module in self.ranks:
                plain = peft.PREFIX + name
                made[f"{peft.PREFIX}{module}.base_layer.bias"] = made.pop(plain)
        return dict(sorted(made.items()))

    def _config(
        self,
        base: str | None,
        modules: Collection[str],
        transposed: bool,
        task: str | None,
    ) -> dict[str, Any]:
        common = collections.Counter(self.ranks.values()).most_common(1)
        rank = common[0][0] if common else 1
        others = {name: own for name, own in self.ranks.items() if own != rank}
        return {
            "peft_type": "LORA",
            "task_type": task,
            "base_model_name_or_path": base,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": others,
            "alpha_pattern": others,
            "target_modules": peft.shortest(self.ranks, modules) or [],
            "modules_to_save": peft.shortest(self._saved, modules) or None,
            "bias": "all" if self._biases else "none",
            "fan_in_fan_out": transposed,
            "lora_dropout": 0.0,
            "use_rslora": False,
            "use_dora": False,
        }


def _copy(source: Source, writer: Any, start: int) -> None:
    size = math.prod(source.shape)
    for first in range(0, size, _PART):
        values = read(source, first, min(_PART, size - first))
        writer.write(0, start + first * values.itemsize, values)


def _json(fields: Mapping[str, Any]) -> bytes:
    return (json.dumps(fields, indent=1, ensure_ascii=False) + "\n").encode()


def task_of(config: Mapping[str, Any] | None) -> str | None:
    """PEFT's task of a model, by its class."""
    names: Iterable[Any] = (config or {}).get("architectures") or ()
    causal = any(isinstance(n, str) and n.endswith("ForCausalLM") for n in names)
    return "CAUSAL_LM" if causal else None
