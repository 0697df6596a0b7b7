"""Merges small built-in models, explores and learns merges, and says what it found.

A base of 142,000 parameters and three experts come with m3jax: maths adds numbers, code
closes brackets, words sorts letters. The demo takes about a minute and no network.
All that it makes is normal output: look at it with `m3jax inspect`, `m3jax diff`,
`m3jax verify` and `m3jax evaluate`.
"""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

import m3jax
from m3jax.commands.cli import at_least_one, define, local
from m3jax.commands.tables import table
from m3jax.engine.pipeline import available_cores

if TYPE_CHECKING:
    from m3jax.exploration.search.result import Exploration, Row
    from m3jax.learn import Learning

USAGE = "m3jax demo [--output=DIR] [--draws=N] [--seed=N]"


_OUTPUT = define("output", str, "The folder to make. [m3jax-demo]")
_SEED = define("seed", int, "Of ratios and masks. [0]")
_DRAWS = define("draws", int, "To explore.", 32)

_DATA = Path(m3jax.__file__).parent / "demo_data"
_MODELS = "models"  # in the output: a copy of them
_PAIR = ("maths", "code")
_EXPERTS = (*_PAIR, "words")
_MOST_AT_ONCE = 4  # of such small models; Python itself does one thing at a time
_EXPLORED = m3jax.Recipe(
    method="task_arithmetic", scaling=1.5, mixup=m3jax.Mixup(alpha=2.0)
)


_LEARNED_STEPS = 40
_PRESETS = ("greedy_soup", "lfs")  # published searches, beside M3's draws
_PRESET_DRAWS = 16


def main(positional: list[str]) -> int:
    at_least_one(_DRAWS)
    output, seed = local(_OUTPUT.value or "m3jax-demo"), _SEED.value or 0
    copy = shutil.copyfile  # without the permissions of an installed package
    shutil.copytree(_DATA, output / _MODELS, copy_function=copy, dirs_exist_ok=True)
    last = _merge_all(output, seed)
    draws = _DRAWS.value
    print(f"""\
2. Explore. Three experts, a skill each: {draws} draws of the ratios of
   their task vectors are merged and scored in memory. The winner has the
   best mean accuracy on validation; what it is worth, other questions tell.
   Beside it, two published searches: a greedy soup, and a method for each
   layer (LFS, {min(draws, _PRESET_DRAWS)} random draws).
""")
    found = _explore(output, seed, draws)
    few = min(draws, _PRESET_DRAWS)
    searched = {preset: _explore(output, seed, few, preset) for preset in _PRESETS}
    _say_what_was_found(found, searched, output / "explored")
    _say_what_was_learned(_learn(output, seed))
    _say_what_next(output, last)
    return 0


def _merge_all(output: Path, seed: int) -> str:
    """Merges a pair by every recipe; returns the name of the last one."""
    print("""\
1. Merge. Two models, maths and code, were fine-tuned from one base. M3 draws
   the ratio λ in which to merge them; a recipe puts it into a method.
""")
    dare = m3jax.Dare(drop_rate=0.2)
    recipes = {
        "average": m3jax.Recipe(),
        "task_arithmetic_dare": m3jax.Recipe(method="task_arithmetic", dare=dare),
        "ties": m3jax.Recipe(method="ties"),
        "ties_dare": m3jax.Recipe(method="ties", dare=dare),
    }
    rows = [_merge(name, own, output, name, seed) for name, own in recipes.items()]
    name, recipe = recipes.popitem()
    other = (seed + 1) % 2**32
    rows.append(_merge(f"{name}, again", recipe, output, "again", seed))
    rows.append(_merge(f"{name}, other seed", recipe, output, "another-seed", other))
    header = ("recipe", "λ", "to maths", "to code", "checksum")
    print("\n".join(table(header, rows, "<>>>>")))
    print("""
   Distances: 0 is that parent, 1 as far from it as the parents are apart.
   The same seed makes the same bytes.
""")
    return name


def _merge(
    title: str, recipe: m3jax.Recipe, output: Path, name: str, seed: int
) -> tuple[str, ...]:
    """Merges into the folder `name` and returns a row of the table."""
    models = [output / _MODELS / model for model in _PAIR]
    result = m3jax.merge(
        output / _MODELS / "base",
        models,
        output / name,
        recipe,
        seed=seed,
        execution=m3jax.Execution(overwrite=True, fsync=False),
    )
    apart = _distance(*models)
    distances = (_distance(output / name, model) / apart for model in models)
    ratio = next(iter((result.ratios or {"": (0.5,)}).values()))[0]
    every = "".join(result.checksums.values())
    checksum = xxhash.xxh3_64(every.encode()).hexdigest()
    return title, f"{ratio:.4f}", *(f"{d:.3f}" for d in distances), checksum


def _distance(a: Path, b: Path) -> float:
    from m3jax.checkpoints.folder import open_checkpoint
    from m3jax.engine.compare import compare

    with (
        open_checkpoint(str(a), mergeable=False) as one,
        open_checkpoint(str(b), mergeable=False) as other,
    ):
        return compare(one, other).total.distance


def _explore(output: Path, seed: int, draws: int, preset: str = "m3") -> Exploration:
    """Searches merges of all experts; the best on the validation tasks wins."""
    models = output / _MODELS
    base = str(models / "base")
    evaluators = [
        m3jax.TaskEvaluator.of_checkpoint(base, [models / "tasks" / f"{part}.json"])
        for part in ("validation", "test")
    ]
    return m3jax.explore(
        base,
        [str(models / expert) for expert in _EXPERTS],
        _EXPLORED if preset == "m3" else m3jax.Recipe(),
        evaluator=evaluators[0],
        test=evaluators[1],
        draws=draws,
        seed=seed,
        at_once=min(available_cores(), _MOST_AT_ONCE),
        output=output / ("explored" if preset == "m3" else preset),
        overwrite=True,
        preset=preset,
        sampler="random" if preset == "lfs" else None,  # TPE needs optuna
    )


def _say_what_was_found(
    found: Exploration, searched: Mapping[str, Exploration], output: Path
) -> None:
    header = ("accuracy on test", *_EXPERTS, "mean", "validation")
    # The plain method gives three task vectors a weight of 1 each: no fair comparison.
    shown = [row for row in found.rows if not row.name.startswith("plain")]
    for preset, own in searched.items():
        (best,) = (row for row in own.rows if row.kind == "winner")
        shown.append(dataclasses.replace(best, name=preset))
    print("\n".join(table(header, map(_row, shown), "<>>>>>")))
    objectives = [trial.objective for trial in found.draws]
    mean = sum(objectives) / len(objectives)
    print(
        f"\n   The {len(objectives)} draws: {min(objectives):.3f} to "
        f"{max(objectives):.3f} on validation, {mean:.3f} on average. The winner is"
    )
    weights = zip(_EXPERTS, found.winner.mean_ratios or (), strict=False)
    scaling = found.winner.recipe.method.scaling
    mixture = " + ".join(f"{ratio:.3f} {expert}" for expert, ratio in weights)
    print(f"   base + {scaling} × ({mixture}), task vectors all.")
    picture = output / "scores.png"
    if picture.exists():
        print(f"   The picture of all draws: {picture}")
    else:
        print("   A picture of all draws needs matplotlib; install it from a checkout:")
        print("   pip install '.[plot]'")


def _row(row: Row) -> tuple[str, ...]:
    test, validation = (row.scored[name].scores for name in ("test", "validation"))
    means = (sum(scores.values()) / len(scores) for scores in (test, validation))
    numbers = (*(test[expert] for expert in _EXPERTS), *means)
    return row.name, *(f"{number:.3f}" for number in numbers)


def _learn(output: Path, seed: int) -> Learning:
    """Learns a weight for each tensor of each expert, without labels."""
    from m3jax.learn import Config, Optimizer, Space
    from m3jax.learn.training.learner import learn

    print(f"""
3. Learn. The same task vectors, a weight for each tensor, by {_LEARNED_STEPS} steps of
   gradient descent. No answer is read: the merge is to speak like each
   expert on what that one writes itself. It starts at equal ratios.
""")
    config = Config(
        recipe=m3jax.Recipe(method="task_arithmetic"),
        space=Space(granularity="tensor", initial=0.5),
        objective={"kl": 1.0},
        inputs="continuation",
        optimizer=Optimizer(rate=0.02),
        steps=_LEARNED_STEPS,
        validate_every=20,
    )
    models = output / _MODELS
    tasks = {
        part: [models / "tasks" / f"{part}.json"]
        for part in ("train", "validation", "test")
    }
    return learn(
        str(models / "base"),
        [str(models / expert) for expert in _EXPERTS],
        config,
        tasks=tasks["train"],
        validation=tasks["validation"],
        test=tasks["test"],
        seed=seed,
        output=output / "learned",
        overwrite=True,
    )


def _say_what_was_learned(found: Learning) -> None:
    from m3jax.learn.report.outputs import rows

    header, lines = rows(found.comparisons)
    header[2] = "equal ratios"
    print("\n".join(table(header, lines, "<<>>>>")))


def _say_what_next(output: Path, name: str) -> None:
    folder = shlex.quote(str(output / name))
    maths = shlex.quote(str(output / _MODELS / "maths"))
    winner = shlex.quote(str(output / "explored" / "winner.json"))
    learned = shlex.quote(str(output / "learned" / "recipe.json"))
    tasks = shlex.quote(str(output / _MODELS / "tasks" / "test.json"))
    print(f"\nEverything is in {output}, the models in {output / _MODELS}.")
    activate = Path(sys.executable).parent / "activate"
    if shutil.which("m3jax") is None and activate.exists():
        print(f"To have m3jax on the path:\n    . {shlex.quote(str(activate))}")
    print("Look at a merge, and make the winner:")
    for command in (
        f"m3jax inspect {folder}",
        f"m3jax diff {maths} {folder}",
        f"m3jax verify {folder}",
        f"m3jax merge --config={winner} --output=winner",
        f"m3jax merge --config={learned} --output=learned",
        f"m3jax evaluate winner --tasks={tasks} --attacks=deepwordbug",
    ):
        print(f"    {command}")
    print("Merge your own:")
    print("    m3jax merge --base=BASE --models=A,B --output=OUT --config=ties_m3_dare")
