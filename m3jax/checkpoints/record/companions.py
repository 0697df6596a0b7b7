"""Which side files go along with an output, and whose they are.

The first checkpoint's (the base's), and the tokenizer's from the checkpoint that is
named for it. What the base has not and all models have with the same bytes is theirs:
a chat template, a generation config, a licence. Files that only make sense together
(a tokenizer's, the modules of sentence-transformers) come together or not at all, and
never beside a part of the base's own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from m3jax.checkpoints import side_files
from m3jax.checkpoints.folder import Checkpoint
from m3jax.checkpoints.places.files import Location

_TOKENIZER, _TEMPLATE, _SENTENCES, _CODE = "tokenizer", "template", "modules", "code"


class Companions(NamedTuple):
    """The side files of an output.

    Attributes:
      owners: the folder that each comes from, by name.
      notes: what comes from the models, one line.
    """

    owners: dict[str, Location]
    notes: list[str]


def choose(
    first: Checkpoint,
    tokenizer: Checkpoint,
    models: Sequence[Checkpoint],
    own: Collection[str] = (),
) -> Companions:
    """The side files of an output.

    Args:
      first: the base, or the first model where there is none.
      tokenizer: whose tokenizer goes along.
      models: those that are merged.
      own: files that are not taken from the models.

    Raises:
      CheckpointError: one that names others cannot be read.
    """
    ours = side_files.names_of(first.folder)
    owners = dict.fromkeys(ours, first.folder)
    if tokenizer is not first:
        owners = {n: f for n, f in owners.items() if side_files.belongs_to_model(n)}
        for name in side_files.names_of(tokenizer.folder):
            if not side_files.belongs_to_model(name) or (
                name.endswith(".py") and name not in owners
            ):
                owners[name] = tokenizer.folder
    taken = _agreed(first, models, owners)
    taken = {name: folder for name, folder in taken.items() if name not in own}
    owners |= taken
    notes = []
    if taken:
        few = ", ".join([*sorted(taken)[:4], "…"][: len(taken)])
        notes.append(
            f"{first.name} has no {few}; the models have the same, and theirs go"
        )
    return Companions(dict(sorted(owners.items())), notes)


def _agreed(
    first: Checkpoint, models: Sequence[Checkpoint], owners: Mapping[str, Location]
) -> dict[str, Location]:
    """What all models have with the same bytes, and nothing of its kind is there."""
    if first in models:
        return {}
    there = {_kind(name) for name in owners}
    config = side_files.read_side_file(first.folder, side_files.TOKENIZER_CONFIG)
    if b'"chat_template"' in (config or b""):
        there.add(_TEMPLATE)
    if side_files.CONFIG in owners:  # which names the code that it needs
        there.add(_CODE)
    groups: dict[str, set[str]] = defaultdict(set)
    for model in models:
        for name in side_files.names_of(model.folder):
            if _kind(name) not in there:
                groups[_kind(name)].add(name)
    found: dict[str, Location] = {}
    for names in groups.values():
        if all(_same(name, models) for name in names):
            found |= dict.fromkeys(names, models[0].folder)
    return found


def _same(name: str, models: Sequence[Checkpoint]) -> bool:
    contents = []
    for model in models:
        if name not in side_files.names_of(model.folder):
            return False
        contents.append(side_files.read_side_file(model.folder, name))
    return all(content == contents[0] for content in contents)


def _kind(name: str) -> str:
    """Files of one kind come together."""
    if name in side_files.OF_TOKENIZER or name.endswith(".tiktoken"):
        return _TOKENIZER
    if name in side_files.CHAT_TEMPLATES or name.endswith(".jinja"):
        return _TEMPLATE
    if name in side_files.SENTENCES or "/" in name:
        return _SENTENCES
    return _CODE if name.endswith(".py") else name
