"""Names of tensors and the nested dicts (pytrees) that hold them.

The tensor "model.norm.weight" is the leaf tree["model"]["norm"]["weight"], as
`flax.traverse_util` nests it. The name decides a tensor's DARE mask, its group of
ratios and whether it is excluded, so a pytree of any other kind has names too: its
keys, attributes and indices, joined by ".".
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from m3jax.checkpoints.errors import CheckpointError, shown

SEPARATOR = "."
# The way to a leaf: keys of dicts, and places in lists.
KeyPath: TypeAlias = tuple[str | int, ...]


def name_of(path: Iterable[str | int]) -> str:
    return SEPARATOR.join(map(str, path))


def path_of(name: str) -> KeyPath:
    return tuple(name.split(SEPARATOR))


def nest(
    tensors: Mapping[str, Any], paths: Mapping[str, KeyPath] | None = None
) -> dict[str, Any]:
    """Nested dicts (and lists) of tensors.

    Args:
      tensors: by name.
      paths: of each name; by default the name is split at ".".

    Raises:
      CheckpointError: a name is also the beginning of another one.
    """
    tree: dict[str | int, Any] = {}
    for name, tensor in tensors.items():
        *parents, last = path_of(name) if paths is None else paths[name]
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
    return _with_lists(tree)


def flatten(tree: Any) -> tuple[dict[str, Any], Callable[[Iterable[Any]], Any]]:
    """The leaves of a pytree by name, in the order of its leaves, and what makes a
    pytree of that structure of other leaves.

    A variable of `flax.nnx` is named as its place in the module: its ``value`` has no
    name of its own.

    Raises:
      CheckpointError: two leaves have one name.
    """
    # Imported here: what only reads names does not wait for it.
    import jax

    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    leaves: dict[str, Any] = {}
    for path, leaf in paths:
        name = name_of(_keys(path))
        if name in leaves:
            raise CheckpointError(f"two tensors of the pytree are named {shown(name)}")
        leaves[name] = leaf
    return leaves, functools.partial(jax.tree.unflatten, structure)


def key_paths(tree: Any) -> dict[str, KeyPath]:
    """The path of each leaf of a pytree, by its name; see `flatten`."""
    import jax

    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    keys = [_keys(path) for path, _ in paths]
    return {name_of(path): path for path in keys}


def _keys(path: Any) -> KeyPath:
    keys = tuple(map(_part, path))
    of_variable = len(keys) > 1 and getattr(path[-1], "name", None) == "value"
    return keys[:-1] if of_variable else keys


def _part(key: Any) -> str | int:
    """One step of a path: a dict's key, an attribute's name or an index."""
    if hasattr(key, "idx"):
        return int(key.idx)
    for attribute in ("key", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _with_lists(node: Any) -> Any:
    """Dicts whose keys are places in a list, as lists; None where a list has a gap."""
    if not isinstance(node, dict):
        return node
    children = {key: _with_lists(child) for key, child in node.items()}
    if not children or not all(isinstance(key, int) for key in children):
        return children
    return [children.get(i) for i in range(max(children) + 1)]
