"""Merges small built-in models by four recipes, to see how m3jax works.

Takes seconds and no network. What it makes is a normal output: look at it with
`m3jax inspect`, `m3jax diff` and `m3jax verify`.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import xxhash
from absl import flags

import m3jax
from m3jax.commands.cli import UsageError

USAGE = "m3jax demo [--output=DIR] [--seed=N]"

_OUTPUT = flags.DEFINE_string("output", "m3jax-demo", "The folder to make.")
_SEED = flags.DEFINE_integer("seed", 0, "Of ratios and masks.")

_DATA = Path(m3jax.__file__).parent / "demo_data"
_MODELS = ("maths", "code")


def main(positional: list[str]) -> int:
    if positional:
        raise UsageError(f"unexpected argument {positional[0]!r}; usage: {USAGE}")
    output, seed = Path(_OUTPUT.value), _SEED.value
    print("Two models, maths and code, were fine-tuned from one base. M3 draws the")
    print("ratio λ in which to merge them; each recipe puts it into another method.\n")
    print(f"{'recipe':28}{'λ':>7}  {'distance to':18}{'checksum'}")
    print(f"{'':28}{'':7}  {'maths':>8}{'code':>8}  ")
    for name, recipe in _recipes().items():
        print(_merge_and_describe(name, recipe, output / name, seed))
    print("\nThe same seed makes the same bytes, another seed another model:")
    name, recipe = list(_recipes().items())[-1]
    for again, other in (("again", seed), ("another-seed", (seed + 1) % 2**32)):
        print(_merge_and_describe(f"{name}, {again}", recipe, output / again, other))
    _say_what_next(output, name)
    return 0


def _recipes() -> dict[str, m3jax.Recipe]:
    dare = m3jax.Dare(drop_rate=0.2)
    return {
        "average": m3jax.Recipe(),
        "task_arithmetic_dare": m3jax.Recipe(method="task_arithmetic", dare=dare),
        "ties": m3jax.Recipe(method="ties"),
        "ties_dare": m3jax.Recipe(method="ties", dare=dare),
    }


def _merge_and_describe(
    name: str, recipe: m3jax.Recipe, folder: Path, seed: int
) -> str:
    """Merges into `folder` and returns a line of the table.

    The distance to a parent is ‖merged − parent‖ / ‖maths − code‖: 0 is that parent.
    """
    models = [_DATA / model for model in _MODELS]
    result = m3jax.merge(
        _DATA / "base",
        models,
        folder,
        recipe,
        seed=seed,
        execution=m3jax.Execution(overwrite=True, fsync=False),
    )
    apart = _distance(*models)
    to_maths, to_code = (_distance(folder, model) / apart for model in models)
    ratio = next(iter((result.ratios or {"": (0.5,)}).values()))[0]
    every = "".join(result.checksums.values())
    checksum = xxhash.xxh3_64(every.encode()).hexdigest()
    return f"{name:28}{ratio:7.4f}  {to_maths:8.3f}{to_code:8.3f}  {checksum}"


def _distance(a: Path, b: Path) -> float:
    from m3jax.checkpoints.folder import open_checkpoint
    from m3jax.engine.compare import compare

    with (
        open_checkpoint(str(a), mergeable=False) as one,
        open_checkpoint(str(b), mergeable=False) as other,
    ):
        return compare(one, other).total.distance


def _say_what_next(output: Path, name: str) -> None:
    folder = shlex.quote(str(output / name))
    print(f"\nThe merged checkpoints are in {output}. Look at one of them:")
    for command in (
        f"m3jax inspect {folder}",
        f"m3jax diff {shlex.quote(str(_DATA / 'maths'))} {folder}",
        f"m3jax verify {folder}",
        f"m3jax merge --config={folder}/m3jax.json --output=same-bytes",
    ):
        print(f"    {command}")
    print("Merge your own:")
    print("    m3jax merge --base=BASE --models=A,B --output=OUT --config=ties_m3_dare")
