"""Names of tensors and the nested dicts (pytrees) that hold them.

The tensor "model.norm.weight" is the leaf tree["model"]["norm"]["weight"], as
`flax.traverse_util` nests it. The name decides a tensor's DARE mask, its group of
ratios and whether it is excluded, so a pytree of any other kind has names too: its
keys, attributes and indices, joined by ".".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from m3jax.checkpoints.errors import CheckpointError, shown

SEPARATOR = "."


def nest(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts of tensors, their names split at ".".

    Raises:
      CheckpointError: a name is also the beginning of another one.
    """
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *parents, last = name.split(SEPARATOR)
        node: Any = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                break
        if not isinstance(node, dict) or last in node:
            raise CheckpointError(
                f"tensor {shown(name)} and one whose name it begins, or that begins "
                "its name, cannot both be leaves of a nested dict"
            )
        node[last] = tensor
    return tree


def flatten(tree: Any) -> tuple[dict[str, Any], Any]:
    """The leaves of a pytree by name, in the order of its leaves, and its structure.

    Raises:
      CheckpointError: two leaves have one name.
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    leaves: dict[str, Any] = {}
    for path, leaf in paths:
        name = SEPARATOR.join(_part(key) for key in path)
        if name in leaves:
            raise CheckpointError(f"two tensors of the pytree are named {shown(name)}")
        leaves[name] = leaf
    return leaves, structure


def _part(key: Any) -> str:
    """One step of a path: a dict's key, an attribute's name or an index."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
