"""Ids of tokens in config.json and generation_config.json, and what is wrong there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.formats.json_text import load_json

GENERATION = "generation_config.json"
_NAMES_TOKENS = re.compile(r".*token_(id|ids|index)")
# What transformers refuses to save beside do_sample: false, and the harmless values.
_SAMPLING: dict[str, tuple[Any, ...]] = {
    "temperature": (None, 1),
    "top_p": (None, 1),
    "top_k": (None, 50),
    "typical_p": (None, 1),
    "min_p": (None,),
    "top_h": (None,),
    "epsilon_cutoff": (None, 0),
    "eta_cutoff": (None, 0),
}
_BEAMS: dict[str, tuple[Any, ...]] = {
    "early_stopping": (None, False),
    "length_penalty": (None, 1),
}


def mended(text: bytes) -> tuple[bytes | None, list[str]]:
    """A generation_config.json that transformers loads and saves, and what was done.

    Fields for sampling without do_sample get it, as Llama 2's authors mended theirs;
    what else is refused there goes. None instead of the text: it is no JSON object.
    """
    try:
        fields = load_json(text, GENERATION)
    except CheckpointError as error:
        return None, [f"{error}; it is left out"]
    notes = []
    sampling = _others_than(fields, _SAMPLING)
    if sampling and fields.get("do_sample") is not True:
        fields["do_sample"] = True
        notes.append(
            f"{GENERATION}: {_listed(fields, sampling)} without do_sample, which "
            "transformers refuses to save; do_sample: true is written"
        )
    gone = [
        name
        for name in ("pad_token_id", "max_new_tokens")
        if isinstance(fields.get(name), int) and fields[name] < (name[0] == "m")
    ]
    beams = fields.get("num_beams")
    beams = beams if isinstance(beams, int) and beams > 0 else 1
    if beams == 1:
        gone += _others_than(fields, _BEAMS)
    samples = beams == 1 and fields.get("do_sample") is True
    returned = fields.get("num_return_sequences") or 1
    if not samples and isinstance(returned, int) and returned > beams:
        gone.append("num_return_sequences")
    if gone:
        notes.append(
            f"{GENERATION}: {_listed(fields, gone)} is invalid; it is left out"
        )
        fields = {name: own for name, own in fields.items() if name not in gone}
    return (_json(fields) if notes else text), notes


def _others_than(
    fields: Mapping[str, Any], harmless: Mapping[str, tuple[Any, ...]]
) -> list[str]:
    return [name for name, own in harmless.items() if fields.get(name) not in own]


def _listed(fields: Mapping[str, Any], names: list[str]) -> str:
    return ", ".join(f"{name}={shown(fields[name])}" for name in names)


def token_fields(
    fields: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """The fields that hold ids of tokens, nested ones too: dotted name and value."""
    for name, own in fields.items():
        if isinstance(own, dict):
            yield from token_fields(own, f"{prefix}{name}.")
        elif _NAMES_TOKENS.fullmatch(name) and ids_of(own):
            yield prefix + name, own


def ids_of(value: Any) -> list[int]:
    """The ids in a field: a number, or a list of them."""
    values = value if isinstance(value, list) else [value]
    return [own for own in values if type(own) is int and own >= 0]


def renumbered(value: Any, number: Callable[[int], int | None]) -> Any:
    """A field with other ids; None if one of them has none."""
    if isinstance(value, list):
        found = [number(own) for own in value]
        return None if None in found else found
    return number(value)


def with_fields(text: bytes, changes: Mapping[str, Any]) -> bytes:
    """A JSON object with other fields."""
    return _json({**json.loads(text), **changes})


def _json(fields: Mapping[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()
