"""The flags with which `evaluate` and `explore` score models at tasks."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3jax.commands import mesh
from m3jax.commands.cli import UsageError, define

if TYPE_CHECKING:
    from collections.abc import Sequence

    from m3jax.evaluation.evaluator import TaskEvaluator
    from m3jax.evaluation.tasks.task import Task
    from m3jax.models.config import Config
    from m3jax.models.tokenizer import Tokenizer

GROUPS = {
    "Running models": (
        *("tokens_per_batch", "dtype", "mesh", "harness_tasks_path"),
        "allow_code_execution",
    )
}

LIMIT = define("limit", int, "Only the first N examples of each task.")
TOKENS_PER_BATCH = define(
    "tokens_per_batch", int, "More is faster and takes more memory.", 4096
)
HARNESS_TASKS_PATH = define(
    "harness_tasks_path", str, "Folder of more harness tasks, as YAML."
)
_DTYPE = define(
    "dtype", ["input", "float32", "bfloat16"], "Of the matrix products.", "input"
)
_MESH = define(
    "mesh",
    list,
    "Split models over devices, such as rows=4 or rows=2,columns=2; one draw at a "
    "time. [a device has all]",
)
ALLOW_CODE_EXECUTION = define(
    "allow_code_execution", bool, "Run the programs that models write, for code tasks."
)


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


def split(asked: Sequence[str]) -> tuple[list[Task], list[str]]:
    """The tasks of JSON files, and the names of the harness's."""
    from m3jax.evaluation.tasks.task import load_tasks

    tasks, names = [], []
    for name in asked:
        if name.endswith(".json") or "/" in name or Path(name).is_file():
            tasks += load_tasks(name)
        else:
            names.append(name)
    return tasks, names


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
