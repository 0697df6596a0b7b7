"""Which tensors of which checkpoints a recipe's slices put where in the output."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.folder import Checkpoint
from m3jax.checkpoints.source import Source
from m3jax.engine.inputs import Origin
from m3jax.recipe import Piece, Recipe
from m3jax.recipe.values import LAYER, layer_of, renumbered, stands_before

Slot = dict[str, Origin]  # one input of the merge: its tensors by the output's names


@dataclasses.dataclass(frozen=True)
class Stack:
    """The layers of a module of the output, in order.

    Attributes:
      module: its pattern; "" for all that no other module has.
      layers: for each, the first model that it is made of, and its layer there.
    """

    module: str
    layers: tuple[tuple[Checkpoint, int], ...]


def stacked(
    checkpoints: Sequence[Checkpoint],
    tables: Sequence[Mapping[str, Source]],
    recipe: Recipe,
    has_base: bool,
    problems: list[str],
) -> tuple[list[Slot], list[Stack]]:
    """The inputs of the merge as the recipe's slices make them, base first.

    Args:
      checkpoints: base first, if there is one.
      tables: their tensors by name.
      recipe: with slices.
      has_base: whether there is a base.
      problems: gets a line for each tensor that one model of a slice has and another
        has not; such a tensor stands in no slot.

    Raises:
      CheckpointError: a model has fewer layers, or more than one stack of them.
    """
    slots: list[Slot] = [{} for _ in recipe.slices[0].pieces]
    stacks = []
    order = list(dict.fromkeys(own.module for own in recipe.slices))
    owners = {name: _module_of(name, order) for name in set().union(*tables)}
    for module in order:
        slices = [own for own in recipe.slices if own.module == module]
        layers: list[tuple[Checkpoint, int]] = []
        for place, own in enumerate(slices):
            made = []
            for piece in own.pieces:
                index = 0 if piece.model is None else piece.model + has_base
                checkpoint, table = checkpoints[index], tables[index]
                where = (place, len(slices))
                names = [
                    name
                    for name in table
                    if _takes(owners[name], name, module, order, where)
                ]
                first, stop = _range(piece, names, checkpoint)
                made.append(_cut(checkpoint, table, names, (first, stop), len(layers)))
                if piece is own.models[0]:
                    taken = [(checkpoint, layer) for layer in range(first, stop)]
            layers += taken
            common = _common(made, recipe, problems)
            for slot, origins in zip(slots, made, strict=True):
                slot.update({n: origins[n] for n in common if n in origins})
        stacks.append(Stack(module, tuple(layers)))
    return slots, stacks


def _cut(
    owner: Checkpoint,
    table: Mapping[str, Source],
    names: Iterable[str],
    layers: tuple[int, int],
    at: int,
) -> Slot:
    """Tensors of some layers, and those outside all, by the names they get at `at`."""
    first, stop = layers
    return {
        renumbered(name, at - first): Origin(owner, name, table[name])
        for name in names
        for layer in [layer_of(name)]
        if layer is None or first <= layer < stop
    }


def _common(made: Sequence[Slot], recipe: Recipe, problems: list[str]) -> list[str]:
    """The names that all pieces of a slice have, or the first, if they are excluded."""
    names = set(made[0]).intersection(*made)
    for name in sorted(set().union(*made) - names):
        if recipe.excludes(name):
            names |= {name} & set(made[0])
            continue
        having = next(own[name] for own in made if name in own)
        owners = [next(iter(own.values())).owner for own in made if own]
        without = [
            owner.name
            for owner, own in zip(owners, made, strict=False)
            if name not in own
        ]
        problems.append(
            f"tensor {shown(name)}, {shown(having.name)} of {having.owner.name}, is "
            f"missing in {', '.join(without)}; exclude it, or merge models of one "
            "architecture"
        )
    return sorted(names)


def _module_of(name: str, patterns: Iterable[str]) -> str | None:
    """The module that has a tensor; None where none has it."""
    for pattern in patterns:
        if pattern and re.search(pattern, name):
            return pattern
    return "" if "" in patterns else None


def _takes(
    owner: str | None,
    name: str,
    module: str,
    order: Sequence[str],
    place: tuple[int, int],
) -> bool:
    """Whether a slice of a module has a tensor; `place`: which one, and of how many.

    Outside the layers, what stands before them comes from the first slice, the rest
    from the last; what no module has, likewise from the first and the last module.
    """
    end = 0 if stands_before(name) else -1
    if owner is None:
        owner = order[end]
    i, count = place
    return owner == module and (layer_of(name) is not None or i == end % count)


def _range(piece: Piece, names: list[str], owner: Checkpoint) -> tuple[int, int]:
    """The layers of a piece, [first, stop)."""
    found = {
        (name[: match.start()], int(match[1]))
        for name in names
        for match in [LAYER.search(name)]
        if match
    }
    count = max((layer for _, layer in found), default=-1) + 1
    if piece.layers is None:
        return 0, count
    stacks = sorted({prefix for prefix, _ in found})
    if len(stacks) > 1:
        few = ", ".join(map(shown, stacks[:3]))
        raise CheckpointError(
            f"{owner.name}: has layers in {few}; a range of layers needs to know of "
            "which: give slices under modules"
        )
    first, stop = piece.layers
    if stop > count:
        raise CheckpointError(
            f"layer_range [{first}, {stop}]: {owner.name} has {count} layers"
        )
    return first, stop
