"""Two processes with four devices each: the sharded executor's bytes are the same."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import checkpoints
import numpy as np

import m3jax

RECIPES = {
    "ties": m3jax.Recipe(method="ties", dare=m3jax.Dare(drop_rate=0.3)),
    "magnitude": m3jax.Recipe(
        method="task_arithmetic",
        dare=m3jax.Dare(drop_rate=0.3, strategy="magnitude"),
        mixup=m3jax.Mixup(granularity="layer"),
    ),
}
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
from m3jax.checkpoints import files
from m3jax.engine import load
sys.path.insert(0, sys.argv[4])
from test_sharded_processes import RECIPES
assert (jax.device_count(), jax.local_device_count()) == (8, 4)
read = [0]
read_into = load._read
def counted(source, box):
    values = read_into(source, box)
    read[0] += values.nbytes
    return values
load._read = counted
for name, recipe in RECIPES.items():
    for mesh in ({"rows": 8}, {"rows": 2, "columns": 4}):
        m3jax.merge(
            folder / "base",
            [folder / "a", folder / "b"],
            folder / f"{name}-{mesh['rows']}",
            recipe,
            seed=3,
            execution=m3jax.Execution(executor="sharded", mesh=mesh, fsync=False),
        )
print(read[0])
"""


def test_same_folder(tmp_path: Path):
    base = checkpoints.random_model(0, SHAPES, checkpoints.BFLOAT16)
    for i, name in enumerate(("base", "a", "b")):
        tensors = base
        if i:
            tensors = checkpoints.random_model(i, SHAPES, checkpoints.BFLOAT16, base)
        checkpoints.write(tmp_path / name, {**tensors, "ids": np.arange(9)})
    expected = {}
    for name, recipe in RECIPES.items():
        out = tmp_path / f"{name}-expected"
        models = [tmp_path / "a", tmp_path / "b"]
        m3jax.merge(tmp_path / "base", models, out, recipe, seed=3)
        expected[name] = checkpoints.digest(out)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    arguments = [str(port), str(tmp_path), str(Path(__file__).parent)]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(i), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, errors) in zip(running, outputs, strict=True):
        assert process.returncode == 0, errors
    for name, digest in expected.items():
        for rows in (8, 2):
            assert checkpoints.digest(tmp_path / f"{name}-{rows}") == digest
    read = [int(out.split()[-1]) for out, _ in outputs]
    merged = sum(t.nbytes for t in base.values())
    # The norm divides by nothing and is whole in both; the rest is shared out.
    assert max(read) < 0.6 * len(RECIPES) * 2 * 3 * merged
