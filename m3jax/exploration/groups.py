"""Groups of layers, as regular expressions on tensors' names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from m3jax.recipe import RecipeError
from m3jax.recipe.values import layer_of

_EMBEDDINGS = re.compile(r"embed|wte|wpe", re.IGNORECASE)


class Group(NamedTuple):
    """Some tensors.

    Attributes:
      name: in front of the fields of the group.
      pattern: is found in their names, and in those of no earlier group.
      layers: what it holds, in words.
    """

    name: str
    pattern: str
    layers: str


def num_layers(names: Sequence[str]) -> int:
    """How many layers the names have."""
    return len(_layers(names))


def layer_groups(
    names: Sequence[str], count: int, *, outside: bool = False
) -> tuple[Group, ...]:
    """So many groups of consecutive layers, as equal as they can be.

    Embeddings go with the first group, and what lies behind the layers with the last
    one, as in "Fine, I'll Merge It Myself"; or, as in Model-GLUE, all that lies outside
    the layers has a group of its own, the last.

    Args:
      names: of the tensors.
      count: of the groups.
      outside: make a group of what lies outside the layers.

    Raises:
      RecipeError: there are fewer layers than groups.
    """
    layers = _layers(names)
    if not 1 <= count <= len(layers):
        raise RecipeError(
            f"groups={count} needs 1 to {len(layers)}, the number of layers"
        )
    groups = []
    for g in range(count):
        own = [n for i, n in enumerate(layers) if i * count // len(layers) == g]
        # The first number of a name is that of its layer.
        pattern = rf"^(?:(?!\d+(?:\.|$))[^.]*\.)*(?:{'|'.join(map(str, own))})(?:\.|$)"
        if g == 0 and not outside:
            pattern += rf"|^(?!.*\.\d+(?:\.|$)).*(?i:{_EMBEDDINGS.pattern})"
        groups.append(
            Group(f"layers{own[0]}-{own[-1]}", pattern, f"{own[0]}–{own[-1]}")
        )
    if outside:
        return (*groups, Group("outside", "", "outside the layers"))
    last = groups[-1]
    return (*groups[:-1], last._replace(pattern=""))


def _layers(names: Sequence[str]) -> list[int]:
    return sorted({n for n in map(layer_of, names) if n is not None})
