"""How near a randomised SVD comes to the first triples of a matrix, and what it saves.

    python benchmarks/sketches.py

Subspace iteration on a random sketch, as `m3jax lora extract` has it, of a matrix whose
singular values are those of noise, or fall as 1/√i or 1/i. "Off" is the distance to the
exact truncation in its norm; "CPU s" has the SVD of spectral methods behind it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import app, flags

from m3jax.lora import factors
from m3jax.methods import spectral

_SIZE = flags.DEFINE_integer("size", 1024, "Rows and columns of the matrix.", 64)


def main(argv: list[str]) -> None:
    size = _SIZE.value
    rng = np.random.default_rng(0)
    bases = [np.linalg.qr(rng.normal(size=(size, size)))[0] for _ in range(2)]
    order = np.arange(1, size + 1)
    noise = np.linalg.svd(rng.normal(size=(size, size)), compute_uv=False)
    spectra = {"noise": noise / noise[0], "1/√i": order**-0.5, "1/i": 1 / order}
    print("| spectrum | rank | off | CPU s | exact, CPU s |\n|" + "---|" * 5)
    with jax.enable_x64(True):
        exact = jax.jit(spectral.svd)
        for name, values in spectra.items():
            matrix = ((bases[0] * values) @ bases[1].T).astype(np.float32)
            jax.block_until_ready(exact(matrix))
            whole, _ = _timed(lambda m=matrix: jax.block_until_ready(exact(m)))
            for rank in (size // 64, size // 16, size // 4):
                sketch = rng.normal(size=(size, rank + factors.OVERSAMPLING))
                drawn = sketch.astype(np.float32)
                cpu, svd = _timed(
                    lambda m=matrix, r=rank, s=drawn: factors.randomised(m, r, s)
                )
                wanted = (bases[0][:, :rank] * values[:rank]) @ bases[1][:, :rank].T
                off = np.linalg.norm((svd.u * svd.values) @ svd.vt - wanted)
                off /= np.linalg.norm(wanted)
                print(f"| {name} | {rank} | {off:.1e} | {cpu:.2f} | {whole:.2f} |")


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    found = function()
    return time.process_time() - start, found


if __name__ == "__main__":
    app.run(main)
