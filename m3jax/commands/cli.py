"""What all commands share: flags, help, errors on one line, exit codes.

Exit codes:
  0    done
  1    `verify` or `diff --exit_code` found a difference
  2    the command line, the recipe or a task is wrong
  3    an input checkpoint cannot be used, or the output's place is taken, or the hub
       refuses it
  4    the disk or the system failed: read or write error, no space, no memory, too
       many files; or another process of the same merge did, or m3jax
  130  interrupted (Ctrl-C); 143: terminated
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags

from m3jax.commands import help, process, signals, tables

DIFFERENT, USAGE, INPUT, SYSTEM = 1, 2, 3, 4

# Of a flag given twice absl takes the last, in silence; of these no value gets lost.
_ONCE = ("base", "config", "output", "tokenizer_from")

_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")
# Flags that are defined below are those of the module that asks for them.
flags.disclaim_key_flags()

_DEFINED: dict[Any, Any] = {
    str: flags.DEFINE_string,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_bool,
    list: flags.DEFINE_list,
    tuple: flags.DEFINE_multi_string,  # which may be given several times
}


class UsageError(ValueError):
    """The command line is wrong; the message says what would be right."""


def define(
    name: str, kind: type | Sequence[str], help: str, default: Any = None
) -> flags.FlagHolder[Any]:
    """A flag. Other commands may have one of this name, too: a process runs one.

    Args:
      name, help: of it.
      kind: of its value; or the words that it may be.
      default: its value where it is not given; of a bool False.
    """
    if isinstance(kind, type):
        default = False if kind is bool and default is None else default
        return _DEFINED[kind](name, default, help, allow_override=True)
    return flags.DEFINE_enum(name, default, list(kind), help, allow_override=True)


def define_names(name: str, help: str) -> flags.FlagHolder[Any]:
    """A flag of names, separated by commas, that may be given several times."""
    parser, serializer = flags.ListParser(), flags.CsvListSerializer(",")
    return flags.DEFINE_multi(parser, serializer, name, None, help, allow_override=True)


def names(flag: flags.FlagHolder[Any]) -> list[str] | None:
    """All names that a flag of `define_names` was given; None without the flag.

    Raises:
      UsageError: one of them is empty, as where a shell's variable is not set.
    """
    if flag.value is None:
        return None
    found: list[str] = []
    for given in flag.value:
        given = given[:-1] if len(given) > 1 and not given[-1] else given
        if not all(given):
            raise UsageError(
                f"--{flag.name} has an empty name between its commas; needs A,B[,C...]"
            )
        found += given
    return found


def need(usage: str, **given: Any) -> None:
    """Raises UsageError for the first of these flags that has no value."""
    for name, value in given.items():
        if not value:
            raise UsageError(f"--{name} is missing; usage: {usage}")


def at_least_one(*counts: flags.FlagHolder[Any]) -> None:
    """Raises UsageError for the first of these flags that is given and below 1."""
    for flag in counts:
        if flag.value is not None and flag.value < 1:
            raise UsageError(f"--{flag.name}={flag.value} needs 1 or more")


def local(path: str) -> Path:
    """A path of this machine; shells leave the ~ of `--output=~/x` to the program."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path's own may raise


def run(name: str, module: ModuleType, arguments: list[str]) -> int:
    """Parses the flags, runs `module.main(positional arguments)`, explains errors.

    Args:
      name: of the command.
      module: has `main`, a docstring whose first line says what it does, `USAGE`, and
        its flags; optionally `TAKES`, how many arguments that are no flags, and what
        they are (None: any; without it none); `prepare(arguments)`, which sees them
        before parsing; `failed(exit code)`, called when an error was explained;
        `SHARED`, modules with more flags; `LESS_MEMORY`, the way out where there is
        too little; and what `help.text` asks for.
      arguments: of the command line, behind the command's name.

    Returns:
      The exit code.
    """
    if any(
        a in ("--help", "-help", "-h", "--helpshort", "--helpfull") for a in arguments
    ):
        print(help.text(name, module, sys.modules[__name__]))
        return 0
    logging.captureWarnings(True)
    tables.say_logged("m3jax")
    debug = "--debug" in arguments
    try:
        _check_once(arguments)
        arguments = getattr(module, "prepare", list)(arguments)
        positional = flags.FLAGS([f"m3jax {name}", *arguments])[1:]
        _check_count(positional, module)
        debug = _DEBUG.value
        process.open_many_files()
        with signals.handled_by(signals.stop):
            code = module.main(positional)
            sys.stdout.flush()
        return code or 0
    except BrokenPipeError:  # `m3jax inspect … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt, signals.Terminated) as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, flags.UnrecognizedFlagError):
            error = _with_hint(error, module)
        code, message = _explain(error, getattr(module, "LESS_MEMORY", _LESS_MEMORY))
        print(f"m3jax {name}: {message}", file=sys.stderr)
        getattr(module, "failed", lambda code: None)(code)
        return code


def _check_count(given: list[str], module: ModuleType) -> None:
    """Raises UsageError unless there are as many arguments as the module's `TAKES`."""
    takes: tuple[int, str] | None = getattr(module, "TAKES", (0, ""))
    if takes is None or len(given) == takes[0]:
        return
    found = f"needs {takes[1]}, not {len(given)}"
    if not takes[0]:
        found = f"unexpected argument {given[0]!r}"
    raise UsageError(f"{found}; usage: {module.USAGE}")


def _check_once(arguments: list[str]) -> None:
    """Raises UsageError if a flag that has one value is given two."""
    given: dict[str, str] = {}
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if argument == "--":
            return
        if not name.startswith("-") or name.lstrip("-") not in _ONCE:
            continue
        value = value if equals else "".join(arguments[place + 1 : place + 2])
        if not value:
            raise UsageError(f"{name} is empty; give a value, or leave it out")
        before = given.setdefault(name.lstrip("-"), value)
        if before != value:
            flag = name.lstrip("-")
            raise UsageError(
                f"--{flag} is given twice, {before} and {value}; give one of them"
            )


def leave_at_once(code: int) -> None:
    """Ends the process without waiting for its threads; for a command's `failed`."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


_LESS_MEMORY = "a smaller --chunk_size or fewer --threads need less"


def _explain(error: BaseException, less_memory: str) -> tuple[int, str]:
    """The exit code and one line, with what was noted on the error's way up."""
    code, message = _classify(error, less_memory)
    return code, "; ".join([message, *getattr(error, "__notes__", [])])


def _classify(error: BaseException, less_memory: str) -> tuple[int, str]:
    # Imported here, where they are loaded already if they were raised.
    from m3jax.checkpoints.errors import CheckpointError
    from m3jax.recipe import RecipeError

    text = " ".join(str(error).split())
    if isinstance(error, CheckpointError):
        return INPUT, text
    if isinstance(error, (RecipeError, UsageError, flags.Error)):
        return USAGE, text
    if isinstance(error, KeyboardInterrupt):
        return signals.INTERRUPTED, text or "interrupted"
    if isinstance(error, signals.Terminated):
        return signals.TERMINATED, text or "terminated"
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in text  # XLA's
    ):
        return SYSTEM, f"out of memory; {less_memory}"
    if isinstance(error, OSError):
        what = f"{error.filename}: {error.strerror}" if error.filename else text
        hints = {
            errno.ENOSPC: "; the disk is full",
            errno.EDQUOT: "; the disk quota is used up",
            errno.EFBIG: "; files may not be this large here (see ulimit -f)",
            errno.EIO: "; the disk failed to read or write",
            errno.EMFILE: "; this process may not open more (see ulimit -n)",
        }
        return SYSTEM, what + hints.get(error.errno or 0, "")
    if isinstance(error, ValueError):
        return USAGE, text
    return SYSTEM, f"{type(error).__name__}: {text}; this is a bug: --debug shows where"


def _with_hint(error: flags.UnrecognizedFlagError, module: ModuleType) -> Exception:
    """The error; where a recipe's field was given as a bare flag, one that says so."""
    if hasattr(module, "prepare"):
        from m3jax.commands import config

        for field in config.field_names():
            if error.flagname in (field, field.rpartition(".")[2]):
                return UsageError(
                    f"unknown flag --{error.flagname}; did you mean --config.{field}?"
                )
    return error
