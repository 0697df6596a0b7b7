"""Reads m3jax.json, the record of a merge, with suspicion: anyone may have edited it.

`provenance` writes it. Whatever does not look like something that m3jax wrote is
refused with one line, and no name in it can lead out of the checkpoint's folder.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from m3jax.checkpoints.errors import CheckpointError, few, shown
from m3jax.checkpoints.formats.json_text import load_json
from m3jax.checkpoints.formats.orbax import ITEM
from m3jax.checkpoints.names import is_inner_name, is_plain_name
from m3jax.checkpoints.output.folder import MANIFEST
from m3jax.checkpoints.places.files import Location, exists, read_small
from m3jax.checkpoints.record.provenance import CHECKSUM, FORMAT

_MAX_RECORD = 100_000_000  # bytes; the record of 100 000 tensors has 25 MB
_DIGEST = re.compile(r"[0-9a-f]{32}")


@dataclasses.dataclass(frozen=True)
class TensorRecord:
    """What is recorded of one tensor: where it is and what it holds."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    checksum: str


@dataclasses.dataclass(frozen=True)
class Record:
    """A record whose every field has been checked.

    Attributes:
      recipe: fields of the recipe, as `Recipe.from_dict` takes them.
      seed: of the merge.
      ratios: of each group of tensors; None where M3 was off.
      base, models: what was read: ``path``, ``revision``, ``files``, ``checksum``.
      tokenizer_from: whose tokenizer went along; None: the first checkpoint's.
      versions: of the software that made it.
      files: checksums of the files beside the tensors.
      tensors: by name.
      measured: what the method found of the whole model, by name.
      statistics: as the models, of what was read beside them.
    """

    recipe: Mapping[str, Any]
    seed: int
    ratios: Mapping[str, tuple[float, ...]] | None
    base: Mapping[str, Any] | None
    models: tuple[Mapping[str, Any], ...]
    tokenizer_from: str | None
    versions: Mapping[str, str]
    files: Mapping[str, str]
    tensors: Mapping[str, TensorRecord]
    measured: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    statistics: tuple[Mapping[str, Any], ...] = ()


def read_record(folder: Location) -> Record | None:
    """The record of a checkpoint folder, or None where there is none.

    Raises:
      CheckpointError: it is not a record that m3jax wrote; one line with its flaws.
    """
    path = folder / MANIFEST
    if not exists(path):
        return None
    text = read_small(path, _MAX_RECORD)
    return parse_record(load_json(text, str(path)), str(path))


def parse_record(content: Mapping[str, Any], what: str) -> Record:
    """Checks the fields of a record; see `read_record`.

    Args:
      content: the JSON object.
      what: its name in errors.
    """
    if content.get("format") != FORMAT or isinstance(content["format"], bool):
        raise CheckpointError(
            f"{what}: has format {shown(content.get('format'))}, this m3jax reads "
            f"{FORMAT}; it was edited, or another version of m3jax wrote it"
        )
    flaws: list[str] = []
    for field, (allowed, wanted) in _FIELDS.items():
        if field not in content:
            flaws.append(f"{field} is missing")
        elif not _fits(content[field], wanted):
            flaws.append(f"{field}={shown(content[field], 60)} needs {allowed}")
    for field, wanted, allowed in (
        ("files", _is_digest, f"a plain file name and its {CHECKSUM}"),
        ("tensors", _TENSOR, f"file, dtype, shape and {CHECKSUM}"),
    ):
        entries = content.get(field)
        if not isinstance(entries, dict):
            flaws.append(f"{field} must map names to what is recorded of them")
            continue
        flaws += [
            f"{field}: {shown(name, 60)} has {shown(entry, 90)}; needs {allowed}"
            for name, entry in entries.items()
            if not _fits(entry, wanted)
            or (field == "files" and not is_inner_name(name))
        ]
    measured = content.get("measured", {})  # absent from records of version 0.1
    if not _fits(measured, {"*": [_is_number]}):
        flaws.append(f"measured={shown(measured, 60)} needs numbers by name")
    statistics = content.get("statistics", [])  # nor have they these
    if not _fits(statistics, [_INPUT]):
        flaws.append(f"statistics={shown(statistics, 60)} needs a list of {_OF_INPUT}")
    if flaws:
        raise CheckpointError(f"{what}: not as m3jax wrote it: {few(flaws)}")
    ratios = content["ratios"]
    return Record(
        recipe=content["recipe"],
        seed=content["seed"],
        ratios=ratios and {group: tuple(values) for group, values in ratios.items()},
        base=content["base"],
        models=tuple(content["models"]),
        tokenizer_from=content["tokenizer_from"],
        versions=content["versions"],
        files=content["files"],
        tensors={
            name: TensorRecord(**{**entry, "shape": tuple(entry["shape"])})
            for name, entry in content["tensors"].items()
        },
        measured={name: tuple(values) for name, values in measured.items()},
        statistics=tuple(statistics),
    )


def _fits(value: Any, wanted: Any) -> bool:
    """Whether a value of JSON is as is wanted, see `_FIELDS`."""
    match wanted:
        case tuple():
            return any(_fits(value, one) for one in wanted)
        case [entry]:
            return isinstance(value, list) and all(_fits(v, entry) for v in value)
        case {"*": entry}:
            return isinstance(value, dict) and _fits([*value.values()], [entry])
        case dict():
            return (
                isinstance(value, dict)
                and value.keys() == wanted.keys()
                and all(_fits(value[key], wanted[key]) for key in wanted)
            )
        case type():
            return isinstance(value, wanted)
    return wanted(value) if callable(wanted) else value == wanted


def _is_plain(value: Any, depth: int = 24) -> bool:
    """Whether there are only sane numbers, texts and nulls, not nested too deeply."""
    if isinstance(value, dict | list):
        entries = value.values() if isinstance(value, dict) else value
        return depth > 0 and all(_is_plain(entry, depth - 1) for entry in entries)
    return value is None or isinstance(value, str | bool) or _is_number(value)


def _is_number(value: Any) -> bool:
    if type(value) is int:
        return abs(value) < 2**63
    return isinstance(value, float) and math.isfinite(value)


def _is_below(limit: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and 0 <= value < limit


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def _holds_tensors(name: Any) -> bool:
    return is_plain_name(name) and (name.endswith(".safetensors") or name == ITEM)


_TENSOR = {
    "file": _holds_tensors,
    "dtype": str,
    "shape": [_is_below(2**64)],
    "checksum": _is_digest,
}
_INPUT = {
    "path": str,
    "revision": (str, None),
    "files": {"*": _is_number},
    "checksum": (str, None),
}
_OF_INPUT = "path, revision, files and checksum"
# What each field has to be, in words and for `_fits`: a tuple is a choice, a list of
# one has entries of that kind, a dict has these fields, or "*" of any name; types,
# functions and values are what they say.
_FIELDS: dict[str, tuple[str, Any]] = {
    "recipe": ("the fields of a recipe", lambda v: _fits(v, dict) and _is_plain(v)),
    "seed": ("0 to 2**32 - 1", _is_below(2**32)),
    "ratios": (
        "null, or numbers for each group of tensors",
        ({"*": lambda v: v != [] and _fits(v, [_is_number])}, None),
    ),
    "base": (f"null, or {_OF_INPUT}", (_INPUT, None)),
    "models": (f"a list of {_OF_INPUT}", lambda v: v != [] and _fits(v, [_INPUT])),
    "tokenizer_from": ("null, or the name of a checkpoint", (str, None)),
    "versions": ("versions by name", {"*": str}),
    "checksum": (CHECKSUM, CHECKSUM),
}
