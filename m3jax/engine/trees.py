"""Lines up pytrees of arrays by the same rules as checkpoints (`engine.inputs`)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from m3jax.checkpoints import tree
from m3jax.checkpoints.dtypes import Dtype, of_numpy
from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.folder import Checkpoint
from m3jax.checkpoints.sources import FirstRows, Float32, Source, WithMeanRows
from m3jax.engine.inputs import align
from m3jax.recipe import Recipe, RecipeError


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One tensor of the result and the arrays it is made of.

    Attributes:
      name: its path in the pytrees, joined by ".".
      base: None where nothing needs it.
      models: one array per model, sharded alike; none where `merged` is False.
      merged: False for a tensor that is copied: `base` then is the result.
      dtype: of the result.
    """

    name: str
    base: Any
    models: tuple[Any, ...]
    merged: bool
    dtype: np.dtype

    @property
    def size(self) -> int:
        return math.prod(self.models[0].shape) if self.merged else 0


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """An array of a pytree in the place of a tensor of a file."""

    array: Any

    @property
    def dtype(self) -> Dtype:
        return of_numpy(self.array.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def output_dtype(self) -> Dtype:
        return self.dtype

    def read_into(self, out: np.ndarray, start: int) -> None:
        """Whole rows only, which is how `WithMeanRows` reads."""
        width = math.prod(self.shape[1:])
        first, count = start // width, len(out) // width
        out[:] = np.asarray(self.array[first : first + count]).reshape(-1)


def align_trees(
    base: Any | None, models: Sequence[Any], recipe: Recipe
) -> tuple[tuple[Leaf, ...], Any]:
    """The leaves of the result in the order of the first pytree, and its structure.

    Raises:
      CheckpointError: naming the leaves that are missing, extra, of another shape or
        kind, or whose dtype cannot be merged.
    """
    names = [f"models[{i}]" for i in range(len(models))]
    trees = [tree.flatten(model) for model in models]
    if base is not None:
        names, trees = ["base", *names], [tree.flatten(base), *trees]
    checkpoints = [
        Checkpoint(
            name=name,
            location=Path(name),
            revision=None,
            stored={},
            tensors=_sources(name, leaves),
            files=(),
            config=None,
        )
        for name, (leaves, _) in zip(names, trees, strict=True)
    ]
    first = None if base is None else checkpoints[0]
    others = checkpoints if base is None else checkpoints[1:]
    inputs = align(first, others, recipe)
    by_name = {tensor.name: tensor for tensor in inputs.tensors}
    order, structure = trees[0]
    leaves = []
    for name in order:
        tensor = by_name[name]
        arrays = _alike([_array(source) for source in tensor.sources])
        if not tensor.merged:
            _check_equal(name, names, arrays)
        dtype = _result_dtype(tensor.dtype, recipe)
        if not tensor.merged:
            leaves.append(Leaf(name, arrays[0], (), False, dtype))
        elif 0 in tensor.shape:
            leaves.append(Leaf(name, jnp.asarray(arrays[0], dtype), (), False, dtype))
        else:
            own = None if tensor.base is None else arrays.pop(0)
            leaves.append(Leaf(name, own, tuple(arrays), True, dtype))
    return tuple(leaves), structure


def _sources(who: str, leaves: Mapping[str, Any]) -> dict[str, Source]:
    sources: dict[str, Source] = {}
    problems = []
    for name, leaf in leaves.items():
        try:
            sources[name] = ArraySource(leaf)
            kind = sources[name].dtype.kind
        except (AttributeError, TypeError, ValueError):
            kind = None
        if kind is None:
            what = getattr(leaf, "dtype", type(leaf).__name__)
            problems.append(
                f"{who}: {shown(name)} is {what}; needs an array of numbers"
            )
        elif kind == "float8":
            problems.append(
                f"{who}: {shown(name)} is {leaf.dtype}: codes without their scales; "
                "dequantise it first, as m3jax.load does"
            )
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError("; ".join(problems[:3]) + more)
    return sources


def _array(source: Source) -> Any:
    """The array that a source stands for; kernels make it float32 by themselves."""
    if isinstance(source, ArraySource):
        return source.array
    if isinstance(source, Float32):
        return _array(source.source)
    if isinstance(source, FirstRows):
        array = _array(source.source)
        return _placed_as(array, array[: source.rows])
    assert isinstance(source, WithMeanRows)
    array = _array(source.source)
    shape = (source.rows - array.shape[0], *array.shape[1:])
    mean = np.broadcast_to(source.mean.reshape(1, *shape[1:]), shape)
    return _placed_as(array, jnp.concatenate([jnp.asarray(array), mean]))


def _placed_as(old: Any, new: Any) -> Any:
    """`new` sharded as `old`, but for axes that no longer divide."""
    if not isinstance(getattr(old, "sharding", None), NamedSharding):
        return new
    mesh, spec = old.sharding.mesh, old.sharding.spec
    try:
        return jax.device_put(new, NamedSharding(mesh, spec))
    except ValueError:
        return jax.device_put(new, NamedSharding(mesh, PartitionSpec(None, *spec[1:])))


def _alike(arrays: list[Any]) -> list[Any]:
    """The arrays, sharded as the first of them that is a sharded array."""
    shardings = [getattr(array, "sharding", None) for array in arrays]
    wanted = next((s for s in shardings if isinstance(s, NamedSharding)), None)
    if wanted is None:
        return arrays
    return [
        array if sharding == wanted else jax.device_put(array, wanted)
        for array, sharding in zip(arrays, shardings, strict=True)
    ]


def _check_equal(name: str, names: Sequence[str], arrays: Sequence[Any]) -> None:
    """Raises CheckpointError unless a tensor that is copied is the same everywhere."""
    for other_name, other in zip(names[1:], arrays[1:], strict=False):
        if not np.array_equal(np.asarray(arrays[0]), np.asarray(other)):
            raise CheckpointError(
                f"tensor {shown(name)} ({arrays[0].dtype}) differs between {names[0]} "
                f"and {other_name}; tensors that are not floating point cannot be "
                "merged and must be equal: exclude it to take the base's"
            )


def _result_dtype(dtype: Dtype, recipe: Recipe) -> np.dtype:
    """The dtype itself, or what JAX makes of it where 64 bits are off."""
    if dtype.code != "F64" or jax.config.read("jax_enable_x64"):
        return dtype.numpy
    if recipe.dtype == "float64":
        raise RecipeError(
            "dtype='float64' needs jax.config.update('jax_enable_x64', True) for "
            "arrays in memory"
        )
    return np.dtype(np.float32)
