"""`m3jax COMMAND ...`, also as `python -m m3jax`: picks a command and runs it."""

from __future__ import annotations

import difflib
import importlib
import sys

import m3jax

COMMANDS = {
    "merge": "merge a base and fine-tuned models into a new checkpoint",
    "inspect": "list a checkpoint's tensors, dtypes, sizes and provenance",
    "diff": "compare two checkpoints tensor by tensor",
    "verify": "check a merged checkpoint against its record, m3jax.json",
    "evaluate": "score a checkpoint at tasks",
    "explore": "merge many draws in memory, evaluate each, find the best",
    "demo": "merge small built-in models, to see how it works",
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command that the arguments name; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    name = arguments[0] if arguments else "--help"
    if name in ("--help", "-h", "-help", "--helpfull", "help"):
        print(_usage())
        return 0
    if name in ("--version", "-version", "version"):
        print(f"m3jax {m3jax.__version__}")
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"one of {', '.join(COMMANDS)}"
        print(f"m3jax: no command {name!r}; {hint}", file=sys.stderr)
        return 2
    try:
        from m3jax.commands import cli

        module = importlib.import_module(f"m3jax.commands.{name}")
        return cli.run(name, module, arguments[1:])
    except KeyboardInterrupt:  # before `run` could catch it, or once more behind it
        print(f"m3jax {name}: interrupted", file=sys.stderr)
        return 130


def _usage() -> str:
    lines = [
        "m3jax merges fine-tuned language models, fast and reproducibly.",
        "",
        "usage: m3jax COMMAND [--flag=value ...]",
        "",
        *[f"  {name:10}{text}" for name, text in COMMANDS.items()],
        "",
        "`m3jax COMMAND --help` lists a command's flags.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
