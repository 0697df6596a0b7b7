"""Times each kernel alone, on the default device, against a plain copy.

    python benchmarks/kernel_rates.py

A kernel is called as the streaming engine calls it: on a CPU from several threads at
once, with chunks as large as the engine's; on a GPU many times in a row on large
arrays in its memory, waiting only for the last call. “Of the copy” compares bytes that
have to move (inputs read once, the result written once) per second with those of a
copy in the same run. Writes kernels-cpu.json and .md, or those of another backend.
"""

from __future__ import annotations

import concurrent.futures
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import bench
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl import app, flags

from m3jax import Dare, Mixup, Recipe
from m3jax.commands import allocator
from m3jax.engine import draws, plan, tiles
from m3jax.engine.jobs import jobs
from m3jax.engine.kernel import At, Numbers, Program, Reducing, take
from m3jax.engine.measure import completed, derived, int64_rows
from m3jax.engine.pipeline import available_cores
from m3jax.methods import selection
from m3jax.methods.step import Operands, Problem, Reduction, run_statistics

_TILES = flags.DEFINE_integer(
    "tiles", None, "Of a chunk, 1024 elements each. [2048 on a CPU, 65536 elsewhere]"
)
_THREADS = flags.DEFINE_integer("threads", None, "That call kernels. [cores; GPU: 1]")
_SAMPLES = flags.DEFINE_integer("samples", 7, "Timings of each kernel.", 1)
_RESULTS = flags.DEFINE_string(
    "results", str(bench.BENCHMARKS / "results"), "Where results go."
)

_MODELS = 2
_DROP_RATE = 0.2
_TRIM_RATE = 0.5
_SAMPLE_SECONDS = 0.3
_ITEMSIZE = 2  # bfloat16

Call = Callable[["Chunk"], Any]


class Chunk(NamedTuple):
    """The arrays of one chunk, on the device; T tiles, K models.

    Attributes:
      x: base (T, TILE) and models (K, T, TILE), bfloat16.
      parts: the base and each model again, 1 + K arrays of (T, TILE).
      room: (T, TILE) uint16, memory to copy them to on a CPU.
      item, tile: (T,), the tensor of each tile and its number.
      seed: of its masks.
    """

    x: Operands
    parts: list[jax.Array]
    room: np.ndarray
    item: np.ndarray
    tile: np.ndarray
    seed: int


class Kernel(NamedTuple):
    """One line of the table.

    Attributes:
      name: for people.
      call: runs it on a chunk.
      arrays: what it must read and write, in bfloat16 arrays of the base's size.
      models: how many models' numbers it makes per element, 1 for merges.
      unit: what is counted per second.
    """

    name: str
    call: Call
    arrays: float
    models: int = 1
    unit: str = "elements"


def make_chunk(tile_count: int, seed: int) -> Chunk:
    """A chunk of weights and fine-tuned weights as in make_checkpoints.py."""
    rng = np.random.default_rng(seed)
    block = min(tile_count, 1 << 10)
    base = rng.standard_normal((block, plan.TILE), np.float32) * np.float32(0.02)
    base = base.astype(ml_dtypes.bfloat16)
    steps = rng.standard_normal((_MODELS, *base.shape), np.float32) * np.float32(4e-5)
    stack = (base.astype(np.float32) + steps).astype(ml_dtypes.bfloat16)
    repeat = -(-tile_count // block)
    whole_base = jnp.tile(base, (repeat, 1))[:tile_count]
    whole_stack = jnp.tile(stack, (1, repeat, 1))[:, :tile_count]
    parts = [jnp.copy(part) for part in (whole_base, *whole_stack)]
    return Chunk(
        Operands(whole_base, whole_stack),
        parts,
        np.ones(whole_base.shape, np.uint16),
        np.zeros(tile_count, np.int64),
        np.arange(tile_count, dtype=np.uint64),
        seed,
    )


def on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def copy(chunk: Chunk) -> list[jax.Array]:
    """Copies the chunk's parts; on a CPU to memory in use, as `preadv` does."""
    if not on_cpu():
        return [_copy(part) for part in chunk.parts]
    for part in chunk.parts:
        np.copyto(chunk.room, np.asarray(part).view(np.uint16))
    return []


_copy = jax.jit(jnp.copy)


def recipe_of(method: str, *, dare: bool = False) -> Recipe:
    return Recipe(
        method=method,
        mixup=Mixup(alpha=None),
        dare=Dare(drop_rate=_DROP_RATE) if dare else None,
    )


def numbers_of(recipe: Recipe, seed: int, found: dict[str, Any]) -> Numbers:
    """The tables of a recipe over the one tensor of a chunk."""
    program = Program.of(recipe)
    (job,) = jobs(recipe, [(0, "weight")])
    own = draws.tables(job, ["weight"], _MODELS, seed, lambda: None)
    info: list[Any] = []
    for depth in range(len(program.transforms)):
        so_far = own._replace(info=tuple(info))
        info.append(derived(At(program, depth, so_far), {}))
    return completed(program, own._replace(info=(*info, found)))


def made_of(recipe: Recipe, chunk: Chunk) -> tuple[np.ndarray, ...]:
    """What the masks of a chunk are made of."""
    numbers = numbers_of(recipe, chunk.seed, _NOTHING)
    threshold = Program.of(recipe).threshold(numbers)
    return tiles.keys_and_blocks(numbers.keys, threshold, chunk.item, chunk.tile)


_NOTHING = {"thresholds": np.zeros((_MODELS, 1)), "majority": np.zeros(1)}


def merging(recipe: Recipe, found: dict[str, Any]) -> Call:
    """A merge of one chunk. On a CPU, DARE's masks come from a kernel of their own."""
    program = Program.of(recipe)
    kernel = tiles.merge_tiles(program, (("", "bfloat16"),))
    ready: dict[int, Any] = {}

    def call(chunk: Chunk) -> Any:
        if chunk.seed not in ready:
            tables = numbers_of(recipe, chunk.seed, found)._replace(keys=None)
            draw = made_of(recipe, chunk) if program.draws() else None
            taken = take(tables, chunk.item, 1)
            ready[chunk.seed] = jax.device_put((taken, draw))
        numbers, draw = ready[chunk.seed]
        if draw is not None and on_cpu():
            draw = tiles.drawn_beforehand("mask", draw)
        return kernel(chunk.x, numbers, draw)

    return call


def masks() -> Call:
    recipe = recipe_of("ties", dare=True)
    ready: dict[int, Any] = {}

    def call(chunk: Chunk) -> jax.Array:
        if chunk.seed not in ready:
            ready[chunk.seed] = jax.device_put(made_of(recipe, chunk))
        return tiles.draw_kernel("mask")(*ready[chunk.seed])

    return call


def reducing(reduction: Reduction) -> Call:
    """One chunk of a reading pass; a CPU's codes are counted by NumPy."""
    program = Program.of(recipe_of("ties"))
    at = At(program, 0, Numbers((), ()))
    how = Reducing.of(at, reduction, count=not on_cpu())
    kernel = tiles.reduce_tiles(how, None)

    def call(chunk: Chunk) -> list[Any]:
        count = len(chunk.item)
        arguments = {
            name: np.broadcast_to(
                np.asarray(own)[..., None, None], (*np.shape(own), count, 1)
            )
            for name, own in reduction.arguments.items()
        }
        valid = np.full((count, 1), plan.TILE, np.int32)
        parts = kernel(chunk.x, Numbers((), ()), None, arguments, valid)
        return [
            selection.count_codes_on_host(np.asarray(part)[0])
            if how == "histogram" and on_cpu()
            else int64_rows(how, part)
            for how, part in zip(reduction.combine, parts, strict=True)
        ]

    return call


def statistics_of(chunk: Chunk) -> tuple[Any, list[Reduction]]:
    """What TIES finds out about a chunk, and the passes that it takes, sample first."""
    passes: list[Reduction] = []

    def answer(reduction: Reduction) -> Any:
        passes.append(reduction)
        return tuple(reducing(reduction)(chunk))

    size = int(chunk.x.base.size)
    problem = Problem(_MODELS, size, {"trim_rate": np.float64(_TRIM_RATE)})
    step = recipe_of("ties").method
    info = run_statistics(step.measure(problem), answer)
    return {name: np.asarray(own)[..., None] for name, own in info.items()}, passes


def all_kernels(chunk: Chunk) -> list[Kernel]:
    info, passes = statistics_of(chunk)
    read = _MODELS + 1

    def one(name: str, method: str, dare: bool, arrays: float) -> Kernel:
        found = info if method == "ties" else {}
        return Kernel(name, merging(recipe_of(method, dare=dare), found), arrays)

    table = [
        Kernel("copy", copy, 2 * read, read),
        one("average", "average", False, _MODELS + 1),
        one("task arithmetic", "task_arithmetic", False, read + 1),
        one("DARE + average", "average", True, read + 1),
        one("DARE + task arithmetic", "task_arithmetic", True, read + 1),
        one("TIES, applied", "ties", False, read + 1),
        one("DARE + TIES, applied", "ties", True, read + 1),
        # A byte a mask: half a bfloat16 array for each model.
        Kernel("DARE masks", masks(), _MODELS / 2, _MODELS, "masks"),
    ]
    for reduction in passes:
        name = "TIES, histogram" + " of a sample" * reduction.sample
        if "histogram" in reduction.combine:
            call = reducing(reduction)
            table.append(Kernel(name, call, read, _MODELS, "values"))
        else:
            table.append(Kernel("TIES, majority sign", reducing(reduction), read))
    return table


def repeat(call: Call, chunks: list[Chunk], times: int) -> float:
    """Wall seconds of a call, when every chunk has a thread that makes `times` calls,
    divided by the number of threads."""

    def work(chunk: Chunk) -> None:
        for _ in range(times):
            result = call(chunk)
            if on_cpu():  # where the engine waits for each result, too
                jax.block_until_ready(result)
        jax.block_until_ready(result)

    with concurrent.futures.ThreadPoolExecutor(len(chunks)) as pool:
        start = time.perf_counter()
        for working in [pool.submit(work, chunk) for chunk in chunks]:
            working.result()
        return (time.perf_counter() - start) / (times * len(chunks))


def measure(chunks: list[Chunk], samples: int) -> list[dict[str, Any]]:
    """One record per kernel; the first is the copy. The kernels take turns."""
    table = all_kernels(chunks[0])
    counts = []
    for kernel in table:
        repeat(kernel.call, chunks, 2)  # compiles
        once = repeat(kernel.call, chunks, 2) * len(chunks)
        counts.append(max(2, int(_SAMPLE_SECONDS / once)))
    spent: list[list[float]] = [[] for _ in table]
    for _ in range(samples):
        for kernel, count, own in zip(table, counts, spent, strict=True):
            own.append(repeat(kernel.call, chunks, count))
    size = int(chunks[0].x.base.size)
    records: list[dict[str, Any]] = []
    for kernel, own in zip(table, spent, strict=True):
        median = statistics.median(own)
        moved = kernel.arrays * size * _ITEMSIZE / median
        records.append(
            {
                "kernel": kernel.name,
                "unit": kernel.unit,
                "per_second": kernel.models * size / median,
                "bytes_per_second": moved,
                "of_copy": moved / records[0]["bytes_per_second"] if records else 1.0,
                "seconds_per_call": bench.spread(own),
            }
        )
    return records


def markdown(results: dict[str, Any]) -> str:
    rows = [
        [
            record["kernel"],
            f"{record['per_second'] / 1e9:.2f} G {record['unit']}/s",
            f"{record['bytes_per_second'] / 1e9:.1f}",
            f"{record['of_copy']:.0%}",
        ]
        for record in results["kernels"]
    ]
    table = bench.table(["kernel", "rate", "GB/s", "of the copy"], rows)
    machine, versions = results["machine"], results["versions"]
    return (
        f"{table}\n{results['device']} ({results['backend']}), "
        f"{results['threads']} threads, chunks of {results['chunk_elements']:,} "
        f"elements, bfloat16, base and {_MODELS} models; {machine['processor']}, "
        f"{machine['cores']} cores, {machine['kernel']}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f". Medians of {results['samples']} timings.\n\n"
        "`python benchmarks/kernel_rates.py`\n"
    )


def main(argv: list[str]) -> None:
    del argv
    allocator.keep_freed_memory()  # as the command does
    tile_count = _TILES.value or ((1 << 11) if on_cpu() else (1 << 16))
    threads = _THREADS.value or (available_cores() if on_cpu() else 1)
    chunks = [make_chunk(tile_count, seed) for seed in range(threads)]
    results = {
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "threads": threads,
        "chunk_elements": tile_count * plan.TILE,
        "samples": _SAMPLES.value,
        "commit": bench.commit(),
        "machine": bench.machine(Path.cwd()),
        "versions": bench.versions(("m3jax", "jax", "jaxlib", "numpy")),
        "kernels": measure(chunks, _SAMPLES.value),
    }
    folder = Path(_RESULTS.value)
    name = f"kernels-{results['backend']}"
    bench.write_json(folder / f"{name}.json", results)
    (folder / f"{name}.md").write_text(markdown(results))
    print("\n" + markdown(results))


if __name__ == "__main__":
    app.run(main)
