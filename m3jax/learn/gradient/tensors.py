"""The tensors of base and models: in device memory, or read from files one by one."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike, fspath
from typing import Any

from jax.sharding import NamedSharding

from m3jax.checkpoints.folder import Checkpoint, open_checkpoint
from m3jax.checkpoints.formats import tree
from m3jax.engine import in_memory
from m3jax.engine.inputs import TensorInputs
from m3jax.engine.lineup import align
from m3jax.engine.load import read_tensor
from m3jax.engine.trees import Leaf, align_trees
from m3jax.recipe import Recipe

Placed = Callable[[str, tuple[int, ...]], Any] | None  # name, shape -> sharding


class FromFiles(in_memory.Leaves):
    """Leaves that are read when they are asked for, and never kept.

    Attributes:
      names, sizes: as of `Leaves`.
      shapes: of all tensors.
    """

    def __init__(
        self,
        tensors: Sequence[TensorInputs],
        num_models: int,
        place: Placed,
    ):
        self.num_models = num_models
        self.names = [tensor.name for tensor in tensors]
        self.shapes = [tensor.shape for tensor in tensors]
        self.traced = False
        self._tensors = tensors
        self.leaves = _Read(tensors, place)
        self._merged = [
            i for i, t in enumerate(tensors) if t.merged and 0 not in t.shape
        ]
        sizes = [0] * len(tensors)
        for i in self._merged:
            sizes[i] = math.prod(tensors[i].shape)
        self.sizes = sizes

    @property
    def merged(self) -> list[int]:
        return self._merged

    def bytes_of(self, i: int) -> int:
        """Of a tensor, of base and all models together."""
        tensor = self._tensors[i]
        each = [source.dtype.itemsize for source in tensor.sources]
        return math.prod(tensor.shape) * sum(each)


class _Read(Sequence[Leaf]):
    def __init__(self, tensors: Sequence[TensorInputs], place: Placed):
        self._tensors, self._place = tensors, place

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, i: Any) -> Any:
        tensor = self._tensors[i]
        place = None if self._place is None else self._place(tensor.name, tensor.shape)
        arrays = [read_tensor(source, place) for source in tensor.sources]
        merged = tensor.merged and 0 not in tensor.shape
        if not merged:
            return Leaf(tensor.name, arrays[0], (), False, arrays[0].dtype, {})
        base = None if tensor.base is None else arrays.pop(0)
        models = tuple(arrays[: len(tensor.models)])
        dtype = tensor.dtype.numpy
        return Leaf(tensor.name, base, models, True, dtype, tensor.parts)


class Tensors:
    """Base and models, lined up.

    Attributes:
      bench: their leaves; see `in_memory.Leaves`.
      shapes, dtypes: of the leaves that are merged, by name; the dtypes are those of
        the output.
    """

    def __init__(
        self,
        bench: in_memory.Leaves,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, Any],
        structure: Callable[[Mapping[str, Any]], Any],
    ):
        self.bench = bench
        self.shapes = dict(shapes)
        self.dtypes = dict(dtypes)
        self._structure = structure

    @functools.cached_property
    def fixed(self) -> dict[str, Any]:
        """The arrays that are not merged, by name."""
        found = {
            name: self.bench.leaves[i].base
            for i, name in enumerate(self.bench.names)
            if name not in self.shapes
        }
        return {name: own for name, own in found.items() if _is_array(own)}

    def params(self, merged: Mapping[str, Any], fixed: Mapping[str, Any]) -> Any:
        """The pytree of a merged model."""
        return self._structure({**merged, **fixed})

    def sharding(self, name: str) -> NamedSharding | None:
        """How a merged tensor is split over devices."""
        if name not in self.shapes:
            return None
        leaf = self.bench.leaves[self.bench.names.index(name)]
        found = getattr(leaf.models[0], "sharding", None)
        return found if isinstance(found, NamedSharding) else None


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and hasattr(leaf, "shape")


def of_trees(base: Any, models: Sequence[Any], recipe: Recipe) -> Tensors:
    """The tensors of pytrees.

    Raises:
      CheckpointError: they do not fit each other, or hold NaN or infinity.
    """
    leaves, structure = align_trees(base, models, recipe)
    in_memory.check_inputs(leaves)
    bench = in_memory.Leaves(leaves, len(models))
    shapes = {own.name: own.models[0].shape for own in leaves if own.merged}
    others = {own.name: own.base for own in leaves if not own.merged}

    def params(every: Mapping[str, Any]) -> Any:
        return structure([every.get(n, others.get(n)) for n in bench.names])

    dtypes = {own.name: own.dtype for own in leaves if own.merged}
    return Tensors(bench, shapes, dtypes, params)


@contextlib.contextmanager
def of_files(
    base: str | PathLike[str] | None,
    models: Sequence[str | PathLike[str]],
    recipe: Recipe,
    place: Placed = None,
) -> Iterator[Tensors]:
    """The tensors of checkpoints, which stay in their files.

    Raises:
      CheckpointError: they cannot be read, or do not fit each other.
    """
    with contextlib.ExitStack() as stack:

        def opened(path: Any) -> Checkpoint:
            return stack.enter_context(open_checkpoint(fspath(path)))

        first = None if base is None else opened(base)
        others = [opened(model) for model in models]
        tensors = align(first, others, recipe).tensors
        bench = FromFiles(tensors, len(others), place)
        shapes = {bench.names[i]: bench.shapes[i] for i in bench.merged}
        paths = (first or others[0]).paths
        # A head that a tied model lacks has no path there.
        known = None if paths is None or set(bench.names) - set(paths) else paths
        dtypes = {tensors[i].name: tensors[i].dtype.numpy for i in bench.merged}
        yield Tensors(bench, shapes, dtypes, lambda every: tree.nest(every, known))
