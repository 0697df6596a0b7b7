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
    owners = _all_of(first)
    if tokenizer is not first:
        owners = {n: f for n, f in owners.items() if side_files.belongs_to_model(n)}
        for name, folder in _all_of(tokenizer).items():
            if not side_files.belongs_to_model(name) or (
                name.endswith(".py") and name not in owners
            ):
                owners[name] = folder
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


def _all_of(checkpoint: Checkpoint) -> dict[str, Location]:
    """The side files of a checkpoint and their folders: an adapter's tokenizer, where
    it has one, is in the place of its base's."""
    own, words = checkpoint.folder, checkpoint.tokenizer_folder
    found = dict.fromkeys(side_files.names_of(own), own)
    if words == own:
        return found
    theirs = [
        name
        for name in side_files.names_of(words)
        if _kind(name) in (_TOKENIZER, _TEMPLATE)
    ]
    kinds = {_TOKENIZER, *map(_kind, theirs)}
    found = {name: own for name in found if _kind(name) not in kinds}
    return {**found, **dict.fromkeys(theirs, words)}


def _agreed(
    first: Checkpoint, models: Sequence[Checkpoint], owners: Mapping[str, Location]
) -> dict[str, Location]:
    """What all models have with the same bytes, and nothing of its kind is there."""
    if first in models:
        return {}
    there = {_kind(name) for name in owners}
    config = side_files.read_side_file(
        first.tokenizer_folder, side_files.TOKENIZER_CONFIG
    )
    if b'"chat_template"' in (config or b""):
        there.add(_TEMPLATE)
    if side_files.CONFIG in owners:  # which names the code that it needs
        there.add(_CODE)
    theirs = [_all_of(model) for model in models]
    groups: dict[str, set[str]] = defaultdict(set)
    for name in sorted(set().union(*theirs)):
        if _kind(name) not in there:
            groups[_kind(name)].add(name)
    found: dict[str, Location] = {}
    for names in groups.values():
        if all(_same(name, theirs) for name in names):
            found |= {name: theirs[0][name] for name in names}
    return found


def _same(name: str, owners: Sequence[Mapping[str, Location]]) -> bool:
    """Whether all have a file of that name, with the same bytes."""
    if not all(name in own for own in owners):
        return False
    first, *others = (side_files.read_side_file(own[name], name) for own in owners)
    return all(other == first for other in others)


def _kind(name: str) -> str:
    """Files of one kind come together."""
    if name in side_files.OF_TOKENIZER or name.endswith(".tiktoken"):
        return _TOKENIZER
    if name in side_files.CHAT_TEMPLATES or name.endswith(".jinja"):
        return _TEMPLATE
    if name in side_files.SENTENCES or "/" in name:
        return _SENTENCES
    return _CODE if name.endswith(".py") else name
