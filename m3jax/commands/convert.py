"""Writes a recipe in the other form: mergekit's YAML as an m3jax recipe, and back.

What mergekit's YAML cannot say (drawn ratios, thresholds over the whole model, DARE's
1/(1 − p)) is refused. The result goes to standard output, or to --output.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from m3jax.commands import config
from m3jax.commands.cli import UsageError, define, define_names, names
from m3jax.recipe import RecipeError
from m3jax.recipe.documents import Document

USAGE = "m3jax convert RECIPE [--base=DIR --models=A,B[,C...]] [--output=FILE]"

_BASE = define("base", str, "The base model.")
_MODELS = define_names("models", "The models.")
_OUTPUT = define("output", str, "The file.")


def prepare(arguments: list[str]) -> list[str]:
    """The recipe is what `--config` is to other commands."""
    files = [own for own in arguments if not own.startswith("-")]
    rest = [own for own in arguments if own.startswith("-")]
    if len(files) != 1:
        if "--help" in rest or "-h" in rest:
            return config.prepare(rest)
        raise UsageError(f"needs one recipe, not {len(files)}; usage: {USAGE}")
    global _source
    _source = files[0]
    return config.prepare([f"--config={files[0]}", *rest])


_source = ""


def main(positional: list[str]) -> int:
    asked = config.asked(_BASE.value, names(_MODELS), None)
    result = Document(asked.base, tuple(asked.models), asked.recipe, asked.seed)
    if Path(_source).suffix in (".yml", ".yaml"):
        text = _as_record(result, asked.documents)
    else:
        if not result.models:
            raise UsageError(
                "the recipe names no models, which mergekit's YAML has to: give "
                f"--models; usage: {USAGE}"
            )
        result.recipe.check(
            num_models=len(result.models), has_base=result.base is not None
        )
        from m3jax.recipe import mergekit_writer

        try:
            text = mergekit_writer.write([*asked.documents, result])
        except RecipeError as error:
            raise UsageError(f"{_source}: {error}") from None
        print(f"mergekit takes --random-seed={result.seed}", file=sys.stderr)
    if _OUTPUT.value is None:
        print(text, end="")
    else:
        with Path(_OUTPUT.value).open("x") as file:
            file.write(text)
    return 0


def _as_record(result: Document, named: tuple[Document, ...]) -> str:
    """What --config takes as it takes an m3jax.json."""
    record = {
        "recipe": result.recipe.to_dict(),
        "seed": result.seed,
        "base": None if result.base is None else {"path": result.base},
        "models": [{"path": model} for model in result.models],
        **({"documents": [own.to_dict() for own in named]} if named else {}),
    }
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"
