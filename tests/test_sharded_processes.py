"""Two processes with four devices each write the bytes that one process writes."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import distributed
import numpy as np
import pytest
from test_sharded_command import DARE, METHODS

import m3jax

RECIPES = {
    f"{method} {dare}": m3jax.Recipe(method=method, dare=DARE[dare])
    for method in METHODS
    for dare in DARE
} | {
    "by layer": m3jax.Recipe(
        method="task_arithmetic",
        dare=DARE["magnitude"],
        mixup=m3jax.Mixup(granularity="layer"),
    ),
}
# Of the executors; None is the streamed one.
MESHES = {"rows": {"rows": 8}, "grid": {"rows": 2, "columns": 4}, "streamed": None}
SHAPES = {
    "model.embed_tokens.weight": (131, 32),
    "model.layers.1.mlp.up_proj.weight": (40, 61),
    "model.layers.1.nothing.weight": (0, 4),
    "model.norm.weight": (1025,),
}
# Reads of the inputs are counted: all of one process's, headers included.
PROCESS = """
import pathlib, sys
import jax
index, port, folder = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
import m3jax
from m3jax.engine import load
from test_sharded_processes import MESHES, RECIPES
assert (jax.device_count(), jax.local_device_count()) == (8, 4)
read = [0]
read_into = load._read
def counted(source, box):
    values = read_into(source, box)
    read[0] += values.nbytes
    return values
load._read = counted
for name in sys.argv[4].split(","):
    for layout in sys.argv[5].split(","):
        mesh = MESHES[layout]
        m3jax.merge(
            folder / "base",
            [folder / "a", folder / "b"],
            folder / f"{name}, {layout}",
            RECIPES[name],
            seed=3,
            execution=m3jax.Execution(
                executor="sharded" if mesh else "streamed", mesh=mesh, fsync=False
            ),
        )
print(read[0])
"""


@pytest.mark.parametrize(
    ("names", "layouts", "timeout"),
    [
        (["ties random"], ["grid"], distributed.TIMEOUT),
        pytest.param([*RECIPES], [*MESHES], 1200, marks=pytest.mark.slow),
    ],
    ids=["one recipe", "all recipes"],
)
def test_same_folder(
    tmp_path: Path, names: list[str], layouts: list[str], timeout: float
):
    base = checkpoints.random_model(0, SHAPES, checkpoints.BFLOAT16)
    for i, name in enumerate(("base", "a", "b")):
        tensors = base
        if i:
            tensors = checkpoints.random_model(i, SHAPES, checkpoints.BFLOAT16, base)
        checkpoints.write(tmp_path / name, {**tensors, "ids": np.arange(9)})
    processes = distributed.run_script(
        PROCESS, tmp_path, ",".join(names), ",".join(layouts), timeout=timeout
    )
    for process in processes:
        assert process.code == 0, process.err
    for name in names:
        out = tmp_path / name
        models = [tmp_path / "a", tmp_path / "b"]
        m3jax.merge(tmp_path / "base", models, out, RECIPES[name], seed=3)
        expected = checkpoints.digest(out)
        for layout in layouts:
            assert checkpoints.digest(tmp_path / f"{name}, {layout}") == expected
    read = [int(process.out.split()[-1]) for process in processes]
    merged = sum(t.nbytes for t in base.values())
    sharded = len(names) * sum(MESHES[layout] is not None for layout in layouts)
    # The norm divides by nothing and is whole in both; the rest is shared out.
    assert 0 < max(read) < 0.6 * sharded * 3 * merged
