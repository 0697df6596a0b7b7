"""Which layers of which models stand where in the output, as data.

    slices = (
        Slice(models=(Piece(0, (0, 4)),)),
        Slice(models=(Piece(1, (2, 6)),)),
    )

is four layers of the first model and behind them four of the second: eight in all.
The models of one slice are merged. The first slice has the embeddings, the last one
norm and head. A `module` has slices of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from m3jax.recipe.problems import Problems, RecipeError, plain


@dataclasses.dataclass(frozen=True)
class Piece:
    """Layers of a model.

    Attributes:
      model: its place among the models; None: the base.
      layers: (first, stop); None: all, and what stands outside them.
    """

    model: int | None
    layers: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Slice:
    """Layers of the output.

    Attributes:
      models: what is merged, one piece per model that the method sees.
      base: what it is merged with; None without a base.
      module: the part of the model whose layers they are, a regular expression found
        in its tensors' names; "": all tensors that no other slice's module has.
    """

    models: tuple[Piece, ...]
    base: Piece | None = None
    module: str = ""

    @property
    def pieces(self) -> tuple[Piece, ...]:
        base = () if self.base is None else (self.base,)
        return (*base, *self.models)


def parse(slices: Any) -> tuple[Slice, ...]:
    """Slices from JSON, where they are what `dataclasses.asdict` makes of them.

    Raises:
      RecipeError: they are not.
    """
    if not isinstance(slices, (list, tuple)):
        raise RecipeError(f"slices={slices!r} needs a list of slices")
    return tuple(own if isinstance(own, Slice) else _slice(own) for own in slices)


def check(slices: tuple[Slice, ...], num_models: int, has_base: bool) -> int:
    """How many models each slice merges.

    Raises:
      RecipeError: they do not fit the checkpoints, or each other.
    """
    problems = Problems()
    counts = {len(own.models) for own in slices}
    if len(counts) > 1:
        problems.add("slices", sorted(counts), "as many models in each")
    for i, own in enumerate(slices):
        whole = {piece.layers is None for piece in own.pieces}
        lengths = {p.layers[1] - p.layers[0] for p in own.pieces if p.layers}
        if len(whole) > 1 or len(lengths) > 1 or min(lengths, default=1) < 1:
            shown = [piece.layers for piece in own.pieces]
            problems.add(f"slices[{i}]", shown, "as many layers of each, one or more")
        for piece in own.pieces:
            known = has_base if piece.model is None else piece.model < num_models
            if not known:
                allowed = f"one of {num_models} models" + ", or the base" * has_base
                problems.add(f"slices[{i}].model", piece.model, allowed)
    problems.raise_if_any()
    return counts.pop()


def _slice(own: Any) -> Slice:
    keys = {field.name for field in dataclasses.fields(Slice)}
    if not isinstance(own, Mapping) or not {"models"} <= set(own) <= keys:
        raise RecipeError(
            f"slices: {own!r} needs 'models', and may have 'base', 'module'"
        )
    base, module = own.get("base"), own.get("module", "")
    models = own["models"]
    problems = Problems()
    problems.patterns("slices.module", (module,))
    problems.raise_if_any()
    if not isinstance(models, Iterable) or not models:
        raise RecipeError(f"slices.models={models!r} needs one model or more")
    return Slice(
        tuple(map(_piece, models)), None if base is None else _piece(base), module
    )


def _piece(own: Any) -> Piece:
    model = own.get("model") if isinstance(own, Mapping) else own
    layers = plain(own.get("layers")) if isinstance(own, Mapping) else own
    numbers = layers or (0, 0)
    if (
        not isinstance(own, Mapping)
        or not set(own) <= {"model", "layers"}
        or not (model is None or (type(model) is int and model >= 0))
        or not isinstance(numbers, tuple)
        or [type(n) for n in numbers] != [int, int]
        or min(numbers) < 0
    ):
        raise RecipeError(
            f"slices: {own!r} needs 'model', a place among the models or null, and "
            "'layers', [first, stop] or null"
        )
    return Piece(model, layers)
