"""What a mergekit YAML says of tokenizers, as fields of a recipe.

tokenizer_source: union                 # base, or a model
tokenizer:
  source: union
  pad_to_multiple_of: 64
  tokens:
    <|im_start|>: {source: MODEL, force: true}
    <|new|>: {source: {kind: model_token, model: MODEL, token: <|im_end|>}}
    <|pad|>: {source: {kind: zero}}
chat_template: chatml                   # auto, another name, or a template
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from m3jax.recipe.mergekit_values import check_keys
from m3jax.recipe.problems import RecipeError
from m3jax.recipe.tokenizer import TokenRow

KEYS = ("chat_template", "tokenizer", "tokenizer_source")
Names = Callable[[Any, str], str | None]


def fields(
    document: Mapping[str, Any],
    base: str,
    name_of: Names,
) -> dict[str, Any]:
    """The recipe's `vocabulary` and `tokenizer`, as far as the document says them.

    Args:
      document: of the YAML.
      base: what the word base stands for.
      name_of: reads a reference to a model.

    Raises:
      RecipeError: a key or a value is wrong.
    """
    found: dict[str, Any] = {}
    own: dict[str, Any] = {}
    if document.get("tokenizer_source") is not None:
        if document.get("tokenizer") is not None:
            raise RecipeError(
                "tokenizer and tokenizer_source are both there; tokenizer.source says "
                "the same: leave tokenizer_source out"
            )
        key = "tokenizer_source"
        found["vocabulary"] = _source(document[key], key, base, name_of)
    elif document.get("tokenizer") is not None:
        given = document["tokenizer"]
        if not isinstance(given, dict):
            raise RecipeError(f"tokenizer={given!r} needs keys and values")
        check_keys("tokenizer.", given, ("source", "tokens", "pad_to_multiple_of"))
        source = given.get("source") or "union"
        found["vocabulary"] = _source(source, "tokenizer.source", base, name_of)
        if given.get("pad_to_multiple_of") is not None:
            own["pad_to_multiple_of"] = given["pad_to_multiple_of"]
        tokens = given.get("tokens") or {}
        if not isinstance(tokens, dict):
            raise RecipeError(f"tokenizer.tokens={tokens!r} needs keys and values")
        own["tokens"] = tuple(
            _row(str(token), entry, name_of) for token, entry in tokens.items()
        )
    if document.get("chat_template") is not None:
        own["chat_template"] = document["chat_template"]
    return {**found, **({"tokenizer": own} if own else {})}


def _source(source: Any, key: str, base: str, name_of: Names) -> str:
    if source == "base":
        return base
    if source == "union":
        return "union"
    name = name_of(source, key)
    if name in (None, "error", "mean", "truncate"):
        raise RecipeError(f"{key}={source!r} needs union, base or a model")
    return str(name)


def _row(token: str, entry: Any, name_of: Names) -> TokenRow:
    key = f"tokenizer.tokens.{token}"
    if not isinstance(entry, dict) or entry.get("source") is None:
        raise RecipeError(f"{key}={entry!r} needs a source: a model, or kind: zero")
    check_keys(f"{key}.", entry, ("source", "force"))
    source, force = entry["source"], entry.get("force", False)
    if not isinstance(force, bool):
        raise RecipeError(f"{key}.force={force!r} needs true or false")
    if source == "zero":
        return TokenRow(token, force=force)
    if not isinstance(source, dict) or not {"kind", "token", "token_id"} & set(source):
        return TokenRow(token, name_of(source, f"{key}.source"), force=force)
    kind = source.get("kind", "model_token")
    if kind == "zero":
        check_keys(f"{key}.source.", source, ("kind",))
        return TokenRow(token, force=force)
    check_keys(f"{key}.source.", source, ("kind", "model", "token", "token_id"))
    if kind != "model_token":
        raise RecipeError(f"{key}.source.kind={kind!r} needs model_token or zero")
    rows = [
        source[name] for name in ("token", "token_id") if source.get(name) is not None
    ]
    model = name_of(source.get("model"), f"{key}.source.model")
    if model is None or len(rows) != 1:
        raise RecipeError(f"{key}.source needs model, and either token or token_id")
    row = rows[0] if "token_id" in source else str(rows[0])
    return TokenRow(token, model, row, force)
