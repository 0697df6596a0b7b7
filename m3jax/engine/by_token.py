"""Merges by token: which row of which model belongs to which token of the output.

A merge by rows needs models whose tokenizers number their tokens alike; `compared`
says whether they do.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.folder import Checkpoint
from m3jax.checkpoints.source import Source
from m3jax.checkpoints.tokens import union
from m3jax.checkpoints.tokens.alignment import Alignment, Row, align
from m3jax.checkpoints.tokens.vocabulary import (
    Vocabulary,
    fingerprint,
    read_vocabulary,
)
from m3jax.engine.vocabulary import is_named, num_rows
from m3jax.recipe import Recipe, RecipeError, TokenRow
from m3jax.recipe.tokenizer import BY_ROW

# Of the ids that two models have, the share of which may stand for other tokens, as
# where reserved ones were given a name; ours.
_FEW = 0.1
_ADDED = {
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": False,
}


@dataclasses.dataclass(frozen=True)
class ByToken:
    """How the rows of the models fit, token by token.

    Attributes:
      checkpoints: each once, base first.
      sizes: rows of their embeddings.
      alignment: of these rows.
      owner: whose tokenizer the output has.
      whole: what that tokenizer knows in the output.
      files: of it, where they are not the owner's; None for one that is left out.
      notes: one line each.
    """

    checkpoints: tuple[Checkpoint, ...]
    sizes: tuple[int, ...]
    alignment: Alignment
    owner: Checkpoint
    whole: Vocabulary
    files: union.Files
    notes: tuple[str, ...]

    def fit(
        self, name: str, sources: Sequence[Source], owners: Sequence[Checkpoint]
    ) -> list[Source] | None:
        """A tensor's sources, by token; None where its rows are no tokens."""
        by_name = {o.name: s for o, s in zip(owners, sources, strict=True)}
        names = [checkpoint.name for checkpoint in self.checkpoints]
        held = [
            by_name.get(own.name) or own.tensors.get(name) for own in self.checkpoints
        ]
        every = [source for source in held if source is not None]
        if not is_named(name) or len(every) < len(held):
            return None
        shapes = [source.shape for source in every]
        if [shape[:1] for shape in shapes] != [(size,) for size in self.sizes]:
            return None
        if len({shape[1:] for shape in shapes}) > 1 or every[0].dtype.kind == "exact":
            return None
        return [self.alignment.fit(names.index(o.name), every) for o in owners]


def by_token(
    recipe: Recipe, base: Checkpoint | None, models: Sequence[Checkpoint]
) -> ByToken | None:
    """What a recipe asks for that merges by token; None for one that does not.

    Raises:
      RecipeError: it names a model or a token that there is not.
      CheckpointError: a model has no tokenizer, or no embedding of tokens.
    """
    if recipe.vocabulary in BY_ROW:
        return None
    first = models[0] if base is None else base
    if recipe.vocabulary == "base" and base is None:
        raise RecipeError("vocabulary='base' needs a base (--base)")
    checkpoints = tuple({own.name: own for own in (first, *models)}.values())
    words = [_vocabulary(own, recipe.vocabulary) for own in checkpoints]
    rows = [_num_rows(own, recipe.vocabulary) for own in checkpoints]
    places = {own.name.rstrip("/"): d for d, own in enumerate(checkpoints)}
    if base is not None:
        places.setdefault("base", 0)

    def place(name: str, field: str) -> int:
        if name.rstrip("/") not in places:
            raise RecipeError(
                f"{field}={name!r} needs one of the models: {', '.join(places)}"
            )
        return places[name.rstrip("/")]

    by_union = recipe.vocabulary == "union"
    own = 0 if by_union else place(recipe.vocabulary, "vocabulary")
    options = recipe.tokenizer
    others = [d for d in range(len(words)) if d != own and by_union]
    whole, counts = _joined(words, rows, own, others, options.tokens)
    tokens: list[str | None] = [None] * whole.size
    for token, number in whole.ids.items():
        tokens[number] = token
    multiple = options.pad_to_multiple_of or 1
    preferred = [] if options.missing == "mean" or base is None else [0]
    if options.missing not in ("base", "mean"):
        preferred.insert(0, place(options.missing, "tokenizer.missing"))
    found = align(
        tokens,
        -(-len(tokens) // multiple) * multiple,
        [vocabulary.ids for vocabulary in words],
        rows,
        preferred,
        {
            whole.ids[row.token]: _given(row, words, rows, checkpoints, place)
            for row in options.tokens
        },
    )
    folders = [checkpoints[d].tokenizer_folder for d in others]
    owner = checkpoints[own]
    files = union.extended(
        owner.name, owner.tokenizer_folder, words[own], whole, folders
    )
    unknown = int(
        found.filled[[i for i, t in enumerate(tokens) if t is not None]].sum()
    )
    taken = [f"{n} tokens of {checkpoints[d].name}'s" for d, n in counts if n]
    notes = [
        f"vocabulary={recipe.vocabulary}: {len(whole.ids)} tokens in "
        f"{len(found.filled)} rows, the tokenizer is {owner.name}'s"
        + (f", with {' and '.join(taken)}" if taken else "")
    ]
    if unknown:
        notes.append(
            f"{unknown} tokens of {owner.name}'s tokenizer have a row in no model: "
            "each model's mean row"
        )
    return ByToken(checkpoints, tuple(rows), found, owner, whole, files, tuple(notes))


def _vocabulary(checkpoint: Checkpoint, policy: str) -> Vocabulary:
    found = read_vocabulary(checkpoint.name, checkpoint.tokenizer_folder)
    if found is None:
        raise CheckpointError(
            f"{checkpoint.name}: has no tokenizer (tokenizer.json, tokenizer.model, "
            f"vocab.json or vocab.txt), which vocabulary={policy!r} needs; copy the "
            "model's tokenizer files into the folder"
        )
    return found


def _num_rows(checkpoint: Checkpoint, policy: str) -> int:
    rows = num_rows(checkpoint)
    if rows is None:
        raise CheckpointError(
            f"{checkpoint.name}: has no embedding of tokens whose name is known, which "
            f"vocabulary={policy!r} needs; set vocabulary to error, mean or truncate"
        )
    return rows


def _joined(
    words: Sequence[Vocabulary],
    rows: Sequence[int],
    own: int,
    others: Sequence[int],
    given: Sequence[TokenRow],
) -> tuple[Vocabulary, list[tuple[int, int]]]:
    """The output's vocabulary, and how many tokens of the others it has.

    The owner's tokens keep their ids. Those of the others follow, model by model, in
    the order of their ids there, as far as they have rows; then those that are given.
    """
    ids, added = dict(words[own].ids), dict(words[own].added)
    counts = []
    after = itertools.count(words[own].size)
    for d in others:
        new = [t for t, i in words[d].ids.items() if i < rows[d] and t not in ids]
        new.sort(key=words[d].ids.__getitem__)
        ids.update(zip(new, after, strict=False))
        added |= {t: words[d].added[t] for t in new if t in words[d].added}
        counts.append((d, len(new)))
        after = itertools.count(max(ids.values(), default=-1) + 1)
    for row in given:
        if row.token not in ids:
            ids[row.token] = next(after)
            added[row.token] = _ADDED
    return Vocabulary(ids, added), counts


def _given(
    row: TokenRow,
    words: Sequence[Vocabulary],
    rows: Sequence[int],
    checkpoints: Sequence[Checkpoint],
    place: Any,
) -> Row:
    if row.model is None:
        return Row(None, 0, row.force)
    field = f"tokenizer.tokens: {row.token}"
    donor = place(row.model, field)
    wanted = row.token if row.row is None else row.row
    number = wanted if isinstance(wanted, int) else words[donor].ids.get(wanted, -1)
    if not 0 <= number < rows[donor]:
        raise RecipeError(
            f"{field}: {checkpoints[donor].name} has no row for {shown(wanted)}, among "
            f"its {rows[donor]}"
        )
    return Row(donor, number, row.force)


@dataclasses.dataclass(frozen=True)
class Compared:
    """What a merge by rows has to know of the tokenizers: lines that refuse it, and
    lines to say."""

    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def compared(
    recipe: Recipe, base: Checkpoint | None, models: Sequence[Checkpoint]
) -> Compared:
    """Whether the tokenizers number their tokens alike, where rows are merged."""
    first, *others = models if base is None else [base, *models]
    merged = any(is_named(n) and not recipe.excludes(n) for n in first.tensors)
    if recipe.vocabulary not in BY_ROW or not merged or not others:
        return Compared()
    prints = {own.name: fingerprint(own.tokenizer_folder) for own in (first, *others)}
    problems: list[str] = []
    notes: list[str] = []
    known: dict[str, Vocabulary] = {}
    for other in {own.name: own for own in others}.values():
        pair = (first, other)
        if None in (prints[first.name], prints[other.name]):
            continue
        if prints[first.name] == prints[other.name]:
            continue
        try:
            for own in pair:
                if own.name not in known:
                    read = read_vocabulary(own.name, own.tokenizer_folder)
                    assert read is not None
                    known[own.name] = read
        except CheckpointError as error:
            notes.append(f"the tokenizers are not compared: {error}")
            continue
        line, share = _differences(pair, known)
        if share > _FEW and recipe.vocabulary == "error":
            problems.append(
                f"{line}: a merge by rows would mix rows of different tokens; set "
                "vocabulary to union, base or a model's name to merge by token, or to "
                "mean or truncate to merge by row all the same"
            )
        elif share:
            notes.append(
                f"{line}; the rows of an id are merged all the same "
                "(--config.vocabulary=union merges by token)"
            )
    return Compared(tuple(problems), tuple(notes))


def _differences(
    pair: tuple[Checkpoint, Checkpoint], known: Mapping[str, Vocabulary]
) -> tuple[str, float]:
    """A line about ids that stand for different tokens, and their share."""
    one, two = ({i: token for token, i in known[own.name].ids.items()} for own in pair)
    rows = min((num_rows(own) or 0 for own in pair), default=0)
    both = [i for i in sorted(one.keys() & two.keys()) if i < rows]
    differ = [i for i in both if one[i] != two[i]]
    if not differ:
        return "", 0.0
    i, (a, b) = differ[0], (own.name for own in pair)
    return (
        f"the tokenizers of {a} and {b} differ in {len(differ)} of {len(both)} tokens "
        f"(id {i} is {shown(one[i])} in {a} and {shown(two[i])} in {b})"
    ), len(differ) / len(both)
