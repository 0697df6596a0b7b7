"""Scores a checkpoint of the Llama family, or of GPT-2, at tasks.

A task is a JSONL file and a JSON spec beside it of what to ask and how to mark the
answer: kinds loss, choice, exact_match, regex, numeric and code. For example,

    {"name": "gsm8k", "kind": "numeric", "data": "gsm8k_test.jsonl",
     "prompt": "Question: {question}\\nAnswer:", "answer": "{answer}",
     "stop": ["\\nQuestion:"], "max_new_tokens": 320}

A name that is no file is a task of lm-evaluation-harness: --tasks=gsm8k,arc_easy (needs
pip install 'm3jax[harness]').

--attacks also runs each task with its prompt disturbed, and reports the drop rate,
(clean − attacked) / clean. An attack changes the words of the prompt's template, never
the {fields} that it fills in, and looks for the change that costs this model most:
  deepwordbug  swaps, substitutes, deletes or inserts a letter in important words
  stresstest   appends a true statement that is beside the point
  words        neighbours in the model's own embedding for important words

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

from m3jax.checkpoints import durable
from m3jax.commands import mesh
from m3jax.commands.cli import UsageError
from m3jax.commands.tables import clean, table

if TYPE_CHECKING:
    from collections.abc import Callable

    from m3jax.evaluation.attacks.neighbours import Neighbours
    from m3jax.evaluation.attacks.robustness import Robustness
    from m3jax.evaluation.evaluator import TaskEvaluator
    from m3jax.evaluation.harness.tasks import HarnessResult
    from m3jax.evaluation.results import Result
    from m3jax.evaluation.tasks.task import Task
    from m3jax.models.parameters import Model

    Scored = Result | HarnessResult

USAGE = "m3jax evaluate MODEL --tasks=SPEC.json|NAME[,...] [--limit=N] [--json]"
LESS_MEMORY = "a smaller --tokens_per_batch needs less, and --mesh splits the model"
MORE_HELP = ["", *(__doc__ or "").split("\n")[2:-1]]

_TASKS = flags.DEFINE_list(
    "tasks", None, "JSON files of tasks, or names of harness tasks, comma-separated."
)
_HARNESS_TASKS_PATH = flags.DEFINE_string(
    "harness_tasks_path", None, "Folder of more harness tasks, as YAML."
)
_ATTACKS = flags.DEFINE_list("attacks", [], "deepwordbug, stresstest, words.")
_ATTACK_EXAMPLES = flags.DEFINE_integer(
    "attack_examples", 64, "The first of each task, on which an attack searches."
)
_LIMIT = flags.DEFINE_integer("limit", None, "Only the first N examples of each.")
_DTYPE = flags.DEFINE_enum(
    "dtype", "input", ["input", "float32", "bfloat16"], "Of the matrix products."
)
_TOKENS_PER_BATCH = flags.DEFINE_integer(
    "tokens_per_batch", 4096, "More is faster and takes more memory."
)
_MESH = flags.DEFINE_list(
    "mesh",
    None,
    "Split the model over devices, such as rows=4 or rows=2,columns=2. [one has all]",
    allow_override=True,
)
_ALLOW_CODE_EXECUTION = flags.DEFINE_bool(
    "allow_code_execution",
    False,
    "Run the programs that the model writes, for code tasks.",
)
# Other commands have flags of these names, too; a process runs one command.
_SEED = flags.DEFINE_integer("seed", None, "Of sampling. [0]", allow_override=True)
_JSON = flags.DEFINE_bool("json", False, "Print JSON.", allow_override=True)
_OUTPUT = flags.DEFINE_string(
    "output", None, "JSONL file to write, a line for each example.", allow_override=True
)


def main(positional: list[str]) -> int:
    if len(positional) != 1:
        raise UsageError(f"needs one model, not {len(positional)}; usage: {USAGE}")
    if not _TASKS.value:
        raise UsageError(f"needs --tasks; usage: {USAGE}")
    for flag in (_LIMIT, _TOKENS_PER_BATCH, _ATTACK_EXAMPLES):
        if flag.value is not None and flag.value < 1:
            raise UsageError(f"--{flag.name}={flag.value} needs 1 or more")
    output = None if _OUTPUT.value is None else Path(_OUTPUT.value)
    if output is not None and not output.absolute().parent.is_dir():
        raise UsageError(f"--output={output}: {output.parent} is not a folder")
    if output is not None and output.is_dir():
        raise UsageError(f"--output={output}: is a folder, needs to be a file")
    results, attacked = _results(positional[0])
    if _JSON.value:
        from m3jax.evaluation.results import as_json

        entries = [entry.to_dict() for entry in (*results, *attacked)]
        print(json.dumps([as_json(entry) for entry in entries], indent=1))
    else:
        print("\n".join(_report(results)))
        if attacked:
            print("\n".join(["", *_report_attacks(attacked)]))
    if output is not None:  # last: a full disk must not cost what took so long
        sys.stdout.flush()
        _write(results, output)
    return 0


def _results(model_name: str) -> tuple[list[Scored], list[Robustness]]:
    # Imported here: `--help` must not wait for JAX.
    import jax

    from m3jax.engine.sharding_rules import over_devices
    from m3jax.evaluation.attacks.prompts import ATTACKS, check_attackable
    from m3jax.evaluation.tasks.task import load_tasks
    from m3jax.models.parameters import load_model
    from m3jax.prng import check_seed

    seed = check_seed(_SEED.value or 0)
    for attack in _ATTACKS.value:
        if attack not in ATTACKS:
            raise UsageError(f"--attacks={attack}: known: {', '.join(ATTACKS)}")
    files = [name for name in _TASKS.value or [] if _is_file(name)]
    names = [name for name in _TASKS.value or [] if not _is_file(name)]
    tasks = [task for path in files for task in load_tasks(path)]
    for task in tasks:
        for attack in _ATTACKS.value:
            check_attackable(task, attack)
    if names and _ATTACKS.value:
        raise UsageError(f"--attacks needs tasks of JSON files, not {', '.join(names)}")
    run_names = _harness(names) if names else None
    model = load_model(model_name, over_devices(mesh.sizes(_MESH.value)))
    neighbours = _neighbours(model) if "words" in _ATTACKS.value else None
    evaluator = _evaluator(model, tasks)
    results: list[Scored] = []
    for result in evaluator.results(
        model.parameters, _LIMIT.value, jax.random.key(seed)
    ):
        results.append(result)
        _say(f"{len(results)} of {len(tasks)} tasks: {clean(result.task)}")
    attacked = []
    if _ATTACKS.value:
        attacked = _under_attack(model, tasks, results, neighbours, seed)
    if run_names is not None:
        results += run_names(model, seed)
    return results, attacked


def _is_file(name: str) -> bool:
    return name.endswith(".json") or "/" in name or Path(name).is_file()


def _evaluator(model: Model, tasks: list[Task]) -> TaskEvaluator:
    from m3jax.evaluation.evaluator import TaskEvaluator
    from m3jax.models.tokenizer import Tokenizer

    return TaskEvaluator(
        tasks,
        model.config,
        Tokenizer(model.folder),
        tokens_per_batch=_TOKENS_PER_BATCH.value,
        dtype=_dtype(),
        allow_code_execution=_ALLOW_CODE_EXECUTION.value,
    )


def _neighbours(model: Model) -> Neighbours:
    from m3jax.evaluation.attacks.neighbours import Neighbours
    from m3jax.models.decoder import embedding
    from m3jax.models.tokenizer import Tokenizer

    rows = embedding(model.parameters, model.config)
    return Neighbours(rows, Tokenizer(model.folder))


def _under_attack(
    model: Model,
    tasks: list[Task],
    clean_results: list[Any],
    neighbours: Neighbours | None,
    seed: int,
) -> list[Robustness]:
    """Attacks all tasks in all ways that were asked for."""
    from m3jax.evaluation.attacks.robustness import under_attack

    found: list[Robustness] = []
    for robustness in under_attack(
        tasks,
        _ATTACKS.value,
        clean_results,
        model.parameters,
        lambda task: _evaluator(model, [task]),
        neighbours=neighbours or (lambda word: []),
        examples=_ATTACK_EXAMPLES.value,
        limit=_LIMIT.value,
        seed=seed,
    ):
        found.append(robustness)
        of = f"{len(found)} of {len(tasks) * len(_ATTACKS.value)} attacks"
        _say(f"{of}: {robustness.attack} on {clean(robustness.clean.task)}")
    return found


def _harness(names: list[str]) -> Callable[[Model, int], list[HarnessResult]]:
    """What runs tasks of lm-evaluation-harness; fails at once if it cannot."""
    try:
        from m3jax.evaluation.harness.model import HarnessModel
        from m3jax.evaluation.harness.tasks import find_tasks, run_tasks
    except ImportError as error:
        raise UsageError(
            f"--tasks={','.join(names)}: no file of that name, and tasks of "
            f"lm-evaluation-harness need the extra harness (missing: {error.name}): "
            "pip install 'm3jax[harness]'"
        ) from None
    manager = find_tasks(names, _HARNESS_TASKS_PATH.value)

    def run(model: Model, seed: int) -> list[HarnessResult]:
        import jax

        from m3jax.models.tokenizer import Tokenizer

        harness_model = HarnessModel(
            model.parameters,
            model.config,
            Tokenizer(model.folder),
            tokens_per_batch=_TOKENS_PER_BATCH.value,
            dtype=_dtype(),
            key=jax.random.key(seed),
        )
        return run_tasks(
            harness_model,
            names,
            manager,
            limit=_LIMIT.value,
            seed=seed,
            allow_code_execution=_ALLOW_CODE_EXECUTION.value,
        )

    return run


def _dtype() -> Any:
    import jax.numpy as jnp

    known = {"input": None, "float32": jnp.float32, "bfloat16": jnp.bfloat16}
    return known[_DTYPE.value]


def _say(text: str) -> None:
    print(f"m3jax: {text}", file=sys.stderr, flush=True)


def _report(results: list[Scored]) -> list[str]:
    rows = []
    for result in results:
        error = result.standard_error
        rows.append(
            (
                clean(result.task),
                result.metric,
                "—" if math.isnan(result.mean) else f"{result.mean:.4f}",
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


def _report_attacks(attacked: list[Robustness]) -> list[str]:
    rows = []
    for found in attacked:
        drop = found.drop_rate
        rows.append(
            (
                clean(found.clean.task),
                found.attack,
                f"{found.clean.mean:.4f}",
                f"{found.attacked.mean:.4f}",
                "—" if math.isnan(drop) else f"{drop:.1%}",
                clean(found.prompt),
            )
        )
    header = ("task", "attack", "clean", "attacked", "drop rate", "prompt")
    return table(header, rows, "<<>>><")


def _write(results: list[Scored], output: Path) -> None:
    """Writes all records; the file appears when it is complete."""
    from m3jax.evaluation.results import as_json

    unfinished = output.with_name(f"{output.name}.{os.getpid()}.partial")
    try:
        with durable.naming(output), unfinished.open("w", encoding="utf-8") as file:
            for result in results:
                for record in result.records:
                    line: dict[str, Any] = {"task": result.task, **as_json(record)}
                    text = json.dumps(line, ensure_ascii=False, default=str)
                    file.write(text + "\n")
        unfinished.replace(output)
    finally:
        unfinished.unlink(missing_ok=True)
