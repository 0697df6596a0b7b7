"""A hundred merges in one process: memory, open files and threads stay level."""

from __future__ import annotations

import contextlib
import gc
import itertools
import random
import resource
import shutil
from pathlib import Path

import pytest
from interruptions import Observer, held, partial_of, write_models

import m3jax

SHAPES = {
    **{f"model.layers.{i}.up_proj.weight": (401, 487) for i in range(6)},
    "model.norm.weight": (487,),
}  # 1.2 million parameters
MERGES = 100
WARM_UP = 40  # merges, in which every kind of recipe is met and compiled
# Bytes that the resident memory may grow by in the 60 merges behind the warm-up, for
# what the allocator cannot join: less than half of one 2.4 MB input of each of them.
GROWTH = 64 << 20
RECIPES = [
    m3jax.Recipe(
        method=method,
        mixup=m3jax.Mixup(granularity=granularity),
        dare=dare,
        dtype=dtype,
        max_shard_size=size,
    )
    for method, granularity, dare, (dtype, size) in itertools.product(
        ("average", "task_arithmetic", "ties"),
        ("model", "layer"),
        (
            m3jax.Dare(),
            m3jax.Dare(drop_rate=(0.2, 0.4)),
            m3jax.Dare(drop_rate=0.3, strategy="magnitude", target="weights"),
        ),
        (("input", "5GB"), ("float32", "2MB")),
    )
]


def resident() -> int:
    """Bytes of this process's resident memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.slow
def test_a_hundred_merges(tmp_path):
    merge = write_models(tmp_path / "models", SHAPES)
    output = tmp_path / "merged"
    rng = random.Random(7)
    recipes = RECIPES + rng.choices(RECIPES, k=MERGES - len(RECIPES))
    sizes, others, interruptions, fewest = [], [], 0, 30
    for i, recipe in enumerate(recipes):
        # Every fourth is interrupted, at a call that each of them makes, and every
        # eighth resumed.
        observer = Observer(*([rng.randrange(fewest)] if i % 4 == 3 else []))
        with contextlib.suppress(KeyboardInterrupt):
            merge(output, recipe, observer, chunk_size=None, seed=i)
            assert m3jax.verify(output) == []
            fewest = min(fewest, observer.calls)
        if not output.exists():
            interruptions += 1
        if i % 8 == 7:
            merge(output, recipe, chunk_size=None, seed=i, resume=True, overwrite=True)
        shutil.rmtree(output, ignore_errors=True)
        shutil.rmtree(partial_of(output), ignore_errors=True)
        gc.collect()
        sizes.append(resident())
        others.append(held())
    print(
        f"\n{MERGES} merges, {interruptions} of them interrupted: resident memory",
        *(f"{size >> 20} MiB" for size in sizes[WARM_UP - 1 :: 20]),
        f"(after {WARM_UP}, then every 20);",
        f"{others[-1][0]} open files, {len(others[-1][1])} threads",
    )
    assert interruptions > MERGES // 10
    assert len(set(map(str, others[WARM_UP - 1 :]))) == 1, others
    assert max(sizes[WARM_UP:]) - sizes[WARM_UP - 1] < GROWTH, sizes
