"""The programs of a comparison: the floor, m3jax and mergekit, each as a command."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import bench
import recipes

MERGEKIT = ("torch==2.13.0", "mergekit==0.1.5")
# What a careful user gives on a CPU: tensors are read as they are needed, no tokenizer
# is looked for (the models have none), no bars are drawn.
MERGEKIT_FLAGS = ("--lazy-unpickle", "--no-copy-tokenizer", "--quiet")
_OFFLINE = {"HF_HUB_OFFLINE": "1"}


@dataclasses.dataclass(frozen=True)
class Programs:
    """Runs merges of the models in one folder.

    Attributes:
      data: holds base, maths and code.
      output: is made by each run, and deleted after it.
      mergekit: the Python of mergekit's environment, None without one.
      mergekit_flags: that it is run with.
      fsync: the floor and m3jax wait until the disk has the output; mergekit cannot.
      cold: read the inputs from the disk, not from the page cache.
    """

    data: Path
    output: Path
    mergekit: Path | None = None
    mergekit_flags: Sequence[str] = MERGEKIT_FLAGS
    fsync: bool = False
    cold: bool = False

    @functools.cached_property
    def size_bytes(self) -> int:
        """Bytes of one model's weights."""
        files = (self.data / "base").glob("*.safetensors")
        return sum(path.stat().st_size for path in files)

    def m3jax(self, recipe: recipes.BenchmarkRecipe) -> bench.Run:
        with self.m3jax_command(recipe, bench.BENCHMARKS / "observed_merge.py") as own:
            return self._run(own, recipe)

    @contextlib.contextmanager
    def m3jax_command(
        self, recipe: recipes.BenchmarkRecipe, *program: str | Path
    ) -> Iterator[list[str | Path]]:
        """The command of a merge by a program that takes `m3jax merge`'s flags."""
        models = ",".join(str(self.data / model) for model in recipes.MODELS[1:])
        inputs = [f"--base={self.data / 'base'}", f"--models={models}"]
        with self._yaml(recipe) as config:
            yield [
                sys.executable,
                *program,
                *([f"--config={config}"] if recipe.same_yaml else inputs),
                f"--output={self.output}",
                "--fsync" if self.fsync else "--nofsync",
                *recipe.flags,
            ]

    def floor(
        self, recipe: recipes.BenchmarkRecipe, merged: dict[str, Any]
    ) -> bench.Run:
        """The floor of a recipe, with the threads and the reads of a merge's report."""
        inputs = ",".join(str(self.data / model) for model in recipe.inputs)
        command: list[str | Path] = [
            sys.executable,
            bench.BENCHMARKS / "floor.py",
            f"--inputs={inputs}",
            f"--output={self.output}",
            f"--threads={merged['threads']}",
            f"--block={merged['chunk_elements'] * 2}",  # bfloat16
            "--fsync" if self.fsync else "--nofsync",
            "--direct_reads" if self.cold else "--nodirect_reads",
        ]
        return self._run(command, recipe)

    def run_mergekit(self, recipe: recipes.BenchmarkRecipe) -> bench.Run:
        """Merges with mergekit's counterpart of a recipe."""
        assert self.mergekit is not None
        program = self.mergekit.parent / "mergekit-yaml"
        with self._yaml(recipe) as config:
            return self._run(
                [program, config, self.output, *self.mergekit_flags], recipe
            )

    @contextlib.contextmanager
    def _yaml(self, recipe: recipes.BenchmarkRecipe) -> Iterator[Path]:
        """The file of mergekit's recipe."""
        config = self.output.with_suffix(".yaml")
        config.write_text(recipes.mergekit_yaml(recipe.mergekit, self.data))
        try:
            yield config
        finally:
            config.unlink()

    def _run(
        self, command: Sequence[str | Path], recipe: recipes.BenchmarkRecipe
    ) -> bench.Run:
        """One run from a settled state: caches as asked for, nothing left to write."""
        folders = [self.data / model for model in recipe.inputs]
        prepare = bench.cool if self.cold else bench.warm
        prepare(folders)
        bench.settle()
        try:
            return bench.run(command, _OFFLINE)
        finally:
            shutil.rmtree(self.output, ignore_errors=True)


def streaming(run: bench.Run) -> float:
    """Seconds from the first read to the last write, less compilation."""
    return run.report["wall"]["passes"] - run.report.get("compiling", 0.0)


def m3jax_versions() -> dict[str, str]:
    return bench.versions(("m3jax", "jax", "jaxlib", "numpy"))


def mergekit_versions(python: Path) -> dict[str, str]:
    names = ("mergekit", "torch", "transformers", "safetensors")
    return bench.versions(names, str(python))


def make_models(data: Path, sizes: Iterable[str]) -> None:
    """Makes the models of these sizes under data/SIZE, unless they are there."""
    for size in sizes:
        command = [
            sys.executable,
            bench.BENCHMARKS / "make_checkpoints.py",
            f"--size={size}",
            f"--output={data / size}",
        ]
        subprocess.run([str(part) for part in command], check=True)


def find_mergekit(flag: str, data: Path) -> Path | None:
    """The Python of mergekit's environment.

    Args:
      flag: its path; ``install`` makes the environment under `data` if it is not
        there; ``""`` uses it if it is there.
      data: folder for the environment.

    Raises:
      ValueError: if there is no mergekit in the environment that the flag names.
    """
    own = data / "mergekit-environment"
    python = Path(flag) if flag not in ("", "install") else own / "bin" / "python"
    if flag == "install" and not (python.parent / "mergekit-yaml").exists():
        subprocess.run([sys.executable, "-m", "venv", str(own)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", *MERGEKIT], check=True)
    if (python.parent / "mergekit-yaml").exists():
        return python
    if flag:
        raise ValueError(f"--mergekit={flag}: has no mergekit-yaml beside it")
    return None
