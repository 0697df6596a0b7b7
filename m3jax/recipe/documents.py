"""Merges that feed each other: the result of one stands as a model in others."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from m3jax.recipe.problems import RecipeError
from m3jax.recipe.recipe import Recipe

_NAME = re.compile(r"\w[\w.-]*")


@dataclasses.dataclass(frozen=True)
class Document:
    """One merge.

    Attributes:
      base, models: paths, Hugging Face ids, or names of other documents.
      recipe: what to do with them.
      seed: None: it follows from that of the whole; see `seeded`.
      name: by which others call its result; None: it is the output.
    """

    base: str | None
    models: tuple[str, ...]
    recipe: Recipe
    seed: int | None = None
    name: str | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        return (*([] if self.base is None else [self.base]), *self.models)

    def seeded(self, seed: int) -> int:
        """The seed that it draws with, in a whole of this seed.

        One with a name that gives no seed has the first four bytes, little-endian, of
        SHA-256 of "SEED NAME": two documents merge models of the same place and tensors
        of the same names, and would drop the same entries of them.
        """
        if self.seed is not None:
            return self.seed
        if self.name is None:
            return seed
        digest = hashlib.sha256(f"{seed} {self.name}".encode()).digest()
        return int.from_bytes(digest[:4], "little")

    def renamed(self, names: Mapping[str, str]) -> Document:
        """The document with other names, or paths, for some of its inputs."""
        base = None if self.base is None else renamed(self.base, names)
        models = tuple(renamed(model, names) for model in self.models)
        recipe = self.recipe.renamed(lambda own: renamed(own, names))
        return dataclasses.replace(self, base=base, models=models, recipe=recipe)

    def to_dict(self) -> dict[str, Any]:
        names = [field.name for field in dataclasses.fields(self)]
        own = {name: getattr(self, name) for name in names}
        return {**own, "models": list(self.models), "recipe": self.recipe.to_dict()}

    @classmethod
    def from_dict(cls, own: Mapping[str, Any]) -> Document:
        """
        Raises:
          RecipeError: it is not what `to_dict` makes.
        """
        keys = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(own, Mapping) or set(own) != keys:
            raise RecipeError(f"documents: needs {', '.join(sorted(keys))} of each")
        models, recipe = tuple(map(str, own["models"])), Recipe.from_dict(own["recipe"])
        return cls(**{**own, "models": models, "recipe": recipe})


def renamed(reference: str, names: Mapping[str, str]) -> str:
    """A reference with another name in it; an adapter behind a + stays."""
    head, plus, adapter = reference.partition("+")
    return names.get(head, head) + plus + adapter


def with_output(documents: Sequence[Document]) -> Sequence[Document]:
    """The documents, of which one has no name: it is the output. Where all have one,
    it is the one that no other needs.

    Raises:
      RecipeError: there is not one of either.
    """
    unnamed = sum(own.name is None for own in documents)
    if unnamed == 1:
        return documents
    needed = {head.partition("+")[0] for own in documents for head in own.inputs}
    ends = [own.name for own in documents if own.name not in needed]
    if unnamed or len(ends) != 1:
        raise RecipeError(
            f"{unnamed} of {len(documents)} documents have no name, where one has to: "
            "it is the output"
        )
    return [
        dataclasses.replace(own, name=None) if own.name == ends[0] else own
        for own in documents
    ]


def in_order(documents: Sequence[Document]) -> tuple[Document, ...]:
    """What the output needs, each document behind those that it is made of.

    Returns:
      The documents; the last one has no name.

    Raises:
      RecipeError: which one is the output cannot be told, two have the same name, one
        cannot be that of a folder, or they need each other in a circle.
    """
    documents = with_output(documents)
    results = [own for own in documents if own.name is None]
    by_name: dict[str, Document] = {}
    for own in documents:
        if own.name is None:
            continue
        if not isinstance(own.name, str) or not _NAME.fullmatch(own.name):
            raise RecipeError(
                f"name={own.name!r} needs letters, digits, '.', '-' and '_' alone"
            )
        if own.name in by_name:
            raise RecipeError(f"two documents have the name {own.name!r}")
        by_name[own.name] = own
    found: list[Document] = []

    def add(own: Document, way: tuple[str, ...]) -> None:
        for reference in own.inputs:
            name = reference.partition("+")[0]
            if name in way:
                circle = " -> ".join((*way[way.index(name) :], name))
                raise RecipeError(f"documents need each other in a circle: {circle}")
            if name in by_name and by_name[name] not in found:
                add(by_name[name], (*way, name))
        found.append(own)

    add(results[0], ())
    return tuple(found)
