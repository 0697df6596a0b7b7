"""Merges many draws in device memory, evaluates each, and finds the best.

The best draw is chosen on --validation_tasks; what it is worth is read off the test
tasks. --output gets a line for every trial, a table with parents and plain merges, a
page of charts (report.html), a picture, and the winner as a recipe: `m3jax merge
--config=OUTPUT/winner.json`.

The objective is the weighted mean of the validation scores, a loss counting
negative. A task that is no file is one of lm-evaluation-harness, as for `m3jax
evaluate`; --evaluator_command='python score.py {checkpoint}' runs a program of yours on
each merge, which prints a JSON object of scores as its last line.

Samplers: `recipe` draws the recipe's own Beta or Dirichlet; `grid`, `sobol`,
`random`, `tpe`, `cmaes`, `gp` and `nsga2` (which weighs no task against another) set
what --search names, each with a range, or words, where it has some:

  ratios  scaling=0.5:1.5  trim_rate=0.2:0.9  drop_rate=0:0.9  drop_rates=0:0.9
  seed  method=ties|slerp|task_arithmetic  dare.strategy=random|magnitude

(drop_rate is one for all models, drop_rates one for each, seed a new one a draw; a
method's numbers count where it is chosen). With --groups=4 each quarter of the layers
has values of its own. With --halving=3 all draws are evaluated on few examples, the
best third of them on three times as many, and so on; the last one is evaluated on all.
--hyperband=3 does that several times, from many draws on little to few on all.

Several machines share the trials if each has an --output of its own and all name one
--study: a file on a disk that all see, or a database's URL.

--selector=answers needs no labels: of M3's draws of two models the winner is the one
whose answers differ least from those of its neighbours in λ.

Published searches, in the place of --sampler and --search: --preset=greedy_soup,
model_glue, safety_aware, lfs (a method for each group of layers), dis and rmm (whole
layers in a row, of any model, left out and repeated), adamms (chosen by answers,
without labels), df_merge (Fisher information at every draw) or m3. docs/EXPLORE.md says
what each does.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from m3jax.commands import config, distributed, scoring
from m3jax.commands.cli import (
    UsageError,
    at_least_one,
    define,
    define_names,
    leave_at_once,
    local,
    names,
    need,
)
from m3jax.commands.tables import clean, say, table

if TYPE_CHECKING:
    from m3jax.evaluation.evaluator import Evaluator
    from m3jax.exploration.search.result import Exploration
    from m3jax.models.config import Config
    from m3jax.models.tokenizer import Tokenizer

USAGE = (
    "m3jax explore --base=DIR --models=A,B[,C...] --output=DIR "
    "--validation_tasks=SPEC.json[,...] --test_tasks=SPEC.json[,...] [--config=FILE]"
)
LESS_MEMORY = (
    "a smaller --tokens_per_batch and fewer draws --at_once need less, and --mesh "
    "splits the models over devices"
)
SHARED = [scoring, distributed]
GROUPS = {
    "What is searched, and how": (
        *("preset", "sampler", "search", "groups", "weights", "generation"),
        *("halving", "hyperband", "fraction"),
    ),
    "What it is judged by": (
        *("selector", "evaluator_command", "ood_tasks", "test_all_draws"),
    ),
    "Output": ("export", "resume", "overwrite", "tokenizer_from"),
    "Running": ("at_once", "study"),
}
ROWS = config.ROWS

_BASE = define("base", str, "The base model: folder, file or org/name.")
_MODELS = define_names("models", "The fine-tuned models, comma-separated.")
_OUTPUT = define("output", str, "Folder for trials, table and winner.")
_VALIDATION = define_names(
    "validation_tasks", "JSON files of tasks, or names of harness tasks, to choose on."
)
_COMMAND = define(
    "evaluator_command",
    str,
    "Choose by what this prints, as 'python score.py {checkpoint}'.",
)
_TEST = define_names("test_tasks", "JSON files of tasks to report.")
_OOD = define_names("ood_tasks", "JSON files of tasks out of distribution, to report.")
_DRAWS = define("draws", int, "How many.", 32)
_SEED = define("seed", int, "Of all draws. [0]")
_PRESET = define(
    "preset",
    [
        *("m3", "greedy_soup", "model_glue", "safety_aware", "lfs", "dis", "rmm"),
        *("adamms", "df_merge"),
    ],
    "A published search, in the place of --sampler and --search.",
)
_SAMPLER = define(
    "sampler",
    ["recipe", "grid", "sobol", "random", "tpe", "cmaes", "gp", "nsga2"],
    "Where draws come from. [recipe]",
)
_SEARCH = define("search", list, "What samplers other than `recipe` set. [ratios]")
_GROUPS = define(
    "groups", int, "Groups of layers that have values of their own. [all together]"
)
_WEIGHTS = define(
    "weights", list, "TASK=WEIGHT,... in the objective; 1 where none is given."
)
_HALVING = define(
    "halving", int, "Keep one of so many draws for a budget so many times larger."
)
_HYPERBAND = define(
    "hyperband", int, "Halving at this rate, from several numbers of draws."
)
_SELECTOR = define(
    "selector",
    ["scores", "answers"],
    "What decides: scores, or where answers change least, without labels.",
    "scores",
)
_TEST_ALL = define(
    "test_all_draws", bool, "Report mean and deviation over draws on test, too."
)
_FRACTION = define(
    "fraction", float, "Of the data that a draw of --preset=rmm is evaluated on. [1]"
)
_AT_ONCE = define(
    "at_once",
    int,
    "Draws at a time, each with its own merged copy. [one on each accelerator]",
)
_GENERATION = define(
    "generation", int, "Draws that an optimiser proposes before it is told of one.", 1
)
_EXPORT = define("export", str, "Folder for the winner's checkpoint.")
_RESUME = define("resume", bool, "Go on with an interrupted exploration.")
_OVERWRITE = define("overwrite", bool, "Replace a previous output.")
_STUDY = define(
    "study",
    str,
    "Share the trials with all who name the same: a file on a common disk, or a "
    "database's URL.",
)
_TOKENIZER_FROM = define("tokenizer_from", str, "Model whose tokenizer is used. [base]")
prepare = config.prepare  # --config, whose fields depend on the file it names


def main(positional: list[str]) -> int:
    asked = config.asked(_BASE.value, names(_MODELS), _SEED.value)
    recipe, base, models, seed = asked.recipe, asked.base, asked.models, asked.seed
    need(
        USAGE,
        models=models,
        output=_OUTPUT.value,
        validation_tasks=names(_VALIDATION) or _COMMAND.value,
        test_tasks=names(_TEST) or _COMMAND.value,
    )
    if _COMMAND.value and names(_VALIDATION):
        raise UsageError(
            "--evaluator_command and --validation_tasks: one of the two chooses"
        )
    at_least_one(scoring.LIMIT, scoring.TOKENS_PER_BATCH)
    recipe.check(num_models=len(models), has_base=base is not None)
    weights = _weights(_WEIGHTS.value or [])

    # Only now JAX, which takes a second to import.
    prints = distributed.start(survive=True)
    from m3jax.checkpoints.output.folder import check_free
    from m3jax.engine.execution import Execution
    from m3jax.engine.merge import merge
    from m3jax.exploration.explore import explore

    if _EXPORT.value is not None:
        check_free(local(_EXPORT.value), overwrite=_OVERWRITE.value)
    make = _evaluators(base, models)
    test, ood = (make(own) if (own := names(flag)) else None for flag in (_TEST, _OOD))
    validation = (
        _of_command(base, models) if _COMMAND.value else make(names(_VALIDATION) or [])
    )
    found = explore(
        base,
        models,
        recipe,
        evaluator=validation,
        test=test,
        ood=ood,
        draws=_DRAWS.value,
        seed=seed,
        preset=_PRESET.value,
        sampler=_SAMPLER.value,
        search=_SEARCH.value,
        groups=_GROUPS.value,
        weights=weights,
        budget=scoring.LIMIT.value,
        halving=_HALVING.value,
        hyperband=_HYPERBAND.value,
        fraction=_FRACTION.value,
        selector=_SELECTOR.value,
        test_all_draws=_TEST_ALL.value,
        at_once=_AT_ONCE.value,
        mesh=scoring.devices(),
        generation=_GENERATION.value,
        output=_OUTPUT.value,
        resume=_RESUME.value,
        overwrite=_OVERWRITE.value,
        study=_STUDY.value,
        tokenizer_from=_TOKENIZER_FROM.value,
        say=say,
    )
    if prints:
        print("\n".join(_report(found)))
        print(f"\nwith all intervals: {local(_OUTPUT.value or '') / 'summary.md'}")
    if _EXPORT.value is not None:
        execution = Execution(
            overwrite=_OVERWRITE.value,
            resume=_RESUME.value,
            tokenizer_from=_TOKENIZER_FROM.value,
        )
        winner = found.winner
        merge(
            base,
            models,
            _EXPORT.value,
            winner.recipe,
            seed=winner.seed,
            execution=execution,
            statistics=[own["path"] for own in found.replay.get("statistics", [])],
        )
        if prints:
            print(f"\nthe winner's checkpoint is {_EXPORT.value}")
    elif prints:
        path = local(_OUTPUT.value or "") / "winner.json"
        print(f"\nmake the winner: m3jax merge --config={path} --output=DIR")
    return 0


def failed(code: int) -> None:
    """See `cli.run`: does not wait for draws that nobody waits for."""
    # Only if it is loaded: not to wait for JAX, either.
    places = sys.modules.get("m3jax.exploration.search.places")
    if places is not None and places.at_work():
        leave_at_once(code)
    distributed.leave_after_failure(code)


def _weights(given: list[str]) -> dict[str, float]:
    weights = {}
    for text in given:
        name, _, number = text.rpartition("=")
        try:
            weights[name] = float(number)
        except ValueError:
            name = ""
        if not name:
            raise UsageError(f"--weights={text!r} needs TASK=NUMBER")
    return weights


def _of_command(base: str | None, models: list[str]) -> Evaluator:
    """What runs the user's program; its checkpoints look like the tokenizer's owner."""
    from m3jax.evaluation.outside import CommandEvaluator

    return CommandEvaluator(_COMMAND.value or "", like=_owner([base or models[0]]))


def _owner(checkpoints: list[str]) -> str:
    owner = _TOKENIZER_FROM.value or "base"
    return checkpoints[0] if owner == "base" else owner


def _evaluators(
    base: str | None, models: list[str]
) -> Callable[[list[str]], Evaluator]:
    """Makes an evaluator of tasks; it runs every one of the models."""
    from m3jax.evaluation.evaluator import Together
    from m3jax.models.parameters import common_config
    from m3jax.models.tokenizer import Tokenizer

    checkpoints = [*([] if base is None else [base]), *models]

    @functools.cache
    def model() -> tuple[Config, Tokenizer]:
        config, folders = common_config(checkpoints)
        owner = _owner(checkpoints)
        if owner not in folders:
            raise UsageError(
                f"--tokenizer_from={owner} needs base or one of {', '.join(models)}"
            )
        return config, Tokenizer(folders[owner])

    def make(asked: list[str]) -> Evaluator:
        tasks, names = scoring.split(asked)
        found: list[Evaluator] = []
        if tasks or not names:
            found.append(scoring.evaluator(tasks, *model()))
        if names:
            made = scoring.harness(names, "HarnessEvaluator")
            found.append(
                made(
                    names,
                    *model(),
                    folder=scoring.HARNESS_TASKS_PATH.value,
                    allow_code_execution=scoring.ALLOW_CODE_EXECUTION.value,
                    **scoring.options(),
                )
            )
        return found[0] if len(found) == 1 else Together(found)

    return make


def _report(found: Exploration) -> list[str]:
    from m3jax.exploration.report import summary

    lines = summary.notes(found)
    for one in summary.tables(found):
        header, rows = one.texts(brief=True)
        rows = [list(map(clean, row)) for row in rows]
        align = "<" + ">" * (len(header) - 1)
        lines += ["", one.title, *table(list(map(clean, header)), rows, align)]
    return lines
