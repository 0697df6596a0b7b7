"""A small merge to interrupt, and the look at what an interruption left."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import checkpoints
import jax

import m3jax
from m3jax.engine.execution import Execution
from m3jax.engine.merge import MergeResult
from m3jax.engine.progress import Progress

SHAPES = {
    "model.embed_tokens.weight": (97, 29),
    "model.layers.0.norm.weight": (1025,),
    "model.layers.0.up_proj.weight": (41, 71),
    "model.layers.1.nothing.weight": (0, 4),
    "model.layers.1.scale": (),
    "model.layers.1.up_proj.weight": (41, 71),
    "model.layers.2.up_proj.weight": (41, 71),
    "model.norm.weight": (29,),
}
FLOATS = len(SHAPES) - 1  # tensors that are worth a line of the journal
RECIPES = {
    "average": m3jax.Recipe(max_shard_size="9KB"),
    "ties": m3jax.Recipe(method="ties", max_shard_size="9KB"),
    "ties after DARE": m3jax.Recipe(method="ties", dare=m3jax.Dare(drop_rate=0.3)),
    "by magnitude": m3jax.Recipe(
        method="task_arithmetic",
        dare=m3jax.Dare(drop_rate=0.3, strategy="magnitude"),
        max_shard_size="9KB",
    ),
}


def write_models(folder: Path, shapes: checkpoints.Shapes = SHAPES) -> Merge:
    """Writes a base with a tokenizer and two models."""
    base = checkpoints.random_model(0, shapes, checkpoints.BFLOAT16)
    config = {"architectures": ["LlamaForCausalLM"]}
    checkpoints.write(folder / "base", base, config)
    (folder / "base" / "tokenizer.json").write_text('{"version": "1.0"}')
    for seed, name in ((1, "a"), (2, "b")):
        model = checkpoints.random_model(seed, shapes, checkpoints.BFLOAT16, base)
        checkpoints.write(folder / name, model)
    return Merge(folder / "base", (folder / "a", folder / "b"))


@dataclasses.dataclass(frozen=True)
class Merge:
    """Inputs of a merge that is run in small chunks on one device."""

    base: Path
    models: tuple[Path, ...]

    def __call__(
        self,
        output: Path,
        recipe: m3jax.Recipe,
        progress: Progress | None = None,
        *,
        seed: int = 7,
        **execution: Any,
    ) -> MergeResult:
        small = {"chunk_size": 1024, "threads": 3, "devices": jax.local_devices()[:1]}
        return m3jax.merge(
            self.base,
            self.models,
            output,
            recipe,
            seed=seed,
            execution=Execution(**{**small, **execution}),
            progress=progress,
        )

    def arguments(self, output: Path, recipe: Sequence[str]) -> list[str]:
        """The same on the command line."""
        return [
            "merge",
            f"--base={self.base}",
            f"--models={','.join(map(str, self.models))}",
            f"--output={output}",
            "--seed=7",
            "--chunk_size=1024",
            "--threads=3",
            *recipe,
        ]


class Observer(Progress):
    """Keeps what a merge says; presses Ctrl-C at a given moment."""

    def __init__(self, *interrupt_at: int):
        """`interrupt_at`: numbers of the calls of `advance`, from 0."""
        self.calls = 0
        self.stages: list[str] = []
        self.notes: list[str] = []
        self._interrupt_at = interrupt_at
        self._lock = threading.Lock()

    def stage(self, label: str, total: int) -> None:
        self.stages.append(label)

    def note(self, line: str) -> None:
        self.notes.append(line)

    def advance(self, count: int) -> None:
        with self._lock:
            call = self.calls
            self.calls += 1
        if call in self._interrupt_at:
            main = threading.main_thread().ident
            assert main is not None
            signal.pthread_kill(main, signal.SIGINT)


def partial_of(output: Path) -> Path:
    """The hidden folder in which an output is made."""
    return output.parent / f".{output.name}.m3jax-partial"


def journal_of(output: Path) -> Path:
    return partial_of(output) / "journal.jsonl"


def held() -> tuple[int, list[str]]:
    """The number of open files and the names of the threads of this process."""
    threads = [thread.name for thread in threading.enumerate() if thread.is_alive()]
    return len(os.listdir("/proc/self/fd")), sorted(threads)  # noqa: PTH208
