"""The flags with which `evaluate` and `explore` score models at tasks."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from m3jax.commands import mesh
from m3jax.commands.cli import UsageError
from m3jax.commands.tables import clean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from m3jax.evaluation.evaluator import TaskEvaluator
    from m3jax.evaluation.tasks.task import Task
    from m3jax.models.config import Config
    from m3jax.models.tokenizer import Tokenizer

# Other commands have flags of these names, too; a process runs one command.
LIMIT = flags.DEFINE_integer(
    "limit", None, "Only the first N examples of each task.", allow_override=True
)
TOKENS_PER_BATCH = flags.DEFINE_integer(
    "tokens_per_batch",
    4096,
    "More is faster and takes more memory.",
    allow_override=True,
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "input",
    ["input", "float32", "bfloat16"],
    "Of the matrix products.",
    allow_override=True,
)
_MESH = flags.DEFINE_list(
    "mesh",
    None,
    "Split models over devices, such as rows=4 or rows=2,columns=2; one draw at a "
    "time. [a device has all]",
    allow_override=True,
)
ALLOW_CODE_EXECUTION = flags.DEFINE_bool(
    "allow_code_execution",
    False,
    "Run the programs that models write, for code tasks.",
    allow_override=True,
)


def check(*more: flags.FlagHolder[int | None]) -> None:
    """Raises UsageError if one of these flags, or of `more`, is below 1."""
    for flag in (LIMIT, TOKENS_PER_BATCH, *more):
        if flag.value is not None and flag.value < 1:
            raise UsageError(f"--{flag.name}={flag.value} needs 1 or more")


def devices() -> dict[str, int] | None:
    """What `--mesh` asks for."""
    return mesh.sizes(_MESH.value)


def options() -> dict[str, Any]:
    """What every model that is scored is run with."""
    import jax.numpy as jnp

    known = {"input": None, "float32": jnp.float32, "bfloat16": jnp.bfloat16}
    return {"tokens_per_batch": TOKENS_PER_BATCH.value, "dtype": known[_DTYPE.value]}


def evaluator(
    tasks: Sequence[Task], config: Config, tokenizer: Tokenizer
) -> TaskEvaluator:
    """An evaluator as the flags ask for it."""
    from m3jax.evaluation.evaluator import TaskEvaluator

    return TaskEvaluator(
        tasks,
        config,
        tokenizer,
        allow_code_execution=ALLOW_CODE_EXECUTION.value,
        **options(),
    )


def is_file(name: str) -> bool:
    """Whether a task is a JSON file, rather than one of the harness's."""
    return name.endswith(".json") or "/" in name or Path(name).is_file()


def harness(names: Sequence[str], what: str) -> Any:
    """Something of `m3jax.evaluation.harness`, or the way to have it.

    Raises:
      UsageError: the harness is not installed.
    """
    homes = {"HarnessModel": "model", "HarnessEvaluator": "evaluator"}
    try:
        module = importlib.import_module(f"m3jax.evaluation.harness.{homes[what]}")
    except ImportError as error:
        raise UsageError(
            f"{', '.join(names)}: no file of that name, and tasks of "
            f"lm-evaluation-harness need the extra harness (missing: {error.name}): "
            "from a checkout, pip install '.[harness]'"
        ) from None
    return getattr(module, what)


def say(line: str) -> None:
    """Tells the user how far it is, on standard error."""
    print(f"m3jax: {clean(line)}", file=sys.stderr, flush=True)
