"""Makes a Llama-shaped trio to measure with: a base and two fine-tuned models.

    python benchmarks/make_checkpoints.py --size=1.1b --output=/tmp/trio

The weights are random, bfloat16, and the fine-tuned models differ from the base as
real ones do: by steps so small that bfloat16 rounds many of them away (about half of
the entries are equal to the base's) and the rest to a few multiples of the last
place, so that a great many task-vector entries have equal magnitudes.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import app, flags
from llamas import SIZES, config, shapes

from m3jax.checkpoints.formats import safetensors
from m3jax.checkpoints.formats.dtypes import BFLOAT16
from m3jax.checkpoints.output.shards import index_json, make_shards
from m3jax.checkpoints.weights import INDEX
from m3jax.engine.plan import natural_order, split_shards

MODELS = ("base", "maths", "code")
_SHARD = 5 * 10**9
_BLOCK = 1 << 20  # elements drawn at a time

_SIZE = flags.DEFINE_enum("size", "1.1b", list(SIZES), "Shape of the models.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder to make.", required=True)
_SPARSE = flags.DEFINE_bool(
    "sparse", False, "Headers and holes alone: takes no disk, and all weights are 0."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the weights.")


def make(folder: Path, size: str, seed: int = 0, *, sparse: bool = False) -> None:
    """Writes base, maths and code under `folder`; what is there already is kept.

    Sparse files are for plans (`m3jax merge --dry_run`), which read headers alone.
    """
    if all((folder / model / "config.json").exists() for model in MODELS):
        return
    tensors = [(name, BFLOAT16, shape) for name, shape in shapes(size).items()]
    tensors.sort(key=lambda tensor: natural_order(tensor[0]))
    sizes = [2 * int(np.prod(shape)) for _, _, shape in tensors]
    shards = make_shards(
        [[tensors[i] for i in group] for group in split_shards(sizes, _SHARD)]
    )
    jobs: list[tuple[list[int], str, safetensors.TensorEntry]] = []
    for model in MODELS:
        (folder / model).mkdir(parents=True, exist_ok=True)
        if len(shards) > 1:
            (folder / model / INDEX).write_bytes(index_json(shards))
    for shard in shards:
        files = []
        for model in MODELS:
            fd = os.open(folder / model / shard.name, os.O_RDWR | os.O_CREAT, 0o644)
            os.ftruncate(fd, shard.size)
            os.pwrite(fd, shard.header, 0)
            files.append(fd)
        for name, entry in () if sparse else shard.entries.items():
            jobs.append((files, name, entry))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for filled in [pool.submit(_fill, *job, seed) for job in jobs]:
            filled.result()
    for model in MODELS:
        (folder / model / "config.json").write_text(json.dumps(config(size), indent=1))


def _fill(
    files: list[int], name: str, entry: safetensors.TensorEntry, seed: int
) -> None:
    words = [seed, *name.encode()]
    rng = np.random.Generator(np.random.SFC64(words))
    norm = name.endswith("norm.weight")
    for start in range(0, entry.size, _BLOCK):
        count = min(_BLOCK, entry.size - start)
        base = rng.standard_normal(count, np.float32) * np.float32(0.02)
        base = (base + 1 if norm else base).astype(ml_dtypes.bfloat16)
        wide = base.astype(np.float32)
        values = [base]
        for _ in MODELS[1:]:
            step = rng.standard_normal(count, np.float32) * np.float32(4e-5)
            values.append((wide + step).astype(ml_dtypes.bfloat16))
        for fd, array in zip(files, values, strict=True):
            os.pwrite(fd, array.view(np.uint8), entry.start + 2 * start)


def main(argv: list[str]) -> None:
    del argv
    make(Path(_OUTPUT.value), _SIZE.value, _SEED.value, sparse=_SPARSE.value)


if __name__ == "__main__":
    app.run(main)
