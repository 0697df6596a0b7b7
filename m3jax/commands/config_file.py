"""Files of `--config`: found, read, and defined as flags of their fields."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

from ml_collections import config_dict, config_flags

from m3jax.commands.cli import UsageError, local


def take(flag: str, arguments: list[str]) -> tuple[str | None, list[str]]:
    """Takes `--flag=VALUE` or `--flag VALUE` out; the last one counts."""
    found: str | None = None
    rest: list[str] = []
    left = list(arguments)
    while left:
        argument = left.pop(0)
        if argument == "--":
            return found, [*rest, argument, *left]
        name, equals, value = argument.partition("=")
        if "-" + name.lstrip("-") != flag[1:] or not name.startswith("-"):
            rest.append(argument)
        elif equals or left:
            found = value if equals else left.pop(0)
        else:
            raise UsageError(f"{flag} needs a file")
    return found, rest


def names(folder: str = "") -> list[str]:
    """The names of m3jax's own files, those in a folder of `configs`."""
    return sorted(p.stem for own in _folders(folder) for p in own.glob("[!_]*.py"))


def located(source: str, folder: str = "") -> Path:
    """The file, or m3jax's own of that name.

    Raises:
      UsageError: there is none.
    """
    path = local(source)
    if not path.suffix:
        path = next((own / f"{source}.py" for own in _folders(folder)), path)
    if not path.is_file():
        hint = "" if Path(source).suffix else f"; there are {', '.join(names(folder))}"
        raise UsageError(f"--config={source}: no such file{hint}")
    return path


def read_json(source: str, path: Path) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
      UsageError: it has none.
    """
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--config={source}: not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise UsageError(f"--config={source}: needs an object of fields")
    return found


def run(source: str, path: Path) -> Any:
    """What the `get_config` of a Python file gives.

    Raises:
      UsageError: it raises something, or there is none.
    """
    try:
        return runpy.run_path(str(path))["get_config"]()
    except Exception as error:
        raise UsageError(
            f"--config={source}: {type(error).__name__}: {error}; a config is a Python "
            "file whose get_config() returns a ConfigDict"
        ) from None


def fields_given(arguments: list[str]) -> list[str]:
    """The fields that flags `--config.FIELD` name."""
    flags = (argument.partition("=")[0].lstrip("-") for argument in arguments)
    return [
        flag.removeprefix("config.") for flag in flags if flag.startswith("config.")
    ]


def defined(config: config_dict.ConfigDict, help: str, arguments: list[str]) -> Any:
    """Defines the flag `--config` and those of its fields; its holder."""
    return config_flags.DEFINE_config_dict(
        "config", config, help, sys_argv=["m3jax", *arguments]
    )


def as_config(fields: dict[str, Any]) -> config_dict.ConfigDict:
    """Every field may hold any literal, so that `None` and tuples parse everywhere."""
    config = config_dict.ConfigDict()
    for name, value in fields.items():
        if isinstance(value, dict):
            config[name] = as_config(value)
        else:
            config[name] = config_dict.FieldReference(value, field_type=object)
    return config


def _folders(folder: str) -> list[Path]:
    import m3jax.configs

    return [Path(path) / folder for path in m3jax.configs.__path__]
