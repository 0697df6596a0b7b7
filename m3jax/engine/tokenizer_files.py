"""What is written beside the tensors: whose tokenizer, chat template and end tokens."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.folder import Checkpoint
from m3jax.checkpoints.places.files import Location
from m3jax.checkpoints.side_files import (
    CHAT_TEMPLATES,
    OF_TOKENIZER,
    read_side_file,
)
from m3jax.checkpoints.tokens import chat, generation
from m3jax.checkpoints.tokens.generation import GENERATION
from m3jax.checkpoints.tokens.vocabulary import Vocabulary, read_vocabulary
from m3jax.engine.by_token import ByToken
from m3jax.engine.vocabulary import num_rows
from m3jax.recipe import Recipe, RecipeError
from m3jax.recipe.tokenizer import BY_ROW

_ALONE = (*OF_TOKENIZER, *CHAT_TEMPLATES)


@dataclasses.dataclass
class TokenizerFiles:
    """What goes along, where it is not as it stands in a folder.

    Attributes:
      owner: whose tokenizer it is.
      folders: of each side file, by name.
      files: those with other contents; None for one that is left out.
      config: changes to config.json.
      notes: one line each.
    """

    owner: Checkpoint
    folders: Mapping[str, Location]
    files: dict[str, bytes | None]
    config: dict[str, Any]
    notes: list[str]

    def read(self, name: str) -> bytes | None:
        """A side file as it will be written."""
        if name in self.files or name not in self.folders:
            return self.files.get(name)
        return read_side_file(self.folders[name], name)


def not_taken(recipe: Recipe) -> tuple[str, ...]:
    """Side files that models may agree in and that do not go along all the same."""
    left_out = () if recipe.tokenizer.copy else _ALONE
    if recipe.vocabulary in BY_ROW:
        return left_out
    # The template is that of the tokenizer; the config has the models' ids.
    return (*left_out, *CHAT_TEMPLATES, GENERATION)


def tokenizer_owner(
    recipe: Recipe,
    base: Checkpoint | None,
    models: Sequence[Checkpoint],
    tokenizer_from: str | None,
    tokens: ByToken | None,
) -> Checkpoint:
    """The checkpoint whose tokenizer goes along.

    Raises:
      CheckpointError: there is none of that name.
      RecipeError: the recipe merges by tokens, and has another's.
    """
    first = models[0] if base is None else base
    owner = first
    if tokenizer_from is not None:
        owner = named(tokenizer_from, base, models, "tokenizer_from=")
    if tokens is None:
        return owner
    if tokenizer_from is not None and owner.name != tokens.owner.name:
        raise RecipeError(
            f"tokenizer_from={tokenizer_from!r} and vocabulary={recipe.vocabulary!r}, "
            f"which has {tokens.owner.name}'s; leave one out"
        )
    return tokens.owner


def tokenizer_files(
    recipe: Recipe,
    checkpoints: Sequence[Checkpoint],
    owner: Checkpoint,
    folders: Mapping[str, Location],
    unasked: bool,
    tokens: ByToken | None,
    rows: int | None,
) -> TokenizerFiles:
    """Finds them.

    Args:
      recipe: of the merge.
      checkpoints: the first one, which config.json is of, and the models.
      owner: whose tokenizer goes along.
      folders: of each side file, by name.
      unasked: nobody said whose tokenizer it is to be.
      tokens: of a merge by token.
      rows: of the output's embedding, where they are not the first checkpoint's.

    Raises:
      RecipeError: what is asked for is not there.
      CheckpointError: a chat template cannot be used.
    """
    every = tuple({own.name: own for own in checkpoints}.values())
    first = every[0]
    files = dict(tokens.files) if tokens else {}
    found = TokenizerFiles(owner, folders, files, {}, [])
    if owner is not first:
        found.config |= _token_ids(first.config or {}, owner.config or {})
    _mend_generation(found)
    options = recipe.tokenizer
    if not options.copy:
        more = (".tiktoken", ".jinja")
        names = {*folders, *found.files}
        gone = [n for n in names if n in _ALONE or n.endswith(more)]
        found.files |= dict.fromkeys(gone, None)
    elif options.chat_template is not None:
        _bring_template(found, options.chat_template, every, first, tokens)
    if rows is not None:
        _check_rows(found, first, tokens, rows, recipe.keeps_config)
        if tokens is None and unasked and options.copy:
            found.notes.append(
                f"the output has {rows} vocabulary rows, {first.name} has "
                f"{num_rows(first)}; --tokenizer_from names the model whose tokenizer "
                "goes along"
            )
    return found


def named(
    name: str, base: Checkpoint | None, models: Sequence[Checkpoint], field: str = ""
) -> Checkpoint:
    """The checkpoint of that name: as it was given, but for slashes at its end.

    Args:
      name: of it; ``base`` is the base.
      base, models: to look among.
      field: in errors.

    Raises:
      CheckpointError: there is none.
    """
    if name == "base" and base is not None:
        return base
    every = [*([base] if base else ()), *models]
    for same in (str, lambda text: text.rstrip("/")):
        for own in every:
            if same(own.name) == same(name):
                return own
    raise CheckpointError(
        f"{field}{name} needs 'base' or one of the models: "
        f"{', '.join(own.name for own in models)}"
    )


def _token_ids(first: Mapping[str, Any], owner: Mapping[str, Any]) -> dict[str, Any]:
    """Changes to config.json that make its ids of tokens those of another's."""
    theirs = {
        name.rpartition(".")[2]: own for name, own in generation.token_fields(owner)
    }
    ours = dict(generation.token_fields(first))
    have = {name.rpartition(".")[2] for name in ours}
    changes = {
        name: theirs[name.rpartition(".")[2]]
        for name, own in ours.items()
        if theirs.get(name.rpartition(".")[2], own) != own
    }
    return {
        **changes,
        **{name: own for name, own in theirs.items() if name not in have},
    }


def _mend_generation(found: TokenizerFiles) -> None:
    text = found.read(GENERATION)
    if text is None:
        return
    mended, notes = generation.mended(text)
    if mended != text:
        found.files[GENERATION] = mended
    found.notes += notes


def _bring_template(
    found: TokenizerFiles,
    wanted: str,
    every: Sequence[Checkpoint],
    first: Checkpoint,
    tokens: ByToken | None,
) -> None:
    """Writes the chat template that is asked for, and lets its end tokens end."""
    ends: list[int] = []
    if wanted == "auto":
        templates = {
            own.name: chat.read_template(own.tokenizer_folder) for own in every
        }
        common = Counter(own for own in templates.values() if own).most_common(1)
        if not common:
            found.notes.append("chat_template=auto: no model has a chat template")
            return
        text = common[0][0]
        whose = [name for name, own in templates.items() if own == text]
        found.notes.append(f"chat_template=auto: that of {', '.join(whose)}")
    elif wanted in chat.NAMED:
        text, end = chat.NAMED[wanted]
        ids = _vocabulary(found.owner, tokens)
        if end is not None and ids is not None and end not in ids.ids:
            found.notes.append(
                f"chat_template={wanted} ends turns with {end}, which is no token of "
                "the output's tokenizer"
            )
        elif end is not None and ids is not None:
            ends = [ids.ids[end]]
    elif chat.is_literal(wanted):
        chat.check_template(wanted)
        text = wanted
    else:
        try:
            model = named(wanted, first, every[1:])
        except CheckpointError:
            raise RecipeError(
                f"chat_template={wanted!r} needs auto, {', '.join(chat.NAMED)}, a "
                f"model ({', '.join(own.name for own in every)}), or a Jinja template"
            ) from None
        own = chat.read_template(model.tokenizer_folder)
        if own is None:
            raise RecipeError(
                f"chat_template={wanted}: that model has no chat template"
            )
        text = own
        ends = _bring_ends(found, model, tokens)
    found.files = chat.with_template(found.owner.tokenizer_folder, text, found.files)
    if ends:
        _end_with(found, first, ends)


def _vocabulary(owner: Checkpoint, tokens: ByToken | None) -> Vocabulary | None:
    """What the output's tokenizer knows."""
    return (
        tokens.whole if tokens else read_vocabulary(owner.name, owner.tokenizer_folder)
    )


def _bring_ends(
    found: TokenizerFiles, model: Checkpoint, tokens: ByToken | None
) -> list[int]:
    """Takes a model's generation_config.json; its end tokens, by the output's ids."""
    number = _renumbering(model, found.owner, tokens)
    text = read_side_file(model.folder, GENERATION)
    if text is not None and (mended := generation.mended(text)[0]) is not None:
        fields = _object(mended)
        changes = {
            name: generation.renumbered(own, number)
            for name, own in generation.token_fields(fields)
            if "." not in name
        }
        found.files[GENERATION] = (
            generation.with_fields(mended, changes)
            if any(fields[name] != own for name, own in changes.items())
            else mended
        )
    ends = generation.renumbered(_ends(model), number)
    if ends is None:
        found.notes.append(
            f"{model.name}: its end tokens {_ends(model)} are no tokens of the output"
        )
    return ends or []


def _renumbering(
    model: Checkpoint, owner: Checkpoint, tokens: ByToken | None
) -> Callable[[int], int | None]:
    """From a model's ids of tokens to the output's."""
    if model is owner:
        return lambda number: number
    theirs = read_vocabulary(model.name, model.tokenizer_folder)
    ours = _vocabulary(owner, tokens)
    if theirs is None or ours is None:
        return lambda number: number
    token = {number: own for own, number in theirs.ids.items()}
    return lambda number: ours.ids.get(token.get(number, ""))


def _end_with(found: TokenizerFiles, first: Checkpoint, ends: Sequence[int]) -> None:
    """Lets the output end with these tokens too."""
    config = {**(first.config or {}), **found.config}
    names = [
        n for n, _ in generation.token_fields(config) if n.endswith("eos_token_id")
    ]
    before = {name: _at(config, name) for name in names or ["eos_token_id"]}
    for name, own in before.items():
        found.config[name] = _together(own, ends)
    text = found.read(GENERATION)
    if text is not None:
        own = _object(text).get("eos_token_id")
        changes = {"eos_token_id": _together(own, ends)}
        found.files[GENERATION] = generation.with_fields(text, changes)
    found.notes.append(f"the chat template's end tokens {list(ends)} are eos_token_id")


def _together(before: Any, ends: Sequence[int]) -> Any:
    every = [*generation.ids_of(before), *ends]
    unique = list(dict.fromkeys(every))
    return unique[0] if len(unique) == 1 else unique


def _at(fields: Mapping[str, Any], name: str) -> Any:
    for part in name.split("."):
        fields = fields.get(part) if isinstance(fields, dict) else None  # type: ignore
    return fields


def _object(text: bytes | None) -> dict[str, Any]:
    """The object of a JSON file that has been looked at; {} for none."""
    found = json.loads(text or b"{}")
    return found if isinstance(found, dict) else {}


def _ends(model: Checkpoint) -> list[int]:
    """The tokens that a model ends with."""
    text = read_side_file(model.folder, GENERATION)
    mended = generation.mended(text)[0] if text is not None else None
    own = generation.ids_of(_object(mended).get("eos_token_id"))
    config = [
        one
        for name, value in generation.token_fields(model.config or {})
        if name.endswith("eos_token_id")
        for one in generation.ids_of(value)
    ]
    return own or list(dict.fromkeys(config))


def _check_rows(
    found: TokenizerFiles,
    first: Checkpoint,
    tokens: ByToken | None,
    rows: int,
    keeps: bool,
) -> None:
    """Says where ids reach beyond the rows; what a loader would fail on goes, unless
    config.json is to stay."""
    config = dict(generation.token_fields(first.config or {})) | found.config
    for name, own in config.items():
        if (
            not keeps
            and name.endswith("pad_token_id")
            and any(one >= rows for one in generation.ids_of(own))
        ):
            found.config[name] = None
            found.notes.append(
                f"{name}={own} lies beyond the output's {rows} rows; it is left out"
            )
    words = _vocabulary(found.owner, tokens)
    if words is not None and words.size > rows:
        found.notes.append(
            f"{found.owner.name}'s tokenizer has tokens up to id {words.size - 1}, the "
            f"output {rows} rows: texts with the others cannot be read"
        )
