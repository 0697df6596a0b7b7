"""Lines up pytrees of arrays by the same rules as checkpoints (`engine.inputs`)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from m3jax.checkpoints.errors import CheckpointError, few, shown
from m3jax.checkpoints.folder import Checkpoint
from m3jax.checkpoints.formats import tree
from m3jax.checkpoints.formats.dtypes import Dtype, of_numpy
from m3jax.checkpoints.source import (
    Array,
    Converted,
    FirstRows,
    Repeated,
    Source,
    WithMeanRows,
)
from m3jax.engine.inputs import Part, TensorInputs
from m3jax.engine.lineup import align
from m3jax.recipe import Recipe, RecipeError
from m3jax.recipe.tokenizer import BY_ROW
from m3jax.traced import is_traced


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One tensor of the result and the arrays it is made of.

    Attributes:
      name: its path in the pytrees, joined by ".".
      base: None where nothing needs it.
      models: one array per model, sharded alike; none where `merged` is False.
      merged: False for a tensor that is copied: `base` then is the result.
      dtype: of the result.
      parts: what is made of it, by part of the output.
      beside: what comes beside each model, by name.
    """

    name: str
    base: Any
    models: tuple[Any, ...]
    merged: bool
    dtype: np.dtype
    parts: Mapping[str, Part]
    beside: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)

    @property
    def size(self) -> int:
        return math.prod(self.models[0].shape) if self.merged else 0

    @property
    def arrays(self) -> tuple[Any, ...]:
        own = () if self.base is None else (self.base,)
        return (*self.models, *own)

    @property
    def compute_dtype(self) -> Any:
        """Of the arithmetic: float64 where an array has it and JAX has 64 bits on."""
        wide = any(array.dtype == np.float64 for array in self.arrays)
        return np.float64 if wide and _x64() else np.float32

    @property
    def kernel_dtypes(self) -> tuple[tuple[str, str], ...]:
        """What the kernel rounds each part to."""
        narrow = self.compute_dtype == np.float32
        names = {
            part: "bool" if own.packed else own.dtype.numpy.name
            for part, own in self.parts.items()
        }
        return tuple(
            (part, "float32" if narrow and name == "float64" else name)
            for part, name in names.items()
        )

    def placed(self, unit: str, i: int) -> Leaf:
        """The leaf with its arrays where a step of that unit can see what it has to.

        Rows lie on one device each; a matrix lies on one device as a whole, another
        for each leaf i, or, where several processes share it, on every device.
        """
        first = self.models[0]
        sharding = getattr(first, "sharding", None) if not is_traced(first) else None
        leaf = self
        if unit == "row" and not first.shape:
            leaf = leaf._with(lambda array: jnp.reshape(array, (1,)))
        if unit == "element" or not isinstance(sharding, NamedSharding):
            return leaf
        where: Any = NamedSharding(sharding.mesh, PartitionSpec())
        if unit == "row":
            spec = [*sharding.spec, *[None] * (len(first.shape) - len(sharding.spec))]
            where = NamedSharding(sharding.mesh, PartitionSpec(*spec[:-1]))
        elif jax.process_count() == 1:
            where = sharding.mesh.devices.flat[i % sharding.mesh.size]
        return leaf._with(lambda array: jax.device_put(array, where))

    def back(self, values: Any) -> Any:
        """What was made of the placed leaf, where this one's arrays are."""
        first = self.models[0]
        values = values.reshape(first.shape) if values.size == first.size else values
        sharding = None if is_traced(first) else getattr(first, "sharding", None)
        same = values.shape == first.shape and not is_traced(values)
        if same and isinstance(sharding, NamedSharding) and values.sharding != sharding:
            return jax.device_put(values, sharding)
        return values

    def _with(self, change: Callable[[Any], Any]) -> Leaf:
        base = None if self.base is None else change(self.base)
        models = tuple(map(change, self.models))
        beside = {name: tuple(map(change, own)) for name, own in self.beside.items()}
        return dataclasses.replace(self, base=base, models=models, beside=beside)


@dataclasses.dataclass(frozen=True)
class ArraySource(Array):
    """An array of a pytree in the place of a tensor of a file."""

    value: Any

    def read_into(self, out: np.ndarray, start: int) -> None:
        """Whole rows only, which is how `WithMeanRows` reads."""
        width = math.prod(self.shape[1:])
        first, count = start // width, len(out) // width
        out[:] = np.asarray(self.value[first : first + count]).reshape(-1)


def align_trees(
    base: Any | None,
    models: Sequence[Any],
    recipe: Recipe,
    statistics: Sequence[Any] = (),
) -> tuple[tuple[Leaf, ...], Callable[[Any], Any]]:
    """The leaves of the result in the order of the first pytree, and what makes the
    pytree of them.

    What is no array of numbers (functions, random keys, words) is taken from the first
    pytree; it has to be equal in all, unless it is excluded.

    Raises:
      CheckpointError: naming the leaves that are missing, extra, of another shape or
        kind, or whose dtype cannot be merged.
    """
    if recipe.vocabulary not in BY_ROW:
        raise RecipeError(
            f"vocabulary={recipe.vocabulary!r} merges by token, and pytrees have no "
            "tokenizers: merge the checkpoints' files, with m3jax.merge"
        )
    names = [f"models[{i}]" for i in range(len(models))]
    trees = [tree.flatten(model) for model in models]
    if base is not None:
        names, trees = ["base", *names], [tree.flatten(base), *trees]
    order, structure = trees[0]
    checkpoints = [
        _as_checkpoint(name, own) for name, (own, _) in zip(names, trees, strict=True)
    ]
    beside = [
        _as_checkpoint(f"statistics[{i}]", tree.flatten(own)[0])
        for i, own in enumerate(statistics)
    ]
    others = {
        name for own, _ in trees for name, leaf in own.items() if not _merges(leaf)
    }
    _check_others(others, names, [own for own, _ in trees], recipe)
    by_name: dict[str, TensorInputs] = {}
    if set(order) - others:
        first = None if base is None else checkpoints[0]
        inputs = align(first, checkpoints[base is not None :], recipe, beside)
        by_name = {tensor.name: tensor for tensor in inputs.tensors}
    if recipe.slices:
        if others:
            raise RecipeError(
                f"slices need arrays alone, and {shown(min(others))} is none"
            )
        everything = [base, *models] if base is not None else models
        paths = dict(zip(names, map(tree.key_paths, everything), strict=True))
        return tuple(
            _leaf(tensor, names, recipe) for tensor in by_name.values()
        ), _structure(by_name, paths)
    return tuple(
        _leaf(by_name[name], names, recipe)
        if name in by_name
        else Leaf(name, leaf, (), False, np.dtype(object), {})
        for name, leaf in order.items()
    ), structure


def _structure(
    tensors: Mapping[str, TensorInputs],
    paths: Mapping[str, Mapping[str, tree.KeyPath]],
) -> Callable[[Any], Any]:
    """What makes nested dicts and lists of the leaves of slices.

    A leaf's keys are those of the first array that it is made of, but for the layer.
    """
    keys = {}
    for name, tensor in tensors.items():
        origin = tensor.origins[0]
        words, path = name.split(tree.SEPARATOR), []
        for key in paths[origin.owner.name][origin.name]:
            count = str(key).count(tree.SEPARATOR) + 1
            own, words = words[:count], words[count:]
            path.append(type(key)(tree.SEPARATOR.join(own)))
        keys[name] = tuple(path)
    return lambda leaves: tree.nest(dict(zip(tensors, leaves, strict=True)), keys)


def _as_checkpoint(name: str, leaves: Mapping[str, Any]) -> Checkpoint:
    """The arrays of a pytree in the place of a checkpoint's tensors."""
    return Checkpoint(
        name=name,
        location=Path(name),
        revision=None,
        stored={},
        tensors={n: ArraySource(leaf) for n, leaf in leaves.items() if _merges(leaf)},
        files=(),
        config=None,
    )


def _leaf(tensor: TensorInputs, names: Sequence[str], recipe: Recipe) -> Leaf:
    base = () if tensor.base is None else (tensor.base,)
    own_origins = (*base, *tensor.models)
    arrays = _alike([_array(origin.source) for origin in own_origins])
    dtype = _result_dtype(tensor.dtype, recipe)
    if not tensor.merged:
        _check_equal(tensor.name, names, arrays)
        return Leaf(tensor.name, arrays[0], (), False, dtype, tensor.parts)
    if 0 in tensor.shape:
        empty = jnp.asarray(arrays[0], dtype)
        return Leaf(tensor.name, empty, (), False, dtype, tensor.parts)
    if tensor.wide and _x64() and all(a.dtype != np.float64 for a in arrays):
        # It is a base that nothing reads that makes the arithmetic wide.
        arrays[-1] = jnp.asarray(arrays[-1], np.float64)
    own = None if tensor.base is None else arrays.pop(0)
    beside = {
        name: tuple(jnp.asarray(_array(origin.source)) for origin in origins)
        for name, origins in tensor.beside.items()
    }
    return Leaf(tensor.name, own, tuple(arrays), True, dtype, tensor.parts, beside)


def _merges(leaf: Any) -> bool:
    """Whether it is an array of numbers that a checkpoint could hold."""
    try:
        return hasattr(leaf, "shape") and bool(of_numpy(leaf.dtype))
    except (AttributeError, TypeError, ValueError):
        return False


def _check_others(
    others: set[str],
    names: Sequence[str],
    trees: Sequence[Mapping[str, Any]],
    recipe: Recipe,
) -> None:
    """Raises CheckpointError where what cannot be merged differs."""
    problems = []
    holders = list(zip(names, trees, strict=True))
    for name in sorted(others):
        if recipe.excludes(name):
            continue
        for who, own in holders[1:]:
            if not (name in own and name in trees[0]) or not _equal(
                trees[0][name], own[name]
            ):
                where, leaf = next(
                    (holder, tree[name])
                    for holder, tree in holders
                    if name in tree and not _merges(tree[name])
                )
                what = getattr(leaf, "dtype", type(leaf).__name__)
                problems.append(
                    f"{where}: {shown(name)} is {what}, no array of numbers, and "
                    f"differs between {names[0]} and {who}; exclude it to take the "
                    "former's"
                )
                break
    for who, own in zip(names, trees, strict=True):
        problems += [
            f"{who}: {shown(name)} is {leaf.dtype}: codes without their scales; "
            "dequantise it first, as m3jax.load does"
            for name, leaf in own.items()
            if _merges(leaf) and of_numpy(leaf.dtype).kind == "float8"
        ]
    if problems:
        raise CheckpointError(few(problems))


def _equal(a: Any, b: Any) -> bool:
    if hasattr(a, "dtype") and jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
        if getattr(b, "dtype", None) != a.dtype:
            return False
        a, b = jax.random.key_data(a), jax.random.key_data(b)
        return is_traced(a) or is_traced(b) or np.array_equal(a, b)
    if a is b:
        return True
    try:
        return type(a) is type(b) and bool(a == b)
    except (TypeError, ValueError):
        return False


def _array(source: Source) -> Any:
    """The array that a source stands for; kernels make it float32 by themselves."""
    if isinstance(source, ArraySource):
        return source.value
    if isinstance(source, Converted):
        return _array(source.source)
    if isinstance(source, Repeated):
        return jnp.broadcast_to(_array(source.source), source.shape)
    if isinstance(source, FirstRows):
        array = _array(source.source)
        return _placed_as(array, array[: source.rows])
    assert isinstance(source, WithMeanRows)
    array = _array(source.source)
    shape = (source.rows - array.shape[0], *array.shape[1:])
    row = jnp.mean(array, axis=0) if is_traced(array) else source.mean
    mean = jnp.broadcast_to(row.reshape(1, *shape[1:]), shape)
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
        if is_traced(arrays[0]) or is_traced(other):
            continue  # nobody can look
        if not np.array_equal(np.asarray(arrays[0]), np.asarray(other)):
            raise CheckpointError(
                f"tensor {shown(name)} ({arrays[0].dtype}) differs between {names[0]} "
                f"and {other_name}; tensors that are not floating point cannot be "
                "merged and must be equal: exclude it to take the base's"
            )


def _result_dtype(dtype: Dtype, recipe: Recipe) -> np.dtype:
    """The dtype itself, or what JAX makes of it where 64 bits are off."""
    if dtype.code != "F64" or _x64():
        return dtype.numpy
    if recipe.dtype == "float64":
        raise RecipeError(
            "dtype='float64' needs jax.config.update('jax_enable_x64', True) for "
            "arrays in memory"
        )
    return np.dtype(np.float32)


def _x64() -> bool:
    return bool(jax.config.read("jax_enable_x64"))
