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
from m3jax.engine.tables import TileTables
from m3jax.methods.method import Reduction, run_statistics

from m3jax import prng
from m3jax.commands import allocator
from m3jax.engine import kernels, plan
from m3jax.engine.pipeline import available_cores
from m3jax.methods import METHODS, dare, selection

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
_OFF = kernels.Transform(None, "delta")
_RANDOM = kernels.Transform("random", "delta")

Call = Callable[["Chunk"], Any]


class Chunk(NamedTuple):
    """The arrays of one chunk, on the device; T tiles, K models.

    Attributes:
      base: (T, TILE) bfloat16.
      stack: (K, T, TILE) bfloat16.
      parts: the base and each model again, 1 + K arrays of (T, TILE).
      room: (T, TILE) uint16, memory to copy them to on a CPU.
      plain: per-tile numbers without DARE.
      random: the same with random DARE.
      reducing: per-tile numbers for statistics, without coefficients.
    """

    base: jax.Array
    stack: jax.Array
    parts: list[jax.Array]
    room: np.ndarray
    plain: kernels.Tiles
    random: kernels.Tiles
    reducing: kernels.Tiles


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


def make_chunk(tiles: int, seed: int) -> Chunk:
    """A chunk of weights and fine-tuned weights as in make_checkpoints.py."""
    rng = np.random.default_rng(seed)
    block = min(tiles, 1 << 10)
    base = rng.standard_normal((block, plan.TILE), np.float32) * np.float32(0.02)
    base = base.astype(ml_dtypes.bfloat16)
    steps = rng.standard_normal((_MODELS, *base.shape), np.float32) * np.float32(4e-5)
    stack = (base.astype(np.float32) + steps).astype(ml_dtypes.bfloat16)
    [chunk] = plan.cut([plan.Item(tiles * plan.TILE, ())], [0], tiles)
    drop = prng.drop_thresholds((_DROP_RATE,) * _MODELS)
    tables = TileTables(
        keys=prng.mask_keys(prng.root_key(seed), _MODELS, ["weight"]),
        drop=drop,
        scales=dare.rescale_factors(1 - drop / prng.RATE_STEPS, rescale=True),
    )
    coefficients = np.full((_MODELS, 1), 1 / _MODELS, np.float32)
    repeat = -(-tiles // block)
    whole_base = jnp.tile(base, (repeat, 1))[:tiles]
    whole_stack = jnp.tile(stack, (1, repeat, 1))[:, :tiles]
    parts = [jnp.copy(part) for part in (whole_base, *whole_stack)]
    return Chunk(
        whole_base,
        whole_stack,
        parts,
        np.ones(whole_base.shape, np.uint16),
        jax.device_put(tables.tiles(chunk, tiles, _OFF, coefficients)),
        jax.device_put(tables.tiles(chunk, tiles, _RANDOM, coefficients)),
        jax.device_put(tables.tiles(chunk, tiles, _OFF)),
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


def merging(method: str, transform: kernels.Transform, info: Any) -> Call:
    """A merge of one chunk. On a CPU, DARE's masks come from a kernel of their own."""
    kernel = kernels.merge_kernel(method, transform, "bfloat16")
    needs_base = METHODS[method].needs_base or transform.strategy is not None
    scaling = jax.device_put(np.float32(1))
    info = jax.device_put(info)

    def call(chunk: Chunk) -> jax.Array:
        tiles = chunk.plain if transform.strategy is None else chunk.random
        if tiles.keys is not None and on_cpu():
            dropped = np.asarray(masks(chunk)).view(np.bool_)
            tiles = tiles._replace(keys=None, blocks=None, drop=None, dropped=dropped)
        base = chunk.base if needs_base else None
        return kernel(base, chunk.stack, tiles, info, scaling)

    return call


def masks(chunk: Chunk) -> jax.Array:
    tiles = chunk.random
    return kernels.mask_kernel()(tiles.keys, tiles.blocks, tiles.drop)


def reducing(reduction: Reduction) -> Call:
    """One chunk of a reading pass; a CPU's codes are counted by NumPy."""
    on_device = reduction.histogram and not on_cpu()
    kernel = kernels.reduce_kernel(reduction.function, _OFF, count=on_device)
    arguments = jax.device_put(reduction.arguments)

    def call(chunk: Chunk) -> Any:
        counts = kernel(chunk.base, chunk.stack, chunk.reducing, arguments)
        if reduction.histogram and not on_device:
            codes, *others = counts
            return selection.count_codes_on_host(np.asarray(codes)[0])[None], *others
        return counts

    return call


def statistics_of(chunk: Chunk) -> tuple[Any, list[Reduction]]:
    """What TIES finds out about a chunk, and the passes that it takes, sample first."""
    passes: list[Reduction] = []

    def answer(reduction: Reduction) -> Any:
        passes.append(reduction)
        counts = reducing(reduction)(chunk)
        return jax.tree.map(lambda part: np.asarray(part).sum(0, np.int64), counts)

    generator = METHODS["ties"].statistics
    assert generator is not None
    info = run_statistics(generator(_MODELS, chunk.base.size, _TRIM_RATE), answer)
    return info, passes


def all_kernels(chunk: Chunk) -> list[Kernel]:
    info, passes = statistics_of(chunk)
    read = _MODELS + 1
    table = [
        Kernel("copy", copy, 2 * read, read),
        Kernel("average", merging("average", _OFF, {}), _MODELS + 1),
        Kernel("task arithmetic", merging("task_arithmetic", _OFF, {}), read + 1),
        Kernel("DARE + average", merging("average", _RANDOM, {}), read + 1),
        Kernel(
            "DARE + task arithmetic", merging("task_arithmetic", _RANDOM, {}), read + 1
        ),
        Kernel("TIES, applied", merging("ties", _OFF, info), read + 1),
        Kernel("DARE + TIES, applied", merging("ties", _RANDOM, info), read + 1),
        # A byte a mask: half a bfloat16 array for each model.
        Kernel("DARE masks", masks, _MODELS / 2, _MODELS, "masks"),
    ]
    for reduction in passes:
        name = "TIES, histogram" + " of a sample" * reduction.sample
        if reduction.histogram:
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
    size = chunks[0].base.size
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
    tiles = _TILES.value or ((1 << 11) if on_cpu() else (1 << 16))
    threads = _THREADS.value or (available_cores() if on_cpu() else 1)
    chunks = [make_chunk(tiles, seed) for seed in range(threads)]
    results = {
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "threads": threads,
        "chunk_elements": tiles * plan.TILE,
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
