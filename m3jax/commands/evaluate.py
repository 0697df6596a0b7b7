"""Scores a checkpoint of the Llama family at tasks.

A task is a JSONL file and a JSON spec beside it of what to ask and how to mark the
answer: kinds loss, choice, exact_match, regex, numeric and code. For example,

    {"name": "gsm8k", "kind": "numeric", "data": "gsm8k_test.jsonl",
     "prompt": "Question: {question}\\nAnswer:", "answer": "{answer}",
     "stop": ["\\nQuestion:"], "max_new_tokens": 320}

A code task runs the programs that the model writes, with limits of time and memory,
and without a network where the system allows that. It is no sandbox: use a container.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from m3jax.commands.cli import UsageError
from m3jax.commands.tables import clean, table

if TYPE_CHECKING:
    from m3jax.evaluation.results import Result

USAGE = "m3jax evaluate MODEL --tasks=SPEC.json[,...] [--limit=N] [--json]"
MORE_HELP = ["", *(__doc__ or "").split("\n")[2:-1]]

_TASKS = flags.DEFINE_list("tasks", None, "JSON files of tasks, comma-separated.")
_LIMIT = flags.DEFINE_integer("limit", None, "Only the first N examples of each.")
_DTYPE = flags.DEFINE_enum(
    "dtype", "input", ["input", "float32", "bfloat16"], "Of the matrix products."
)
_TOKENS_PER_BATCH = flags.DEFINE_integer(
    "tokens_per_batch", 4096, "More is faster and takes more memory."
)
_ALLOW_CODE_EXECUTION = flags.DEFINE_bool(
    "allow_code_execution",
    False,
    "Run the programs that the model writes, for code tasks.",
)
# Other commands have flags of these names, too; a process runs one command.
_SEED = flags.DEFINE_integer("seed", 0, "Of sampling.", allow_override=True)
_JSON = flags.DEFINE_bool("json", False, "Print JSON.", allow_override=True)
_OUTPUT = flags.DEFINE_string(
    "output", None, "JSONL file to write, a line for each example.", allow_override=True
)


def main(positional: list[str]) -> int:
    if len(positional) != 1:
        raise UsageError(f"needs one model, not {len(positional)}; usage: {USAGE}")
    if not _TASKS.value:
        raise UsageError(f"needs --tasks; usage: {USAGE}")
    for flag in (_LIMIT, _TOKENS_PER_BATCH):
        if flag.value is not None and flag.value < 1:
            raise UsageError(f"--{flag.name}={flag.value} needs 1 or more")
    output = None if _OUTPUT.value is None else Path(_OUTPUT.value)
    if output is not None and not output.absolute().parent.is_dir():
        raise UsageError(f"--output={output}: {output.parent} is not a folder")
    results = _results(positional[0])
    if output is not None:
        _write(results, output)
    if _JSON.value:
        from m3jax.evaluation.results import as_json

        print(json.dumps([as_json(result.to_dict()) for result in results], indent=1))
    else:
        print("\n".join(_report(results)))
    return 0


def _results(model_name: str) -> list[Result]:
    # Imported here: `--help` must not wait for JAX.
    import jax
    import jax.numpy as jnp

    from m3jax.evaluation.evaluator import TaskEvaluator
    from m3jax.evaluation.tasks import load_tasks
    from m3jax.evaluation.tokenizer import FolderTokenizer
    from m3jax.models.parameters import load_model
    from m3jax.prng import check_seed

    seed = check_seed(_SEED.value)
    tasks = [task for path in _TASKS.value or [] for task in load_tasks(path)]
    model = load_model(model_name)
    evaluator = TaskEvaluator(
        tasks,
        model.config,
        FolderTokenizer(model.folder),
        tokens_per_batch=_TOKENS_PER_BATCH.value,
        dtype={"input": None, "float32": jnp.float32, "bfloat16": jnp.bfloat16}[
            _DTYPE.value
        ],
        allow_code_execution=_ALLOW_CODE_EXECUTION.value,
    )
    results: list[Result] = []
    for result in evaluator.results(
        model.parameters, _LIMIT.value, jax.random.key(seed)
    ):
        done = f"{len(results) + 1} of {len(tasks)} tasks"
        print(f"m3jax: {done}: {clean(result.task)}", file=sys.stderr, flush=True)
        results.append(result)
    return results


def _report(results: list[Result]) -> list[str]:
    rows = []
    for result in results:
        error = result.standard_error
        rows.append(
            (
                clean(result.task),
                result.metric,
                f"{result.mean:.4f}",
                "—" if math.isnan(error) else f"± {error:.4f}",
                f"{result.count:,}",
            )
        )
    lines = table(("task", "metric", "mean", "", "n"), rows, "<<>>>")
    for result in results:
        if result.truncated:
            lines.append(
                f"note: {clean(result.task)}: {result.truncated} of {result.count} "
                "prompts lost their beginning, to fit into the model"
            )
    return lines


def _write(results: list[Result], output: Path) -> None:
    """Writes all records; the file appears when it is complete."""
    from m3jax.evaluation.results import as_json

    unfinished = output.with_name(f"{output.name}.{os.getpid()}.partial")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            for result in results:
                for record in result.records:
                    line: dict[str, Any] = {"task": result.task, **as_json(record)}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
        unfinished.replace(output)
    finally:
        unfinished.unlink(missing_ok=True)
