"""The part of a recipe that is about tokens: their rows, and what goes with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from m3jax.recipe.problems import Problems, RecipeError, plain

# What `vocabulary` may be besides a model's name. The first three go by rows.
BY_ROW = ("error", "mean", "truncate")
BY_TOKEN = ("union", "base")
VOCABULARIES = (*BY_ROW, *BY_TOKEN)


class TokenRow(NamedTuple):
    """Whose row a token gets in models that lack it.

    Attributes:
      token: of the output.
      model: that has the row; None: the row is 0.
      row: a token of that model, or its id; None: the same token.
      force: also in models that have the token.
    """

    token: str
    model: str | None = None
    row: str | int | None = None
    force: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """How rows of embedding and head find each other, and what is written beside them.

    The first three are for merges by token: `vocabulary` is union, base or a model.

    Attributes:
      tokens: rows of single tokens, as `TokenRow` or (token, model, row, force).
      missing: what a model gets for a token that it lacks: ``base``: the base's row,
        so that its task vector is 0 there (where the base lacks it too, the mean of
        those that have it); ``mean``: that mean in any case; or the row of the model
        of this name.
      pad_to_multiple_of: of the number of rows; padding is each model's mean row.
      chat_template: a model's name, ``auto`` (what most models have), alpaca, chatml,
        exaone, llama3, mistral, or a template; None: what goes with the tokenizer.
      copy: False leaves tokenizer and chat template out.
      config: ``fit``, which None is: where rows are truncated, config.json follows;
        ``keep``: it stays, as with mergekit, and transformers does not load the model.
    """

    tokens: tuple[Any, ...] = ()
    missing: str = "base"
    pad_to_multiple_of: int | None = None
    chat_template: str | None = None
    copy: bool = True
    config: str | None = None

    def __post_init__(self) -> None:
        rows = plain(self.tokens)
        if isinstance(rows, tuple):
            rows = tuple(_row(own) for own in rows)
        object.__setattr__(self, "tokens", rows)

    @property
    def by_token(self) -> bool:
        """Whether a field is set that only merges by token have."""
        return bool(self.tokens) or (self.missing, self.pad_to_multiple_of) != (
            "base",
            None,
        )

    def check(self, problems: Problems, vocabulary: Any) -> None:
        """Notes what is out of range, and what does not fit `vocabulary`."""
        rows = self.tokens if isinstance(self.tokens, tuple) else ()
        if not isinstance(self.tokens, tuple) or not all(map(_is_row, rows)):
            problems.add(
                "tokenizer.tokens",
                self.tokens,
                "rows of a token, a model or None, a token or an id or None, and a "
                "bool, such as (('<|im_end|>', 'a', None, True),)",
            )
        elif len({own.token for own in rows}) < len(rows):
            problems.add("tokenizer.tokens", rows, "each token once")
        multiple = self.pad_to_multiple_of
        if multiple is not None and not (
            type(multiple) is int and 1 <= multiple <= 1 << 20
        ):
            allowed = f"None, or a number from 1 to {1 << 20}"
            problems.add("tokenizer.pad_to_multiple_of", multiple, allowed)
        if not isinstance(self.missing, str) or not self.missing:
            problems.add("tokenizer.missing", self.missing, "base, mean or a model")
        template = self.chat_template
        if template is not None and (not isinstance(template, str) or not template):
            problems.add("tokenizer.chat_template", template, "a template or its name")
        if not isinstance(self.copy, bool):
            problems.add("tokenizer.copy", self.copy, "True or False")
        if self.config not in (None, "fit", "keep"):
            problems.add("tokenizer.config", self.config, "None, fit or keep")
        if template is not None and not self.copy:
            problems.add("tokenizer.copy", self.copy, "True, or no chat_template")
        if not isinstance(vocabulary, str) or not vocabulary:
            allowed = f"one of {', '.join(VOCABULARIES)}, or a model's name"
            problems.add("vocabulary", vocabulary, allowed)
        elif vocabulary in BY_ROW and self.by_token and not problems:
            problems.add(
                "vocabulary",
                vocabulary,
                f"{', '.join(BY_TOKEN)} or a model's name, for the tokenizer's tokens, "
                "missing and pad_to_multiple_of",
            )

    def renamed(self, name: Callable[[str], str]) -> TokenizerConfig:
        """It with other names for the models that it names."""
        rows = [
            row if row.model is None else row._replace(model=name(row.model))
            for row in self.tokens
        ]
        template = self.chat_template
        return dataclasses.replace(
            self,
            tokens=tuple(rows),
            missing=name(self.missing),
            chat_template=template and name(template),
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)
        }


def check_vocabulary(vocabulary: str, names: Sequence[str]) -> None:
    """Raises RecipeError for what is neither a way to go nor one of the models."""
    models = [name.rstrip("/") for name in names]
    if vocabulary not in VOCABULARIES and vocabulary.rstrip("/") not in models:
        raise RecipeError(
            f"vocabulary={vocabulary!r} needs one of {', '.join(VOCABULARIES)}, or one "
            f"of the models: {', '.join(names)}"
        )


def _row(row: Any) -> Any:
    if isinstance(row, tuple) and 1 <= len(row) <= 4:
        return TokenRow(*row)
    return row


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, TokenRow)
        and isinstance(row.token, str)
        and (row.model is None or isinstance(row.model, str))
        and (row.row is None or isinstance(row.row, str) or type(row.row) is int)
        and (row.model is not None or row.row is None)
        and isinstance(row.force, bool)
    )
