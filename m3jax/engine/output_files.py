"""The files of an output, and what is in each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from m3jax.checkpoints.folder import Checkpoint
from m3jax.checkpoints.output.orbax_output import OrbaxShard
from m3jax.checkpoints.output.shards import Shard, make_shards, stem_of
from m3jax.engine import plan
from m3jax.engine.inputs import TensorInputs
from m3jax.recipe import Recipe, RecipeError, parse_size


def written_name(name: str, part: str) -> str:
    """The name, in the output, of what is made of a tensor for a part of it."""
    return f"{name}.{part}" if part else name


def output_files(
    tensors: Sequence[TensorInputs],
    sizes: Sequence[int],
    recipe: Recipe,
    output_format: str | None,
    first: Checkpoint,
) -> list[Shard]:
    """The files of the output: the model's, then one for each other part of it."""
    files: dict[str, list[Any]] = {"": []}
    for tensor in tensors:
        for part, own in tensor.parts.items():
            entry = written_name(tensor.name, part), own.dtype, own.stored_shape
            files.setdefault(part or tensor.file, []).append(entry)
    described = files.pop("")
    if (output_format or first.format) == "orbax":
        if files:
            raise RecipeError(
                f"method={recipe.method.name!r} writes files beside the model: give "
                "--output_format=safetensors"
            )
        return [OrbaxShard(described, first.paths)]
    groups = plan.split_shards(sizes, parse_size(recipe.max_shard_size))
    stem = stem_of([file.path.name for file in first.files])
    return [
        *make_shards([[described[i] for i in g] for g in groups], stem),
        *(Shard(f"{file}.safetensors", own) for file, own in files.items()),
    ]
