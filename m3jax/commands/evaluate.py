"""Scores a checkpoint of the Llama family, or of GPT-2, at tasks.

A task is a JSONL file and a JSON spec beside it of what to ask and how to mark the
answer: kinds loss, choice, exact_match, regex, numeric and code. For example,

    {"name": "gsm8k", "kind": "numeric", "data": "gsm8k_test.jsonl",
     "prompt": "Question: {question}\\nAnswer:", "answer": "{answer}",
     "stop": ["\\nQuestion:"], "max_new_tokens": 320}

A name that is no file is a task of lm-evaluation-harness: --tasks=gsm8k,arc_easy (needs
pip install '.[harness]' from a checkout).

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

from m3jax.checkpoints.places import durable
from m3jax.commands import cli, scoring
from m3jax.commands.cli import UsageError, define_names
from m3jax.commands.tables import clean, table

if TYPE_CHECKING:
    from collections.abc import Callable

    from m3jax.evaluation.attacks.prompts import Variants
    from m3jax.evaluation.attacks.robustness import Robustness
    from m3jax.evaluation.evaluator import TaskEvaluator
    from m3jax.evaluation.harness.tasks import HarnessResult
    from m3jax.evaluation.results import Result
    from m3jax.evaluation.tasks.task import Task
    from m3jax.models.parameters import Model
    from m3jax.models.tokenizer import Tokenizer

    Scored = Result | HarnessResult

USAGE = "m3jax evaluate MODEL --tasks=SPEC.json|NAME[,...] [--limit=N] [--json]"
LESS_MEMORY = "a smaller --tokens_per_batch needs less, and --mesh splits the model"
SHARED = [scoring]
MORE_HELP = ["", *(__doc__ or "").split("\n")[2:-1]]

_TASKS = define_names(
    "tasks", "JSON files of tasks, or names of harness tasks, comma-separated."
)
_HARNESS_TASKS_PATH = flags.DEFINE_string(
    "harness_tasks_path", None, "Folder of more harness tasks, as YAML."
)
_ATTACKS = flags.DEFINE_list("attacks", [], "deepwordbug, stresstest, words.")
_ATTACK_EXAMPLES = flags.DEFINE_integer(
    "attack_examples", 64, "The first of each task, on which an attack searches."
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
    asked = cli.names(_TASKS)
    if not asked:
        raise UsageError(f"needs --tasks; usage: {USAGE}")
    scoring.check(_ATTACK_EXAMPLES)
    output = None if _OUTPUT.value is None else cli.local(_OUTPUT.value)
    if output is not None and not output.absolute().parent.is_dir():
        raise UsageError(f"--output={output}: {output.parent} is not a folder")
    if output is not None and output.is_dir():
        raise UsageError(f"--output={output}: is a folder, needs to be a file")
    results, attacked = _results(positional[0], asked)
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


def _results(
    model_name: str, asked: list[str]
) -> tuple[list[Scored], list[Robustness]]:
    # Imported here: `--help` must not wait for JAX.
    import jax

    from m3jax.engine.sharding_rules import over_devices
    from m3jax.evaluation.attacks.neighbours import Neighbours
    from m3jax.evaluation.attacks.prompts import ATTACKS, check_attackable
    from m3jax.evaluation.attacks.robustness import under_attack
    from m3jax.evaluation.tasks.task import load_tasks
    from m3jax.models.decoder import embedding
    from m3jax.models.parameters import load_model
    from m3jax.models.tokenizer import Tokenizer
    from m3jax.prng import check_seed

    seed, attacks = check_seed(_SEED.value or 0), _ATTACKS.value
    for attack in attacks:
        if attack not in ATTACKS:
            raise UsageError(f"--attacks={attack}: known: {', '.join(ATTACKS)}")
    names = [name for name in asked if not scoring.is_file(name)]
    files = [name for name in asked if scoring.is_file(name)]
    tasks = [task for path in files for task in load_tasks(path)]
    for task in tasks:
        for attack in attacks:
            check_attackable(task, attack)
    if names and attacks:
        raise UsageError(f"--attacks needs tasks of JSON files, not {', '.join(names)}")
    run_names = _harness(names) if names else None
    model = load_model(model_name, over_devices(scoring.devices()))
    tokenizer = Tokenizer(model.folder)
    neighbours: Variants = lambda word: []  # noqa: E731 - of an attack not asked for
    if "words" in attacks:
        neighbours = Neighbours(embedding(model.parameters, model.config), tokenizer)

    def evaluator(tasks: list[Task]) -> TaskEvaluator:
        return scoring.evaluator(tasks, model.config, tokenizer)

    limit, key = scoring.LIMIT.value, jax.random.key(seed)
    results: list[Any] = []
    for result in evaluator(tasks).results(model.parameters, limit, key):
        results.append(result)
        scoring.say(f"{len(results)} of {len(tasks)} tasks: {result.task}")
    attacked: list[Robustness] = []
    for found in under_attack(
        tasks,
        attacks,
        results,
        model.parameters,
        lambda task: evaluator([task]),
        neighbours=neighbours,
        examples=_ATTACK_EXAMPLES.value,
        limit=limit,
        seed=seed,
    ):
        attacked.append(found)
        of = f"{len(attacked)} of {len(tasks) * len(attacks)} attacks"
        scoring.say(f"{of}: {found.attack} on {found.clean.task}")
    if run_names is not None:
        results += run_names(model, tokenizer, seed)
    return results, attacked


def _harness(
    names: list[str],
) -> Callable[[Model, Tokenizer, int], list[HarnessResult]]:
    """What runs tasks of lm-evaluation-harness; fails at once if it cannot."""
    model_of = scoring.harness(names, "HarnessModel")
    from m3jax.evaluation.harness.tasks import find_tasks, run_tasks

    manager = find_tasks(names, _HARNESS_TASKS_PATH.value)

    def run(model: Model, tokenizer: Tokenizer, seed: int) -> list[HarnessResult]:
        import jax

        key, options = jax.random.key(seed), scoring.options()
        return run_tasks(
            model_of(model.parameters, model.config, tokenizer, key=key, **options),
            names,
            manager,
            limit=scoring.LIMIT.value,
            seed=seed,
            allow_code_execution=scoring.ALLOW_CODE_EXECUTION.value,
        )

    return run


def _number(value: float, form: str = ".4f", before: str = "") -> str:
    return "—" if math.isnan(value) else f"{before}{value:{form}}"


def _report(results: list[Scored]) -> list[str]:
    rows = [
        (
            clean(result.task),
            result.metric,
            _number(result.mean),
            _number(result.standard_error, before="± "),
            f"{result.count:,}",
        )
        for result in results
    ]
    notes = [
        f"note: {clean(result.task)}: {result.truncated} of {result.count} "
        "prompts lost their beginning, to fit into the model"
        for result in results
        if result.truncated
    ]
    return [*table(("task", "metric", "mean", "", "n"), rows, "<<>>>"), *notes]


def _report_attacks(attacked: list[Robustness]) -> list[str]:
    rows = [
        (
            clean(found.clean.task),
            found.attack,
            f"{found.clean.mean:.4f}",
            f"{found.attacked.mean:.4f}",
            _number(found.drop_rate, ".1%"),
            clean(found.prompt),
        )
        for found in attacked
    ]
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
