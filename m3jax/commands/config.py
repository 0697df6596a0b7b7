"""The recipe on the command line: `--config=FILE` and `--config.FIELD=VALUE`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import config_dict

from m3jax.commands import config_file, replay
from m3jax.commands.cli import UsageError
from m3jax.commands.config_file import as_config
from m3jax.methods import METHODS, TRANSFORMS
from m3jax.recipe import Recipe, RecipeError
from m3jax.recipe.documents import Document, renamed
from m3jax.recipe.groups import dotted, group
from m3jax.recipe.recipe import FLAT, renaming
from m3jax.recipe.tokenizer import BY_ROW

if TYPE_CHECKING:
    from m3jax.moe.document import Mixture


def all_fields(recipe: Recipe) -> dict[str, Any]:
    """The recipe's fields, and those of all steps, so that flags may name them."""
    steps = {name: group(cls()) for name, cls in (TRANSFORMS | METHODS).items()}
    own = recipe.to_dict()
    others = {name: fields for name, fields in steps.items() if name not in own}
    return {**dict.fromkeys(FLAT), **own, **others}


RECIPE_FIELDS = all_fields(Recipe())
ROWS = [  # of --help
    (
        "--config=FILE",
        "The recipe: a .py file, an m3jax.json, a name in configs/, or a mergekit "
        "YAML, which names its models itself.",
    ),
    (
        "--config.FIELD=VALUE",
        "One field of it, such as --config.method=ties or --config.mixup.alpha=0.4. "
        "docs/RECIPE.md has them all.",
    ),
]


def default() -> config_dict.ConfigDict:
    """The default recipe as a ConfigDict, for config files to start from.

    Fields take any Python literal: `None`, a number or a tuple. `Recipe` checks them.
    """
    return as_config(RECIPE_FIELDS)


@dataclasses.dataclass(frozen=True)
class Asked:
    """What `--config` and the flags beside it ask for.

    Attributes:
      recipe, base, models, seed: what to merge, and how.
      tokenizer_from: of the record, None without one.
      statistics: beside the models, of the record.
      documents: merges that give some of the models, in order.
      mixture: of experts, that is built in the place of the models; None: none.
      notes: what of the file has no effect.
      record: of the merge that is made once more, if one is: nothing but the places of
        its inputs was given anew.
    """

    recipe: Recipe
    base: str | None
    models: list[str]
    seed: int
    tokenizer_from: str | None
    statistics: list[str]
    mixture: Mixture | None = None
    documents: tuple[Document, ...] = ()
    notes: tuple[str, ...] = ()
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_holder: Any = None
_record: dict[str, Any] = {}
_source = ""


def prepare(arguments: list[str]) -> list[str]:
    """Defines the flag `--config`, with the fields of the file that it names.

    Args:
      arguments: of the command line; `--config=FILE` is taken out.

    Returns:
      The other arguments.

    Raises:
      UsageError, RecipeError: the file cannot be used or a field is unknown.
    """
    global _holder, _record, _source
    source, rest = config_file.take("--config", arguments)
    fields, _record = _load(source) if source else (RECIPE_FIELDS, {})
    _source = source or ""
    config = as_config(all_fields(Recipe.from_dict(fields)))
    known = field_names()
    for field in config_file.fields_given(rest):
        if field not in known:
            raise RecipeError(f"unknown recipe field {field!r}; {_hint(field, known)}")
    _holder = config_file.defined(config, "The recipe.", rest)
    return rest


def asked(
    base: str | None,
    models: list[str] | None,
    seed: int | None,
    rename: Sequence[str] = (),
) -> Asked:
    """The recipe, and what else the flags say; for the rest, the m3jax.json's word.

    Args:
      base, models, seed: of the command's own flags, None where they are not given.
      rename: more rules for the recipe's `rename`.

    Raises:
      RecipeError: the recipe, or documents that a record has.
    """
    fields = _holder.value.to_dict()
    notes = [*_record.get("notes", ())]
    flagged = fields["vocabulary"] != _record.get("vocabulary", fields["vocabulary"])
    if flagged and fields["vocabulary"] == "truncate":
        notes += _truncate(fields, _record["vocabulary"])
    if rename:
        fields["rename"] = (*renaming(fields["rename"]), *rename)
    recipe = Recipe.from_dict(fields)
    documents, names = [], {}
    for own in _record.get("documents", []):
        own = {"path": None, **own}
        names[str(own.pop("path") or own["name"])] = str(own["name"])
        document = Document.from_dict(own)
        if flagged:  # what the flags say of vocabularies is said of all documents
            theirs = document.recipe.to_dict()
            before, theirs["vocabulary"] = theirs["vocabulary"], recipe.vocabulary
            if recipe.vocabulary == "truncate":
                _truncate(theirs, before)
            changed = Recipe.from_dict(theirs)
            document = dataclasses.replace(document, recipe=changed)
        documents.append(document)
    if base is None and not models:
        replay.check_there(_source, _record)
    names |= replay.pinned(_record)
    own_base = (_record.get("base") or {}).get("path")
    own_models = [model["path"] for model in _record.get("models", [])]
    seed = _record.get("seed", 0) if seed is None else seed
    same = "versions" in _record and (recipe, seed) == (
        Recipe.from_dict(_record["recipe"]),
        _record.get("seed"),
    )
    whose = _record.get("tokenizer_from")
    return Asked(
        recipe=recipe.renamed(lambda own: renamed(own, names)),
        base=base or (own_base and renamed(own_base, names)),
        models=models or [renamed(model, names) for model in own_models],
        seed=seed,
        tokenizer_from=whose and renamed(whose, names),
        statistics=[
            renamed(own["path"], names) for own in _record.get("statistics", [])
        ],
        documents=tuple(own.renamed(names) for own in documents),
        mixture=_mixture(),
        notes=tuple(notes),
        record=_record if same else {},
    )


def _truncate(fields: dict[str, Any], vocabulary: str) -> list[str]:
    """Lets rows be truncated as mergekit does it: config.json stays, and a document
    whose rows are aligned by token is not touched.

    Args:
      fields: of a document's recipe, which change.
      vocabulary: that the document has.
    """
    if vocabulary not in BY_ROW:
        fields["vocabulary"] = vocabulary
        return ["vocabulary=truncate has no effect: the YAML has a tokenizer"]
    fields["tokenizer"]["config"] = fields["tokenizer"]["config"] or "keep"
    return []


def _load(source: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of a .py file, an m3jax.json, a mergekit YAML, or a config of m3jax's.

    Returns:
      The fields, and what the file says beside: as a record does.
    """
    path = config_file.located(source)
    if path.suffix == ".json":
        record = config_file.read_json(source, path)
        return (record["recipe"], record) if "recipe" in record else (record, {})
    if path.suffix in (".yml", ".yaml"):
        return _mergekit(source, path)
    config = config_file.run(source, path)
    if hasattr(config, "to_dict"):
        return config.to_dict(), {}
    if isinstance(config, dict):
        return config, {}
    raise UsageError(
        f"--config={source}: get_config() returns {type(config).__name__}, needs a "
        "ConfigDict or a dict"
    )


def _mergekit(source: str, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields and record of a mergekit configuration."""
    from m3jax.moe import document as moe
    from m3jax.recipe import mergekit

    try:
        text = path.read_text("utf-8")
        keys = moe.loaded(text)
        if keys is not None:
            return mixture_fields(moe.parse(keys))
        found = mergekit.parse(text)
    except (RecipeError, UnicodeDecodeError) as error:
        raise UsageError(f"--config={source}: {error}") from None
    result = found.result
    return result.recipe.to_dict(), {
        "base": {"path": result.base},
        "models": [{"path": model} for model in result.models],
        "seed": result.seed or 0,
        "vocabulary": result.recipe.vocabulary,
        "documents": [own.to_dict() for own in found.named],
        "notes": [f"{source}: {note}" for note in found.notes],
    }


def mixture_fields(mixture: Mixture) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields and record of a mixture of experts, whose tensors are copied."""
    recipe = {
        "method": "passthrough",
        "mixup": {"alpha": None},
        "dtype": mixture.dtype or "promote",
    }
    record = {
        "moe": mixture.to_dict(),
        "models": [{"path": mixture.base}],
        "seed": mixture.seed or 0,
    }
    return Recipe.from_dict(recipe).to_dict(), record


def use(mixture: Mixture) -> None:
    """Puts a mixture in the place of what `--config` says."""
    global _record
    fields, _record = mixture_fields(mixture)
    _holder.value.update(fields)


def _mixture() -> Mixture | None:
    from m3jax.moe import document as moe

    return moe.parse(_record["moe"]) if "moe" in _record else None


def _hint(field: str, known: list[str]) -> str:
    """The fields that may be meant, or those that there are."""
    own = [name for name in known if name.partition(".")[0] not in TRANSFORMS | METHODS]
    close = difflib.get_close_matches(field, known, n=3)
    homes = [name for name in known if name.rpartition(".")[2] == field]
    meant = f"; did you mean {', '.join(close or homes)}?" if close or homes else ""
    group = field.partition(".")[0]
    within = [name for name in known if name.startswith(f"{group}.")]
    listed = ", ".join(within or own)
    more = "" if within else "; `m3jax methods` lists those of steps"
    return f"known: {listed}{more}{meant}"


def field_names() -> list[str]:
    """The recipe's fields, dotted."""
    return list(dotted(RECIPE_FIELDS))
