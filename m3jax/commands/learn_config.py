"""What is learned, on the command line: `--config=FILE` and `--config.FIELD=VALUE`."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from ml_collections import config_dict

from m3jax.commands import config_file
from m3jax.commands.cli import UsageError
from m3jax.recipe import Recipe, RecipeError
from m3jax.recipe.groups import dotted

if TYPE_CHECKING:
    from m3jax.learn.training.config import Config

_holder: Any = None
_PRESETS = "learn"  # of configs
# Dicts that a user fills: they are one value.
_OPEN = ("objective", "task_weights", "experts", "regularisers", "options")


def default() -> config_dict.ConfigDict:
    """The default config as a ConfigDict, for files in configs/learn to start from."""
    from m3jax.learn.training.config import Config

    return _as_config(Config().to_dict())


def prepare(arguments: list[str]) -> list[str]:
    """Defines the flag `--config`, with the fields of the file that it names.

    Raises:
      UsageError, RecipeError: the file cannot be used or a field is unknown.
    """
    global _holder
    source, rest = config_file.take("--config", arguments)
    own = _load(source) if source else default()
    known = list(dotted(own.to_dict()))
    for field in config_file.fields_given(rest):
        if field not in known:
            close = difflib.get_close_matches(field, known, n=3)
            hint = f"did you mean {', '.join(close)}?" if close else ", ".join(known)
            raise RecipeError(f"unknown field {field!r}; {hint}")
    _holder = config_file.defined(own, "What to learn, and how.", rest)
    return rest


def asked() -> Config:
    """The config that the flags make."""
    return _config(_holder.value)


def named(source: str) -> Config:
    """The config of a preset of configs/learn, or of a file."""
    return _config(_load(source))


def names() -> list[str]:
    """The presets of configs/learn."""
    return config_file.names(_PRESETS)


def _load(source: str) -> config_dict.ConfigDict:
    path = config_file.located(source, _PRESETS)
    if path.suffix == ".json":
        from m3jax.learn.training.config import Config

        found = config_file.read_json(source, path)
        return _as_config(Config.from_dict(found).to_dict())
    config = config_file.run(source, path)
    if "recipe" not in config or "space" not in config:
        raise UsageError(
            f"--config={source}: is of `m3jax merge`; there are {', '.join(names())}"
        )
    return config


def _config(own: config_dict.ConfigDict) -> Config:
    from m3jax.learn.training.config import Config

    return Config.from_dict(_unwrapped(own.to_dict()))


def _as_config(fields: dict[str, Any]) -> config_dict.ConfigDict:
    """All fields of a config; those of every method stand in its recipe."""
    from m3jax.commands.config import all_fields

    recipe = all_fields(Recipe.from_dict(fields["recipe"]))
    return config_file.as_config(_wrapped({**fields, "recipe": recipe}))


def _wrapped(fields: dict[str, Any]) -> dict[str, Any]:
    """With dicts that a user fills as one value: a tuple of pairs."""
    return {
        name: _pairs(value)
        if name in _OPEN
        else _wrapped(value)
        if isinstance(value, dict)
        else value
        for name, value in fields.items()
    }


def _pairs(value: Any) -> Any:
    return tuple(value.items()) if isinstance(value, dict) else value


def _unwrapped(fields: dict[str, Any]) -> dict[str, Any]:
    made = {}
    for name, value in fields.items():
        if name in _OPEN and not isinstance(value, (dict, type(None))):
            try:
                value = dict(value)
            except (TypeError, ValueError):
                raise UsageError(
                    f"--config.{name}={value!r} needs pairs, such as (('a', 1.0),)"
                ) from None
        elif name != "recipe" and isinstance(value, dict) and name not in _OPEN:
            value = _unwrapped(value)
        made[name] = value
    return made
