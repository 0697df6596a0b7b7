"""The files of a tokenizer that has tokens of others as well."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.places.files import Location
from m3jax.checkpoints.side_files import VOCABULARY_FILES, read_side_file
from m3jax.checkpoints.tokens.vocabulary import (
    ADDED,
    JSON,
    SETTINGS,
    Vocabulary,
    library_ids,
    read_settings,
)

Files = dict[str, bytes | None]
_STALE = (*VOCABULARY_FILES, "merges.txt", ADDED)


def extended(
    name: str,
    folder: Location,
    own: Vocabulary,
    whole: Vocabulary,
    others: Sequence[Location],
) -> Files:
    """The files of a checkpoint's tokenizer, with more tokens.

    Tokens that are added ones elsewhere are added. Others go into the tokenizer's
    model, at its end: pieces of Unigram with the score that they have, tokens of BPE
    with their merges, behind the tokenizer's own, so that what it made of a text is at
    most merged further.

    Args:
      name, folder, own: the checkpoint's, and what its tokenizer knows.
      whole: what the result is to know: `own`, and more.
      others: folders whose tokenizers the further tokens come from.

    Returns:
      Contents by name; None where a file is to be left out.

    Raises:
      CheckpointError: the tokenizer cannot be extended in that way.
    """
    if whole.ids.keys() == own.ids.keys():
        return {}
    added = {token: dict(fields) for token, fields in whole.added.items()}
    text = read_side_file(folder, JSON)
    if text is None:
        for token in whole.ids.keys() - own.ids.keys() - added.keys():
            added[token] = {"normalized": False, "special": False}
        numbers = {token: whole.ids[token] for token in added}
        ordered = dict(sorted(numbers.items(), key=lambda pair: pair[1]))
        return {ADDED: _json(ordered), **_settings(folder, added, whole)}
    document = json.loads(text)
    known = {entry["content"] for entry in document["added_tokens"]}
    document["added_tokens"] = sorted(
        [
            *document["added_tokens"],
            *(
                {"id": whole.ids[token], "content": token, **fields}
                for token, fields in added.items()
                if token not in known
            ),
        ],
        key=lambda entry: entry["id"],
    )
    new = whole.ids.keys() - own.ids.keys() - added.keys()
    if new:
        _extend_model(document["model"], whole, new, others)
    written = _json(document)
    if library_ids(written, JSON)[0] != dict(whole.ids):
        raise CheckpointError(
            f"{name}: its tokenizer ({document['model'].get('type')}) cannot be given "
            "the tokens of the others under ids of their own; set vocabulary to base "
            "or to the name of a model"
        )
    stale = {
        own: None
        for own in _STALE
        if own != JSON and read_side_file(folder, own) is not None
    }
    return {**stale, JSON: written, **_settings(folder, added, whole)}


def _extend_model(
    model: dict[str, Any], whole: Vocabulary, new: set[str], others: Sequence[Location]
) -> None:
    """Puts tokens into the model of a tokenizer.json; then all tokens stand there."""
    documents = [_document(folder) for folder in others]
    vocabulary = model["vocab"]
    order = sorted(whole.ids, key=whole.ids.__getitem__)
    if isinstance(vocabulary, list):  # Unigram: the id is the place
        lowest = min((score for _, score in vocabulary), default=0.0)
        scores = {
            piece: score
            for document in reversed(documents)
            if isinstance(document["vocab"], list)
            for piece, score in document["vocab"]
        }
        have = {piece for piece, _ in vocabulary}
        vocabulary += [
            [piece, scores.get(piece, lowest)] for piece in order if piece not in have
        ]
        return
    model["vocab"] = {token: whole.ids[token] for token in order}
    if "merges" not in model:
        return
    merges = [tuple(_pair(merge)) for merge in model["merges"]]
    have = set(merges)
    for document in documents:
        for merge in map(_pair, document.get("merges", ())):
            left, right = merge
            makes = left + right in new and {left, right} <= whole.ids.keys()
            if makes and (left, right) not in have:
                have.add((left, right))
                merges.append((left, right))
    model["merges"] = [list(merge) for merge in merges]


def _document(folder: Location) -> dict[str, Any]:
    """The model of a tokenizer.json; that of none has no tokens."""
    text = read_side_file(folder, JSON)
    return {"vocab": {}} if text is None else json.loads(text)["model"]


def _pair(merge: Any) -> Sequence[str]:
    """A merge, which older files write as one text."""
    return merge.split(" ", 1) if isinstance(merge, str) else merge


def _settings(
    folder: Location, added: Mapping[str, Mapping[str, Any]], whole: Vocabulary
) -> Files:
    """tokenizer_config.json, where it lists the added tokens."""
    settings = read_settings(folder)
    decoder = settings.get("added_tokens_decoder")
    if not isinstance(decoder, dict):
        return {}
    order = sorted(added, key=whole.ids.__getitem__)
    listed = {
        str(whole.ids[token]): {"content": token, **added[token]} for token in order
    }
    settings["added_tokens_decoder"] = {**listed, **decoder}
    return {SETTINGS: _json(settings)}


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()
