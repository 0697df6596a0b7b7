"""Measures models: on the examples of tasks, or how like each other they are.

  fisher MODEL       how much the predictions depend on each parameter, the
                     diagonal of the Fisher information: for fisher, df_merge
  gram MODEL         second moments of what goes into each linear layer: for
                     regmean
  similarity MODELS  cosine, sign agreement and norms of parameters and, with
                     --base, of task vectors, per layer and whole

fisher and gram write a checkpoint beside the model, MODEL-fisher or MODEL-gram, which
`m3jax merge --statistics=A-fisher,B-fisher` takes. Tasks are those of `m3jax evaluate`
that say what the answer is: kinds loss, choice, exact_match, numeric. Give each model
the tasks that it was tuned for, and other examples than those it is judged by.

Kinds of Fisher information, each the mean over examples of squared gradients:
  exact      the expectation over the model's own predictions: a backward pass
             for each choice, or for each word of the vocabulary at each token
             of the answer
  sampled    the same expectation estimated by --samples draws: a backward pass
             a draw
  empirical  at the given answer: one backward pass, and another quantity, which
             is small wherever the model fits its answers
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from absl import flags

from m3jax.commands import process, reporting
from m3jax.commands.cli import UsageError, at_least_one, define, define_names, names

USAGE = (
    "m3jax measure fisher|gram MODEL --tasks=SPEC.json[,...]\n"
    "       m3jax measure similarity MODEL MODEL ... [--base=DIR] [--plot=FILE.png]"
)
TAKES = None
GROUPS = {
    "fisher": ("kind", "samples", "seed"),
    "similarity": ("base", "json", "plot"),
}
LESS_MEMORY = "a smaller --tokens_per_batch needs less"

_TASKS = define_names("tasks", "fisher, gram: JSON files of tasks.")
_KIND = define("kind", ["exact", "sampled", "empirical"], "See below.", "sampled")
_SAMPLES = define("samples", int, "Draws per example, if sampled.", 1)
_SEED = define("seed", int, "Of the draws. [0]")
_LIMIT = define("limit", int, "Only the first N examples of each task.")
_TOKENS_PER_BATCH = define(
    "tokens_per_batch", int, "More is faster and takes more memory.", 4096
)
_OUTPUT = define("output", str, "The folder to make. [MODEL-fisher, MODEL-gram]")
_RESUME = define("resume", bool, "Continue an interrupted measurement.")
_BASE = define("base", str, "The base model, for task vectors.")
_JSON = define("json", bool, "Print everything as JSON.")
_PLOT = define("plot", str, "PNG to draw.")

_MEASURED = (_TASKS, _LIMIT, _TOKENS_PER_BATCH, _OUTPUT, _RESUME)
_FLAGS = {  # that each of them has
    "fisher": [flag.name for flag in (*_MEASURED, _KIND, _SAMPLES, _SEED)],
    "gram": [flag.name for flag in _MEASURED],
    "similarity": [flag.name for flag in (_BASE, _JSON, _PLOT)],
}


def main(positional: list[str]) -> int:
    what, *models = positional or [""]
    if what not in _FLAGS:
        raise UsageError(f"needs one of {', '.join(_FLAGS)}, not {what!r}; {_usage()}")
    for name in {name for own in _FLAGS.values() for name in own} - {*_FLAGS[what]}:
        if flags.FLAGS[name].present:
            raise UsageError(f"--{name} is not for {what}; {_usage()}")
    at_least_one(_SAMPLES, _LIMIT, _TOKENS_PER_BATCH)
    return _similarity(models) if what == "similarity" else _statistics(what, models)


def _statistics(what: str, models: list[str]) -> int:
    if len(models) != 1:
        raise UsageError(f"needs one model, not {len(models)}; {_usage()}")
    asked = names(_TASKS)
    if not asked:
        raise UsageError(f"needs --tasks; {_usage()}")
    (model,) = models
    output = _OUTPUT.value or f"{_stem(model)}-{what}"
    process.keep_programs()
    # Imported here: `--help` must not wait for JAX.
    from m3jax.evaluation.tasks.task import load_tasks
    from m3jax.measuring.statistics import measure_fisher, measure_gram

    tasks = [task for path in asked for task in load_tasks(path)]
    given: dict[str, Any] = {
        "limit": _LIMIT.value,
        "tokens_per_batch": _TOKENS_PER_BATCH.value,
        "resume": _RESUME.value,
    }
    with reporting.progress("examples") as progress:
        if what == "fisher":
            folder = measure_fisher(
                model,
                tasks,
                output,
                kind=_KIND.value,
                samples=_SAMPLES.value,
                seed=_SEED.value or 0,
                progress=progress,
                **given,
            )
        else:
            folder = measure_gram(model, tasks, output, progress=progress, **given)
    print(f"output     {folder}")
    return 0


def _usage() -> str:
    return f"usage: {USAGE}"


def _stem(model: str) -> str:
    """What the measurement's folder is named after: the model's path, or its id."""
    path = Path(model)
    if path.is_dir():
        return str(path)
    return str(path.with_suffix("")) if path.exists() else path.name


def _similarity(models: list[str]) -> int:
    if len(models) < 2:
        raise UsageError(f"needs two models or more, not {len(models)}; {_usage()}")
    from contextlib import ExitStack

    from m3jax.checkpoints.folder import open_checkpoint
    from m3jax.commands import similarity_report
    from m3jax.commands.diff import check_plot
    from m3jax.engine.similarity import similarity

    if _PLOT.value is not None:
        check_plot(Path(_PLOT.value))
    with ExitStack() as stack:
        opened = [stack.enter_context(open_checkpoint(model)) for model in models]
        base = None
        if _BASE.value is not None:
            base = stack.enter_context(open_checkpoint(_BASE.value))
        progress = stack.enter_context(reporting.progress())
        found = similarity(opened, base, progress=progress)
    if _JSON.value:
        print(json.dumps(similarity_report.as_json(found), indent=1))
    else:
        print("\n".join(similarity_report.lines(found)))
    if _PLOT.value is not None:
        from m3jax.commands import similarity_plot

        similarity_plot.draw(found).savefig(
            _PLOT.value, dpi=160, metadata={"Software": None}
        )
    return 0
