"""Which tensor is split along which axis over the devices of a mesh."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from m3jax.checkpoints.errors import shown

Rule = tuple[str, int | PartitionSpec | None]

# The leading axis: a shard is then one stretch of the file. Merging does not care.
AXES = ("rows", "columns")  # of the meshes that `--mesh` names
DEFAULT_RULES: tuple[Rule, ...] = ((".*", 0),)


def by_rules(
    mesh: Mesh, rules: Sequence[Rule] = DEFAULT_RULES
) -> Callable[[str, tuple[int, ...]], Sharding]:
    """A function (name, shape) -> sharding, by the first rule that fits the name.

        >>> import jax
        >>> mesh = jax.make_mesh((1,), ("devices",))
        >>> choose = by_rules(mesh, [(r".*\\.(o|down)_proj\\.weight", 1), (".*", 0)])
        >>> sharding = choose("model.layers.0.mlp.down_proj.weight", (4096, 11008))
        >>> sharding.spec == PartitionSpec(None, "devices")
        True

    Args:
      mesh: of the devices.
      rules: pairs of a regular expression (`re.fullmatch`) and

        - an axis, which is split over the whole mesh. Where it does not divide, the
          first axis that does is split, and where none does, every device has a copy;
        - None: every device has a copy;
        - a `PartitionSpec`, as it is.

    Raises:
      ValueError: when called, if no rule fits the name, or a spec the shape.
    """

    def choose(name: str, shape: tuple[int, ...]) -> Sharding:
        for pattern, where in rules:
            if re.fullmatch(pattern, name):
                spec = (
                    where if isinstance(where, PartitionSpec) else along(where, shape)
                )
                return NamedSharding(mesh, spec)
        raise ValueError(
            f"no sharding rule fits tensor {shown(name)}; let the last rule be "
            "('.*', 0)"
        )

    def along(axis: int | None, shape: tuple[int, ...]) -> PartitionSpec:
        if axis is None:
            return PartitionSpec()
        axes = [axis, *range(len(shape))]
        for candidate in axes:
            if -len(shape) <= candidate < len(shape):
                size = shape[candidate]
                if size and size % mesh.size == 0:
                    before = [None] * (candidate % len(shape))
                    return PartitionSpec(*before, mesh.axis_names)
        return PartitionSpec()

    return choose


def make_mesh(axes: Mapping[str, int] | None, devices: Sequence[jax.Device]) -> Mesh:
    """A mesh of all devices.

    Args:
      axes: the size of each axis: ``{"rows": 2, "columns": 4}``; None: all in rows.
      devices: at least one.

    Raises:
      ValueError: an axis has another name, or the sizes do not fit the devices.
    """
    axes = {"rows": len(devices)} if axes is None else dict(axes)
    text = ",".join(f"{name}={size}" for name, size in axes.items())
    if not axes or not set(axes) <= set(AXES) or min(axes.values()) < 1:
        raise ValueError(f"mesh={text} needs sizes of {' and '.join(AXES)}")
    if math.prod(axes.values()) != len(devices):
        raise ValueError(
            f"mesh={text} has {math.prod(axes.values())} devices, there are "
            f"{len(devices)}; for example rows={len(devices)}"
        )
    return Mesh(np.array(devices).reshape(tuple(axes.values())), tuple(axes))


def over_devices(
    axes: Mapping[str, int] | None,
) -> Callable[[str, tuple[int, ...]], Sharding] | None:
    """A function (name, shape) -> sharding over a mesh of this process's devices.

    Args:
      axes: as for `make_mesh`, of the first so many devices; None gives None, which
        is one device for `m3jax.load`.

    Raises:
      ValueError: as `make_mesh` does.
    """
    if axes is None:
        return None
    mesh = make_mesh(axes, jax.local_devices()[: math.prod(axes.values())])
    return lambda name, shape: by_axes(mesh, shape)


def by_axes(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Splits a tensor's rows over the mesh's rows, its columns over its columns.

    Rows are the first axis, columns the last one. Where the size of that axis does not
    divide, the first axis that does is split instead, and where none does, the tensor
    is repeated along this axis of the mesh.
    """
    left = list(shape)
    names: list[tuple[str, ...]] = [() for _ in shape]
    for name, parts in mesh.shape.items():
        wanted = [0] if name == "rows" else [len(shape) - 1]
        for axis in [*wanted, *range(len(shape))] if shape else []:
            if left[axis] and left[axis] % parts == 0:
                left[axis] //= parts
                names[axis] += (name,)
                break
    return NamedSharding(mesh, PartitionSpec(*(own or None for own in names)))
