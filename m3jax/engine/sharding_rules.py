"""Which tensor is split along which axis over the devices of a mesh."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from m3jax.checkpoints.errors import shown

Rule = tuple[str, int | PartitionSpec | None]

# The leading axis: a shard is then one stretch of the file. Merging does not care.
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
