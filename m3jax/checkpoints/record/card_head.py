"""The YAML head of a model card, of which the hub makes filters and family trees.

It refuses a whole card for a `base_model` that is no id or a licence that it does not
know, so only what can be one is named; the text of the card has the rest.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.folder import Checkpoint
from m3jax.checkpoints.output.folder import MODEL_CARD
from m3jax.checkpoints.places import hub
from m3jax.checkpoints.places.files import Location, inside, open_file

_MAX_HEAD = 200_000  # bytes of a card that are looked through; results make them long
_HEAD = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]{0,60}")
_LINE = re.compile(
    r"[^\s|`<>](?:[^\t-\r|`<>]{0,198}[^\s|`<>])?"
)  # stands in a table, too
_OTHER = "other"  # the hub's word for a licence that has a name and a link of its own


@dataclasses.dataclass(frozen=True)
class Licence:
    """What a card's head says of it; the name and the link are of an `other` one."""

    license: str
    license_name: str = ""
    license_link: str = ""

    def __str__(self) -> str:
        return self.license_name or self.license


def head(recipe: Mapping[str, Any], parents: Mapping[str, Licence | None]) -> list[str]:
    """The lines of the head, without the --- around them.

    Args:
      recipe: its fields.
      parents: the licence of each checkpoint that was merged, by its name.
    """
    ids = filter(None, map(hub.repository, parents))
    tags = ["merge", "m3jax", *recipe["transforms"], recipe["method"]]
    fields: dict[str, Any] = {"library_name": "transformers", "tags": tags}
    if found := list(dict.fromkeys(ids)):
        fields |= {"base_model": found, "base_model_relation": "merge"}
    fields |= dataclasses.asdict(common) if (common := agreed(parents)) else {}
    lines = []
    for name, value in fields.items():
        if isinstance(value, list):
            lines += [f"{name}:", *[f"- {_scalar(own)}" for own in value]]
        elif value:
            lines.append(f"{name}: {_scalar(value)}")
    return lines


def agreed(parents: Mapping[str, Licence | None]) -> Licence | None:
    """The licence that all state; `other` where they differ, None where none does."""
    stated = set(parents.values())
    if stated <= {None}:
        return None
    return stated.pop() if len(stated) == 1 else Licence(_OTHER)


def parents_of(checkpoints: Sequence[Checkpoint]) -> dict[str, Licence | None]:
    """The licence of each that the checkpoints were put together of, by its name."""
    return {
        name: licence_of(folder)
        for checkpoint in checkpoints
        for name, folder in checkpoint.parents
    }


def licence_of(folder: Location) -> Licence | None:
    """What the head of a folder's model card says; None if that is nothing, or odd."""
    try:
        with open_file(inside(folder, MODEL_CARD)) as file:
            text = file.read(0, min(file.size, _MAX_HEAD)).decode(errors="replace")
    except (CheckpointError, OSError):
        return None
    if not (found := _HEAD.match(text.removeprefix("\ufeff"))):
        return None
    import yaml

    try:
        # The one of libyaml, where there is one, is ten times as fast.
        fields = yaml.load(found[1], getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, RecursionError, ValueError):
        return None
    if not isinstance(fields, dict):
        return None
    names = [field.name for field in dataclasses.fields(Licence)]
    given = {name: fields[name] for name in names if _is_line(fields.get(name))}
    if not _LICENCE.fullmatch(given.get("license", "")):
        return None
    own = Licence(**given)
    return own if own.license == _OTHER else Licence(own.license)


def _is_line(value: Any) -> bool:
    return isinstance(value, str) and _LINE.fullmatch(value) is not None


def _scalar(text: str) -> str:
    """YAML of a string: JSON's, where it is not plain."""
    return text if re.fullmatch(r"[A-Za-z][\w./-]*", text) else json.dumps(text)
