"""What an accelerator is good for, in one command of at most eight minutes.

    python benchmarks/gpu.py

- Masks and merged values on the accelerator beside those on the host's CPU: masks to
  the bit, values within one unit in the last place of bfloat16.
- Kernels against the bandwidth of a copy there (kernel_rates.py).
- Draws of a 1 B and a 7 B trio that are made in the device's memory (draws.py), where
  it has the room.
- Whole merges from files in memory (`--shm`) to files there.

Each part is a process of its own that ends when its time is up; the next one goes on.
Prints all tables and writes gpu.md. Without an accelerator it runs on the CPU, with
`--size=10m` in a minute, to test itself.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import bench
import programs
import recipes
from absl import app, flags

_MINUTES = flags.DEFINE_float("minutes", 8.0, "That all of it may take.", 0.5)
_SIZE = flags.DEFINE_string("size", "1.1b", "Of the smaller trio.")
_LARGE = flags.DEFINE_string("large", "7b", "Of the larger one; '': none.")
_SHM = flags.DEFINE_string("shm", "/dev/shm/m3jax-gpu", "Folder in memory, for files.")
_RESULTS = flags.DEFINE_string(
    "results", str(bench.BENCHMARKS / "results"), "Where results go."
)
_CHECK = flags.DEFINE_bool("check", False, "Compare with the CPU, and nothing else.")

_CHECKED = ("average_m3", "dare_ties_m3", "mergekits_dare_linear", "mergekits_ties")
_WHOLE = ("average_m3", "ties_m3", "dare_ties_m3")


def main(argv: list[str]) -> None:
    del argv
    if _CHECK.value:
        check()
        return
    end = time.monotonic() + 60 * _MINUTES.value
    here, script = bench.BENCHMARKS, str(Path(__file__))
    results = f"--results={_RESULTS.value}"
    draws = [str(here / "draws.py"), "--on_device", results, "--draws=4"]
    parts = {
        "The CPU's bits": [script, "--check", f"--shm={_SHM.value}"],
        "Kernels": [str(here / "kernel_rates.py"), "--samples=3", results],
        "Draws": [*draws, f"--size={_SIZE.value}"],
        "Draws of a larger trio": [*draws, f"--size={_LARGE.value}"],
        "From memory to memory": [
            str(here / "scaling.py"),
            f"--sizes={_SIZE.value}",
            f"--recipes={','.join(_WHOLE)}",
            *("--rounds=1", f"--data={_SHM.value}", results),
        ],
    }
    if not _LARGE.value:
        del parts["Draws of a larger trio"]
    told = []
    try:
        for name, command in parts.items():
            told.append(f"## {name}\n\n{_run(command, end - time.monotonic())}\n")
            print(told[-1], flush=True)
    finally:
        shutil.rmtree(_SHM.value, ignore_errors=True)
    folder = Path(_RESULTS.value)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.md").write_text("\n".join(told))


def _run(command: Sequence[str], seconds: float) -> str:
    """What a part prints, or why it did not come to its end."""
    if seconds <= 0:
        return "No time was left."
    start = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return f"Cut off after {seconds:.0f} s."
    spent = f"({time.monotonic() - start:.0f} s)"
    if done.returncode:
        return f"Failed: {done.stderr.strip().splitlines()[-1:]} {spent}"
    return f"{done.stdout.strip()}\n\n{spent}"


def check() -> None:
    """Merges small models on both kinds of devices, and compares the outputs."""
    data = Path(_SHM.value)
    programs.make_models(data, ["10m"])
    rows = []
    for name, recipe in recipes.select(list(_CHECKED)).items():
        outputs = [
            _merge(data, recipe, kind, environment)
            for kind, environment in (("device", {}), ("cpu", {"JAX_PLATFORMS": "cpu"}))
        ]
        rows.append([name, *_compared(*outputs)])
    header = ["merge of 10m", "ratios", "equal values", "largest difference, units"]
    print(bench.table(["device", "masks"], [_masks()]))
    print(bench.table(header, rows))


def _merge(
    data: Path, recipe: recipes.BenchmarkRecipe, kind: str, environment: dict[str, str]
) -> Path:
    output = data / f"checked-{kind}"
    shutil.rmtree(output, ignore_errors=True)
    runner = programs.Programs(data / "10m", output)
    with runner.m3jax_command(recipe, "-m", "m3jax", "merge") as command:
        bench.run(command, {"PYTHONPATH": str(bench.BENCHMARKS.parent), **environment})
    return output


def _compared(ours: Path, cpus: Path) -> list[str]:
    """Whether ratios are equal, how many values are, and how far the others are off."""
    import json

    import numpy as np

    records = [json.loads((own / "m3jax.json").read_text()) for own in (ours, cpus)]
    same = records[0]["ratios"] == records[1]["ratios"]
    equal, total, largest = 0, 0, 0
    for path in sorted(ours.glob("*.safetensors")):
        length = int.from_bytes(path.read_bytes()[:8], "little")
        a, b = (
            np.fromfile(own / path.name, np.int16, offset=8 + length).astype(np.int32)
            for own in (ours, cpus)
        )
        # Bit patterns in order of the values: negative ones count down from zero.
        a, b = (np.where(own < 0, -(own & 0x7FFF), own) for own in (a, b))
        equal += int(np.count_nonzero(a == b))
        total += a.size
        largest = max(largest, int(np.abs(a - b).max(initial=0)))
    return ["equal" if same else "DIFFERENT", f"{equal / total:.4%}", str(largest)]


def _masks() -> list[str]:
    """The masks of tiles at both ends of what 32 bits count, on device and CPU."""
    import jax
    import numpy as np

    from m3jax import prng
    from m3jax.engine import tiles

    keys = prng.mask_keys(prng.root_key(7), 2, ["a", "b"])
    tile = np.array([0, 1, 1 << 24, (1 << 34) - 1, 1 << 34], np.uint64)
    item = np.array([0, 1, 0, 1, 0])
    threshold = np.full((2, 2), 13107, np.uint32)
    made_of = tiles.keys_and_blocks(keys, threshold, item, tile)
    found = []
    for device in (jax.devices()[0], jax.local_devices(backend="cpu")[0]):
        with jax.default_device(device):
            found.append(tiles.drawn_beforehand("mask", made_of))
    same = np.array_equal(*found)
    kind = jax.devices()[0].device_kind
    return [kind, "equal to the CPU's" if same else "DIFFERENT"]


if __name__ == "__main__":
    app.run(main)
