"""How a tensor lies on the devices that hold it, in integers.

A device's shard of a tensor is a number of runs: stretches of elements that follow
each other in the whole tensor's row-major order. Rows shared out over a mesh are one
run each, columns one run per row. A run is known by the number of its first element,
and that is all that a DARE mask needs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from m3jax.prng import LANES
from m3jax.traced import is_traced

REPEATED = PartitionSpec()  # every device has the whole tensor


@dataclasses.dataclass(frozen=True)
class Placement:
    """A tensor's shape, and the mesh axes over which each of its axes is split.

    Attributes:
      shape: of the whole tensor.
      mesh: None where one device holds the whole tensor.
      spec: as in `jax.sharding.NamedSharding`.
    """

    shape: tuple[int, ...]
    mesh: Mesh | None = None
    spec: PartitionSpec = REPEATED

    @classmethod
    def of(cls, array: Any) -> Placement:
        """Where `array` is. What is not a `NamedSharding` is left to XLA."""
        if is_traced(array):
            return cls(array.shape)
        sharding = getattr(array, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            return cls(array.shape, sharding.mesh, sharding.spec)
        return cls(array.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def mesh_axes(self) -> tuple[tuple[str, ...], ...]:
        """Per axis of the tensor, the mesh axes that split it."""
        entries = [*self.spec, *[None] * (len(self.shape) - len(self.spec))]
        return tuple(
            () if entry is None else (entry,) if isinstance(entry, str) else entry
            for entry in entries
        )

    @property
    def splitting_axes(self) -> tuple[str, ...]:
        """The mesh axes along which shards differ; along the others they repeat."""
        return tuple(name for names in self.mesh_axes for name in names)

    @functools.cached_property
    def parts(self) -> tuple[int, ...]:
        """Into how many parts each axis is split."""
        if self.mesh is None:
            return (1,) * len(self.shape)
        sizes = self.mesh.shape
        return tuple(math.prod(sizes[n] for n in names) for names in self.mesh_axes)

    @property
    def shard_shape(self) -> tuple[int, ...]:
        return tuple(n // p for n, p in zip(self.shape, self.parts, strict=True))

    @property
    def run_axis(self) -> int:
        """The last axis that is split; a run spans it and all axes behind it."""
        return max((axis for axis, p in enumerate(self.parts) if p > 1), default=0)

    @property
    def run_size(self) -> int:
        """Elements of a run."""
        return math.prod(self.shard_shape[self.run_axis :])

    @property
    def runs_shape(self) -> tuple[int, ...]:
        """A shard's runs, by their place along the axes before `run_axis`."""
        return self.shard_shape[: self.run_axis]

    @property
    def aligned(self) -> bool:
        """Whether all runs start at a multiple of `LANES` elements."""
        if max(self.parts, default=1) == 1:
            return True
        behind = math.prod(self.shape[self.run_axis :])
        return self.run_size % LANES == 0 and (
            behind % LANES == 0 or math.prod(self.shape[: self.run_axis]) == 1
        )

    @property
    def runs_spec(self) -> PartitionSpec:
        """Layout of what has a leading axis, the axes of the runs, and a run's own."""
        return PartitionSpec(None, *self.mesh_axes[: self.run_axis + 1])

    @property
    def stack_spec(self) -> PartitionSpec:
        """Layout of what has a leading axis before the tensor's."""
        return PartitionSpec(None, *self.spec)


def run_starts(placement: Placement) -> tuple[jax.Array, jax.Array]:
    """The numbers of the first elements of this device's runs; inside `shard_map`.

    Returns:
      High and low words, (R, 1) uint32 each, for R runs in row-major order.
    """
    high = low = jnp.zeros((1,) * placement.run_axis, jnp.uint32)
    for axis, names in enumerate(placement.mesh_axes[: placement.run_axis + 1]):
        step = math.prod(placement.shape[axis + 1 :])
        count = placement.shard_shape[axis]
        if axis == placement.run_axis:  # a run spans it: only where the shard begins
            step, count = step * count, 1
        numbers = _multiples(step, count * placement.parts[axis])
        part = jax.lax.axis_index(names) if names else 0
        words = jax.lax.dynamic_slice_in_dim(numbers, part * count, count)
        place = [count if i == axis else 1 for i in range(placement.run_axis)]
        more_high, more_low = words[:, 0].reshape(place), words[:, 1].reshape(place)
        total = low + more_low
        high = high + more_high + (total < low).astype(jnp.uint32)
        low = total
    return high.reshape(-1, 1), low.reshape(-1, 1)


def _multiples(step: int, count: int) -> jax.Array:
    """High and low words of 0, step, 2 · step, …; (count, 2) uint32."""
    numbers = np.arange(count, dtype=np.uint64) * np.uint64(step)
    words = [numbers >> np.uint64(32), numbers & np.uint64(0xFFFFFFFF)]
    return jnp.asarray(np.stack(words, axis=-1).astype(np.uint32))
