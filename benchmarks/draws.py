"""Times a draw: merging models that lie in device memory already, as explore does.

    python benchmarks/draws.py --size=1.1b

Every draw has other ratios and masks. Beside a draw's time stands what a copy of one
model on the same device takes, and what was compiled after the first draw: nothing. On
a GPU the peak of device memory is told, in models: base, two models and one merge.
Writes draws-cpu.json and .md, or those of another backend.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench
import jax
import llamas
import programs
import recipes
from absl import app, flags

import m3jax
from m3jax.exploration.merger import Merger

_SIZE = flags.DEFINE_string("size", "1.1b", "Of the models; see make_checkpoints.py.")
_DRAWS = flags.DEFINE_integer("draws", 8, "Of each recipe, beside the first.", 1)
_ON_DEVICE = flags.DEFINE_bool(
    "on_device", False, "Make the models in the device's memory, not from files."
)
_DATA = flags.DEFINE_string("data", "/tmp/m3jax-benchmarks", "For the models.")
_RESULTS = flags.DEFINE_string(
    "results", str(bench.BENCHMARKS / "results"), "Where results go."
)

_DARE = m3jax.Dare(drop_rate=0.2)
RECIPES = {
    "average + M3": m3jax.Recipe(),
    "task arithmetic + M3": m3jax.Recipe(method="task_arithmetic"),
    "DARE + task arithmetic + M3": m3jax.Recipe(method="task_arithmetic", dare=_DARE),
    "TIES + M3": m3jax.Recipe(method="ties"),
    "DARE + TIES + M3": m3jax.Recipe(method="ties", dare=_DARE),
}


def seconds(call: Callable[..., Any], *arguments: Any) -> float:
    """Of a call, until the device has its result."""
    start = time.perf_counter()
    jax.block_until_ready(call(*arguments))
    return time.perf_counter() - start


def measure(base: Any, models: list[Any], recipe: m3jax.Recipe) -> dict[str, Any]:
    """One recipe: the first draw, which compiles, and the others."""
    compiled = 0

    def listen(event: str, duration: float, **_: object) -> None:
        nonlocal compiled
        compiled += event == "/jax/core/compile/backend_compile_duration"

    merger = Merger(base, models, recipe)
    first = seconds(merger, recipe, 0)
    jax.monitoring.register_event_duration_secs_listener(listen)
    draws = [1e3 * seconds(merger, recipe, 1 + i) for i in range(_DRAWS.value)]
    jax.monitoring.unregister_event_duration_listener(listen)
    return {"first": first, "draw_ms": bench.spread(draws), "compiled": compiled}


def peak_models(model_bytes: int) -> float | None:
    """The largest use of device memory so far, in models; None where none is told."""
    told = jax.devices()[0].memory_stats() or {}
    return told["peak_bytes_in_use"] / model_bytes if told else None


def made(size: str) -> list[dict[str, jax.Array]]:
    """A base and two models like those of make_checkpoints.py, made on the device."""

    @functools.partial(jax.jit, static_argnums=1)
    def trio(key: jax.Array, shape: tuple[int, ...]) -> list[jax.Array]:
        keys = jax.random.split(key, 3)
        base, *steps = (jax.random.normal(own, shape) for own in keys)
        base = (0.02 * base).astype("bfloat16")
        models = [base.astype("float32") + 4e-5 * step for step in steps]
        return [base, *(model.astype("bfloat16") for model in models)]

    root = jax.random.key(0)
    made: list[dict[str, jax.Array]] = [{}, {}, {}]
    for i, (name, shape) in enumerate(llamas.shapes(size).items()):
        own = trio(jax.random.fold_in(root, i), shape)
        for tree, array in zip(made, own, strict=True):
            tree[name] = array
    return made


def main(argv: list[str]) -> None:
    del argv
    data = Path(_DATA.value)
    if _ON_DEVICE.value:
        base, *models = made(_SIZE.value)
    else:
        programs.make_models(data, [_SIZE.value])
        folder = data / _SIZE.value
        base, *models = (m3jax.load(folder / name) for name in recipes.MODELS)
    leaves = jax.tree.leaves(base)
    model_bytes = sum(leaf.nbytes for leaf in leaves)
    copy = jax.jit(lambda tree: jax.tree.map(jax.numpy.copy, tree))
    seconds(copy, base)
    copies = [1e3 * seconds(copy, base) for _ in range(_DRAWS.value)]
    rows = [
        {"recipe": name, **measure(base, models, recipe)}
        for name, recipe in RECIPES.items()
    ]
    results = {
        "command": f"python benchmarks/draws.py --size={_SIZE.value} "
        f"--draws={_DRAWS.value}",
        "commit": bench.commit(),
        "machine": bench.machine(data),
        "versions": {"m3jax": programs.m3jax_versions()},
        "device": jax.devices()[0].device_kind,
        "parameters": sum(leaf.size for leaf in leaves),
        "model_bytes": model_bytes,
        "copy_ms": bench.spread(copies),
        "peak_models": peak_models(model_bytes),
        "rows": rows,
    }
    name = f"draws-{jax.default_backend()}"
    folder = Path(_RESULTS.value)
    bench.write_json(folder / f"{name}.json", results)
    (folder / f"{name}.md").write_text(markdown(results))
    print(markdown(results))


def markdown(results: dict[str, Any]) -> str:
    """The table, and what one has to know to read it."""
    copy = results["copy_ms"]["median"]
    header = ["recipe", "a draw, ms", "copies of a model", "first draw, s", "compiled"]
    rows = [
        [
            row["recipe"],
            bench.seconds(row["draw_ms"]),
            f"{row['draw_ms']['median'] / copy:.1f}",
            f"{row['first']:.2f}",
            str(row["compiled"]),
        ]
        for row in results["rows"]
    ]
    peak = results["peak_models"]
    billions = results["parameters"] / 1e9
    return (
        bench.table(header, rows)
        + f"\nA base and two models of {billions:.2f} G parameters in the memory of "
        f"{results['device']}; a copy of one takes {copy:.1f} ms. "
        "Median (least–greatest) of the draws behind the first; “compiled” counts "
        "programs in these. "
        + (f"Peak of device memory: {peak:.2f} models. " if peak else "")
        + bench.environment(results)
        + f"\n\n`{results['command']}`\n"
    )


if __name__ == "__main__":
    app.run(main)
