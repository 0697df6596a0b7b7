"""What is learned, on the command line: `--config=FILE` and `--config.FIELD=VALUE`."""

from __future__ import annotations

import difflib
import json
import runpy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import config_dict, config_flags

from m3jax.commands.cli import UsageError
from m3jax.commands.config import as_config, dotted, take
from m3jax.recipe import Recipe, RecipeError

if TYPE_CHECKING:
    from m3jax.learn.training.config import Config

_holder: Any = None
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
    source, rest = take("--config", arguments)
    own = _load(source) if source else default()
    known = field_names(own)
    for argument in rest:
        name = argument.partition("=")[0].lstrip("-")
        field = name.removeprefix("config.")
        if name.startswith("config.") and field not in known:
            close = difflib.get_close_matches(field, known, n=3)
            hint = f"did you mean {', '.join(close)}?" if close else ", ".join(known)
            raise RecipeError(f"unknown field {field!r}; {hint}")
    _holder = config_flags.DEFINE_config_dict(
        "config", own, "What to learn, and how.", sys_argv=["m3jax", *rest]
    )
    return rest


def asked() -> Config:
    """The config that the flags make."""
    from m3jax.learn.training.config import Config

    return Config.from_dict(_unwrapped(_holder.value.to_dict()))


def field_names(config: config_dict.ConfigDict | None = None) -> list[str]:
    """The fields, dotted."""
    return dotted((default() if config is None else config).to_dict())


def names() -> list[str]:
    """The presets of configs/learn."""
    return sorted(p.stem for folder in _folders() for p in folder.glob("[!_]*.py"))


def _folders() -> list[Path]:
    import m3jax.configs

    return [Path(path) / "learn" for path in m3jax.configs.__path__]


def _load(source: str) -> config_dict.ConfigDict:
    path = Path(source)
    if not path.suffix:
        path = next((f / f"{source}.py" for f in _folders()), path)
    if not path.is_file():
        raise UsageError(
            f"--config={source}: no such file; there are {', '.join(names())}"
        )
    if path.suffix == ".json":
        try:
            found = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise UsageError(f"--config={source}: not valid JSON ({error})") from None
        from m3jax.learn.training.config import Config

        if not isinstance(found, dict):
            raise UsageError(f"--config={source}: needs an object")
        return _as_config(Config.from_dict(found).to_dict())
    try:
        config = runpy.run_path(str(path))["get_config"]()
    except Exception as error:
        raise UsageError(
            f"--config={source}: {type(error).__name__}: {error}; a config is a Python "
            "file whose get_config() returns a ConfigDict"
        ) from None
    if "recipe" not in config or "space" not in config:
        raise UsageError(
            f"--config={source}: is of `m3jax merge`; there are {', '.join(names())}"
        )
    return config


def _as_config(fields: dict[str, Any]) -> config_dict.ConfigDict:
    """All fields of a config; those of every method stand in its recipe."""
    from m3jax.commands.config import all_fields

    recipe = all_fields(Recipe.from_dict(fields["recipe"]))
    return as_config(_wrapped({**fields, "recipe": recipe}))


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
