"""How like each other models are, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from m3jax.commands import tensor_names
from m3jax.commands.tables import clean, number, table
from m3jax.engine.similarity import Pairs, Similarity, add
from m3jax.evaluation import results


def lines(found: Similarity) -> list[str]:
    """A table of all pairs for each layer, and one for the whole."""
    letters = [chr(65 + i) if i < 26 else str(i) for i in range(len(found.names))]
    told = [f"{x}  {clean(n)}" for x, n in zip(letters, found.names, strict=True)]
    pairs = [(i, j) for j in range(len(letters)) for i in range(j)]
    for of, tensors in found.tensors.items():
        header = (
            of,
            *(f"‖{letter}‖" for letter in letters),
            *(f"cos {letters[i]}{letters[j]}" for i, j in pairs),
            *(f"sign {letters[i]}{letters[j]}" for i, j in pairs),
        )
        rows = [(name, add(own)) for name, own in by_layer(tensors).items()]
        rows.append((f"all {len(tensors)} tensors", found.total(of)))
        cells = [_cells(name, own, pairs) for name, own in rows]
        told += ["", *table(header, cells, "<" + ">" * (len(header) - 1))]
    notes = [f"note: {clean(note)}" for note in found.notes]
    return [*told, *([""] if notes else []), *notes]


def by_layer(tensors: Mapping[str, Pairs]) -> dict[str, list[Pairs]]:
    """The pairs of the tensors of each layer; those outside by name."""
    named = [(tensor_names.describe(name), name) for name in tensors]
    named.sort(key=lambda item: item[0].order)
    groups: dict[str, list[Pairs]] = {}
    for described, name in named:
        outside = described.layer is None
        layer = name if outside else f"{described.stack}.{described.layer}".strip(".")
        groups.setdefault(layer, []).append(tensors[name])
    return groups


def _cells(name: str, own: Pairs, pairs: list[tuple[int, int]]) -> tuple[str, ...]:
    return (
        clean(name),
        *(number(norm, ".4g") for norm in own.norms),
        *(number(own.cosines[pair], ".4f") for pair in pairs),
        *(number(own.sign_agreement[pair], ".4f") for pair in pairs),
    )


def as_json(found: Similarity) -> dict[str, Any]:
    """All numbers; None where one is undefined."""
    return {
        "models": found.names,
        **{
            of.replace(" ", "_"): {
                "whole": _pairs_as_json(found.total(of)),
                "layers": {
                    name: _pairs_as_json(add(own))
                    for name, own in by_layer(tensors).items()
                },
                "tensors": {name: _pairs_as_json(own) for name, own in tensors.items()},
            }
            for of, tensors in found.tensors.items()
        },
        "notes": found.notes,
    }


def _pairs_as_json(own: Pairs) -> dict[str, Any]:
    found = {
        "elements": own.elements,
        "norms": own.norms.tolist(),
        "cosine": own.cosines.tolist(),
        "sign_agreement": own.sign_agreement.tolist(),
    }
    return results.as_json(found)
