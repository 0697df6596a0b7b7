"""`m3jax COMMAND ...`, also as `python -m m3jax`: picks a command and runs it."""

from __future__ import annotations

import sys

from m3jax.commands import signals  # before all that takes a while to import

COMMANDS = {
    "merge": "merge a base and fine-tuned models into a new checkpoint",
    "inspect": "list a checkpoint's tensors, dtypes, sizes and provenance",
    "diff": "compare two checkpoints tensor by tensor",
    "verify": "check a merged checkpoint against its record, m3jax.json",
    "evaluate": "score a checkpoint at tasks",
    "measure": "measure models: Fisher information, Gram matrices, similarity",
    "modulate": "make a task's model of what EMR-Merging wrote",
    "convert": "write a mergekit YAML as an m3jax recipe, or the other way",
    "methods": "list the merging methods and their parameters",
    "align": "put a model's units in the order of another's, before a merge",
    "lora": "extract a LoRA adapter from a model, or merge adapters",
    "moe": "build a mixture of experts from dense models",
    "explore": "merge many draws in memory, evaluate each, find the best",
    "learn": "learn the coefficients of a merge from tasks, by gradient",
    "demo": "merge small built-in models, to see how it works",
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command that the arguments name.

    Args:
      argv: the arguments; None: those of this process, which is then a command's
        alone: Ctrl-C and SIGTERM end it at once while it loads what it needs.

    Returns:
      The exit code.
    """
    if argv is None:
        with signals.handled_by(signals.leave):
            from m3jax.commands import process

            process.begin(sys.argv[1] if len(sys.argv) > 1 else "")
            return process.end(main(sys.argv[1:]))
    name = argv[0] if argv else "--help"
    if name in ("--help", "-h", "-help", "--helpfull", "help"):
        print(_usage())
        return 0
    if name in ("--version", "-version", "version"):
        import m3jax

        print(f"m3jax {m3jax.__version__}")
        return 0
    if name not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"one of {', '.join(COMMANDS)}"
        print(f"m3jax: no command {name!r}; {hint}", file=sys.stderr)
        return 2
    import importlib

    from m3jax.commands import cli

    return cli.run(name, importlib.import_module(f"m3jax.commands.{name}"), argv[1:])


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
