"""Memory does not grow with the model: peak resident memory of whole merges."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from grids import thinned

from m3jax.checkpoints.formats import safetensors
from m3jax.checkpoints.formats.dtypes import BFLOAT16

RECIPES = {
    "average": [],
    "ties": ["--config.method=ties"],
    "ties_dare": ["--config.method=ties", "--config.dare.drop_rate=0.2"],
}
SMALL, LARGE = 16 << 20, 80 << 20  # elements; at least two chunks for each thread
# Eight chunks of 2 Mi float32 elements would be 64 MiB; the models' difference in
# size, base and two models read and one written, is 512 MiB.
MAY_GROW = 64 << 20  # bytes


# The kernel's own count, since what wait4 says of a child includes the memory of the
# process that it was forked from.
MERGE = """
import sys
from m3jax.__main__ import main
code = main(sys.argv[1:])
status = dict(line.split(":") for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) * 1024)
sys.exit(code)
"""


def sparse_checkpoint(folder: Path, elements: int) -> str:
    """A checkpoint of zeros that takes no room on the disk."""
    shapes = {f"layers.{i}.weight": (elements // 8 // 1024, 1024) for i in range(8)}
    header, entries = safetensors.layout(
        [(name, BFLOAT16, shape) for name, shape in shapes.items()], {"format": "pt"}
    )
    folder.mkdir(parents=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(max(entry.stop for entry in entries.values()))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return str(folder)


def peak_memory(folder: Path, elements: int, flags: list[str]) -> int:
    """Bytes of resident memory that one merge needed at most."""
    base, a, b = (
        sparse_checkpoint(folder / name, elements) for name in ("base", "a", "b")
    )
    command = [sys.executable, "-c", MERGE, "merge", f"--base={base}"]
    command += [f"--models={a},{b}", f"--output={folder / 'out'}", "--nofsync", *flags]
    environment = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.mark.parametrize("recipe", thinned(RECIPES, lambda name: name == "ties_dare"))
def test_peak_memory_is_that_of_a_few_chunks(tmp_path, recipe):
    small = peak_memory(tmp_path / "small", SMALL, RECIPES[recipe])
    large = peak_memory(tmp_path / "large", LARGE, RECIPES[recipe])
    assert large - small < MAY_GROW, (small, large)
    assert large < 10**9


def test_what_is_measured_by_tensor_has_a_bound(tmp_path):
    """Tensors that are read once, measured and merged lie in a fixed number of buffers;
    half a gigabyte holds all of it at any size."""
    flags = ["--config.method=model_stock", "--config.mixup.alpha=None"]
    assert peak_memory(tmp_path, LARGE, flags) < 500 << 20
