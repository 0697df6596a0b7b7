"""Learns the coefficients of a merge from tasks, by gradient.

--config says what is learned and how: a name in configs/learn (adamerging, dam,
learned_soup, np_merge, safety_align, uld_fusion, ...) or a Python or JSON file. The
best step on --validation_tasks is kept; what it is worth is read off --test_tasks.
--output gets a recipe that makes the model without data, the same bytes every time:
`m3jax merge --config=OUTPUT/recipe.json --output=DIR`.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

from m3jax.commands import learn_config, mesh
from m3jax.commands.cli import define, define_names, names, need
from m3jax.commands.tables import clean, say, table

USAGE = (
    "m3jax learn --base=DIR --models=A,B[,C...] --tasks=SPEC.json[,...] --output=DIR "
    "[--config=NAME]"
)
LESS_MEMORY = (
    "--streamed leaves the models in their files, a smaller --config.batch and "
    "--config.remat=True need less, and --mesh splits everything over devices"
)
GROUPS = {
    "Output": ("export", "resume", "overwrite", "tokenizer_from"),
    "Running": ("streamed", "mesh"),
}
ROWS = [
    ("--config=NAME", f"{', '.join(learn_config.names())}; or a file."),
    (
        "--config.FIELD=VALUE",
        "One field of it, such as space.granularity, space.constraint, objective, "
        "inputs, optimizer.rate, steps, recipe.method.",
    ),
]

_BASE = define("base", str, "The base model: folder, file or org/name.")
_MODELS = define_names("models", "The fine-tuned models, comma-separated.")
_TASKS = define_names("tasks", "JSON files of tasks to learn from.")
_VALIDATION = define_names(
    "validation_tasks", "JSON files of tasks that say which step is kept."
)
_TEST = define_names("test_tasks", "JSON files of tasks to report.")
_TEACHERS = define_names(
    "teachers", "Checkpoints to learn from instead of the models, for uld."
)
_OUTPUT = define("output", str, "Folder for recipe, table and pictures.")
_EXPORT = define("export", str, "Folder for the learned checkpoint.")
_SEED = define("seed", int, "Of masks and the order of examples. [0]")
_STREAMED = define("streamed", bool, "Read the models from their files in every step.")
_MESH = define(
    "mesh", list, "Split everything over devices, such as rows=4 or rows=2,columns=2."
)
_RESUME = define("resume", bool, "Go on with an interrupted run.")
_OVERWRITE = define("overwrite", bool, "Replace a previous output.")
_DRY_RUN = define("dry_run", bool, "Print what it takes and stop.")
_TOKENIZER_FROM = define("tokenizer_from", str, "Model whose tokenizer is used. [base]")
prepare = learn_config.prepare  # --config, whose fields depend on the file it names


def main(positional: list[str]) -> int:
    base, models, output = _BASE.value, names(_MODELS) or [], _OUTPUT.value
    tasks, validation, test = (names(own) or [] for own in (_TASKS, _VALIDATION, _TEST))
    need(USAGE, models=models, tasks=tasks, output=output or _DRY_RUN.value)
    config = learn_config.asked()
    devices = mesh.sizes(_MESH.value)

    # Only now JAX, which takes a second to import.
    from m3jax.checkpoints.output.folder import check_free
    from m3jax.engine.execution import Execution
    from m3jax.engine.merge import merge
    from m3jax.learn.report.outputs import RECIPE, rows
    from m3jax.learn.training.learner import learn
    from m3jax.learn.training.memory import needed

    if _DRY_RUN.value:
        print(
            needed(
                base,
                models,
                config,
                tasks=tasks,
                streamed=_STREAMED.value,
                mesh=devices,
            )
        )
        return 0
    if _EXPORT.value is not None:
        check_free(Path(_EXPORT.value), overwrite=_OVERWRITE.value)
    found = learn(
        base,
        models,
        config,
        tasks=tasks,
        validation=validation,
        test=test,
        teachers=names(_TEACHERS) or (),
        seed=_SEED.value or 0,
        streamed=_STREAMED.value,
        mesh=devices,
        output=output,
        resume=_RESUME.value,
        overwrite=_OVERWRITE.value,
        tokenizer_from=_TOKENIZER_FROM.value,
        say=say,
        progress=Line(),
    )
    print(
        f"kept: step {found.step} of {len(found.losses)}, "
        + ("the best on validation" if found.looks else "the last one")
    )
    if found.comparisons:
        header, lines = rows(found.comparisons)
        lines = [list(map(clean, line)) for line in lines]
        print("\n".join(table(header, lines, "<<>>>>")))
    recipe = Path(output or "") / RECIPE
    if _EXPORT.value is None:
        print(f"\nmake the model: m3jax merge --config={recipe} --output=DIR")
        return 0
    merge(
        base,
        models,
        _EXPORT.value,
        found.recipe,
        seed=found.seed,
        execution=Execution(
            overwrite=_OVERWRITE.value, tokenizer_from=_TOKENIZER_FROM.value
        ),
        statistics=[own["path"] for own in found.replay["statistics"]],
    )
    print(f"\nthe learned checkpoint is {_EXPORT.value}")
    return 0


class Line:
    """The line of progress: rewritten on a terminal, else one every few seconds."""

    _SECONDS = 10.0

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._last = 0.0

    def __call__(
        self, step: int, steps: int, loss: float, rate: float, left: float | None
    ) -> None:
        now, ended = time.monotonic(), step == steps
        if not ended and now - self._last < (0.1 if self._live else self._SECONDS):
            return
        self._last = now
        text = f"step {step} of {steps}, loss {loss:.5f}, rate {rate:.2g}"
        if left is not None:
            minutes, seconds = divmod(round(left), 60)
            text += f", {minutes}:{seconds:02} left"
        if not self._live:
            say(text)
            return
        width = shutil.get_terminal_size().columns - 1
        end = "\n" if ended else ""
        print(f"\r{text[:width]:{width}}", end=end, file=sys.stderr, flush=True)
