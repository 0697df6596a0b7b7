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
  deepwordbug  swaps, replaces, deletes or inserts a letter in important words
  stresstest   appends a true statement that is beside the point
  words        neighbours in the model's own embedding for important words

A code task runs the programs that the model writes, with limits of time and memory,
and without a network where the system allows that. It is no sandbox: use a container.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3jax.checkpoints.places import durable
from m3jax.commands import cli, scoring
from m3jax.commands.cli import UsageError, define, define_names
from m3jax.commands.tables import clean, number, say, table

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
TAKES = (1, "one model")
LESS_MEMORY = "a smaller --tokens_per_batch needs less, and --mesh splits the model"
SHARED = [scoring]
GROUPS = {"Attacks": ("attacks", "attack_examples", "seed")}

_TASKS = define_names(
    "tasks", "JSON files of tasks, or names of harness tasks, comma-separated."
)
_ATTACKS = define("attacks", list, "deepwordbug, stresstest, words.", [])
_ATTACK_EXAMPLES = define(
    "attack_examples", int, "The first of each task, on which an attack searches.", 64
)
_SEED = define("seed", int, "Of sampling. [0]")
_JSON = define("json", bool, "Print JSON.")
_OUTPUT = define("output", str, "JSONL file to write, a line for each example.")


def main(positional: list[str]) -> int:
    asked = cli.names(_TASKS)
    if not asked:
        raise UsageError(f"needs --tasks; usage: {USAGE}")
    cli.at_least_one(scoring.LIMIT, scoring.TOKENS_PER_BATCH, _ATTACK_EXAMPLES)
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
    from m3jax.models.decoder import embedding
    from m3jax.models.parameters import load_model
    from m3jax.models.tokenizer import Tokenizer
    from m3jax.prng import check_seed

    seed, attacks = check_seed(_SEED.value or 0), _ATTACKS.value
    for attack in attacks:
        if attack not in ATTACKS:
            raise UsageError(f"--attacks={attack}: known: {', '.join(ATTACKS)}")
    tasks, names = scoring.split(asked)
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
        say(f"{len(results)} of {len(tasks)} tasks: {result.task}")
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
        say(f"{of}: {found.attack} on {found.clean.task}")
    if run_names is not None:
        results += run_names(model, tokenizer, seed)
    return results, attacked


def _harness(
    names: list[str],
) -> Callable[[Model, Tokenizer, int], list[HarnessResult]]:
    """What runs tasks of lm-evaluation-harness; fails at once if it cannot."""
    model_of = scoring.harness(names, "HarnessModel")
    from m3jax.evaluation.harness.tasks import find_tasks, run_tasks

    manager = find_tasks(names, scoring.HARNESS_TASKS_PATH.value)

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


def _report(results: list[Scored]) -> list[str]:
    rows = [
        (
            clean(result.task),
            result.metric,
            number(result.mean),
            number(result.standard_error, before="± "),
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
            number(found.drop_rate, ".1%"),
            clean(found.prompt),
        )
        for found in attacked
    ]
    header = ("task", "attack", "clean", "attacked", "drop rate", "prompt")
    return table(header, rows, "<<>>><")


def _write(results: list[Scored], output: Path) -> None:
    """Writes all records; the file appears when it is complete."""
    from m3jax.evaluation.results import as_json

    with (
        durable.appearing(output) as unfinished,
        unfinished.open("w", encoding="utf-8") as file,
    ):
        for result in results:
            for record in result.records:
                line: dict[str, Any] = {"task": result.task, **as_json(record)}
                text = json.dumps(line, ensure_ascii=False, default=str)
                file.write(text + "\n")
