"""Merges checkpoints from files to files: the whole of it, from top to bottom."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from m3jax.checkpoints import provenance
from m3jax.checkpoints.output import (
    OutputFolder,
    ShardWriter,
    check_free,
    write_index,
)
from m3jax.engine import plan
from m3jax.engine.prepare import Execution, Prepared, check_apart, prepare
from m3jax.engine.progress import Progress
from m3jax.engine.streamed import Emit, Stream, TileTables
from m3jax.methods import METHODS, dare
from m3jax.methods.method import Info, Reduction, run_statistics
from m3jax.prng import RATE_STEPS, drop_thresholds
from m3jax.recipe import Recipe

# A sample of 4 Mi elements finds a threshold to within a tenth of a histogram's
# window; it is worth its reads only if reading everything takes far longer.
_SAMPLE_TILES = 4096
_SAMPLE_PAYS = 16  # times the sample


@dataclasses.dataclass(frozen=True)
class MergeResult:
    """What a merge did.

    Attributes:
      output: the folder.
      ratios: the ratios of each group of tensors, None where M3 is off.
      checksums: xxh3_128 of each tensor written, as in m3jax.json.
      seconds: per stage, summed over threads.
      resumed: number of tensors that an interrupted merge had written already.
    """

    output: Path
    ratios: dict[str, tuple[float, ...]] | None
    checksums: dict[str, str]
    seconds: dict[str, float]
    resumed: int


def merge(
    base: str | PathLike[str] | None,
    models: Sequence[str | PathLike[str]],
    output: str | PathLike[str],
    recipe: Recipe | None = None,
    *,
    seed: int = 0,
    execution: Execution | None = None,
    progress: Progress | None = None,
) -> MergeResult:
    """Merges checkpoints into a new checkpoint folder that transformers loads.

    Streams: memory does not grow with the model. The same inputs, recipe and seed
    give the same bytes, whatever `execution` says.

    Args:
      base: the base model, a path or Hugging Face id; None if the recipe needs none.
      models: the fine-tuned models; their order is that of the ratios.
      output: the folder to make.
      recipe: what to do; the default is M3's average.
      seed: of ratios and masks, 0 <= seed < 2**32.
      execution: how to run it.
      progress: is told what happens.

    Raises:
      RecipeError: the recipe does not fit the models.
      CheckpointError: the inputs do not fit each other, or the output's place is
        taken; one line that names the file and the tensor.
      OSError: the disk.
    """
    recipe, execution = recipe or Recipe(), execution or Execution()
    progress = progress or Progress()
    final = Path(fspath(output))
    names = [fspath(model) for model in models]
    check_free(final, overwrite=execution.overwrite)
    with prepare(
        None if base is None else fspath(base), names, recipe, seed, execution
    ) as prepared:
        check_apart(final, prepared.checkpoints)
        for note in prepared.inputs.notes:
            progress.note(note)
        with OutputFolder(
            final, overwrite=execution.overwrite, resume=execution.resume
        ) as folder:
            return _execute(prepared, folder, progress)


def _execute(
    prepared: Prepared, folder: OutputFolder, progress: Progress
) -> MergeResult:
    journal = _Journal(prepared, folder, progress)
    folder.check_space(prepared.written_bytes)
    stream = Stream(
        prepared.inputs.tensors,
        TileTables(prepared.coefficients()),
        tiles=prepared.tiles,
        threads=prepared.execution.num_threads,
        devices=prepared.devices,
        names=[checkpoint.name for checkpoint in prepared.checkpoints],
        progress=progress.advance,
    )
    stream.tables = _dare_tables(prepared, stream, journal, progress)
    info = _statistics(prepared, stream, journal, progress)
    writer = ShardWriter(folder, list(prepared.shards), keep=journal.resumed)
    try:
        recorder = _Recorder(prepared, writer, journal)
        done = recorder.recover() if journal.resumed else 0
        left = [i for i in range(len(prepared.items)) if i not in recorder.checksums]
        written = sum(
            prepared.items[i].size * prepared.inputs.tensors[i].dtype.itemsize
            for i in left
        )
        progress.stage("merging", prepared.read_bytes(left) + written)
        stream.merge(
            plan.cut(prepared.items, left, prepared.tiles),
            prepared.recipe.method,
            prepared.transform,
            info,
            prepared.recipe.scaling,
            recorder,
            check_finite=not prepared.execution.allow_nonfinite,
        )
    finally:
        writer.close()
    for checkpoint in prepared.checkpoints:
        for file in checkpoint.files:
            file.check_unchanged()
    write_index(folder, list(prepared.shards))
    tensors = prepared.inputs.tensors
    checksums = {tensors[i].name: c for i, c in sorted(recorder.checksums.items())}
    provenance.write(
        folder,
        provenance.Facts(
            recipe=prepared.recipe,
            seed=prepared.seed,
            ratios=prepared.ratios,
            base=prepared.base,
            models=prepared.models,
            input_checksums=recorder.input_checksums(),
            shards=prepared.shards,
            checksums=checksums,
            config_changes=prepared.inputs.config,
            tokenizer_from=prepared.execution.tokenizer_from,
        ),
    )
    with stream.clock.stage("committing"):
        folder.commit(fsync=prepared.execution.fsync)
    return MergeResult(
        folder.final, prepared.ratios, checksums, dict(stream.clock.seconds), done
    )


def _dare_tables(
    prepared: Prepared, stream: Stream, journal: _Journal, progress: Progress
) -> TileTables:
    """The per-tensor numbers, DARE's included; by magnitude they take passes."""
    tables = stream.tables
    rates = prepared.recipe.dare.rates(len(prepared.models))
    if rates is None:
        return tables
    rescale, target = prepared.recipe.dare.rescale, prepared.recipe.dare.target
    if prepared.transform.strategy == "random":
        drop = drop_thresholds(rates)
        kept = 1 - drop / RATE_STEPS
        return TileTables(
            tables.coefficients,
            keys=prepared.mask_keys(),
            drop=drop,
            scales=dare.rescale_factors(kept, rescale=rescale),
        )
    saved = journal.statistics("magnitudes")
    if saved is None:
        thresholds = np.zeros((len(rates), len(prepared.items)), np.float32)
        positions = prepared.merged
        progress.stage("measuring magnitudes", 2 * prepared.read_bytes(positions))
        plain = dataclasses.replace(prepared.transform, strategy=None)
        for i in positions:
            size = prepared.items[i].size
            chunks = plan.cut(prepared.items, [i], prepared.tiles)
            thresholds[:, i] = run_statistics(
                dare.magnitude_thresholds(rates, size, target=target),
                lambda reduction, chunks=chunks: (
                    None
                    if reduction.sample
                    else stream.reduce(chunks, reduction, plain)
                ),
            )
        saved = journal.keep_statistics("magnitudes", {"thresholds": thresholds})
    kept = 1 - np.array(rates)
    return TileTables(
        tables.coefficients,
        drop=saved["thresholds"],
        scales=dare.rescale_factors(kept, rescale=rescale),
    )


def _statistics(
    prepared: Prepared, stream: Stream, journal: _Journal, progress: Progress
) -> Info:
    """What the method needs to know of the whole model."""
    method = METHODS[prepared.recipe.method]
    if method.statistics is None:
        return {}
    saved = journal.statistics("method")
    if saved is not None:
        return saved
    positions = prepared.merged
    size = sum(prepared.items[i].size for i in positions)
    generator = method.statistics(
        len(prepared.models), size, prepared.recipe.trim_rate
    )
    passes = 0

    def answer(reduction: Reduction) -> Any:
        nonlocal passes
        if reduction.sample:
            if size < _SAMPLE_PAYS * _SAMPLE_TILES * plan.TILE:
                return None
            chunks = plan.sample(
                prepared.items, positions, prepared.tiles, _SAMPLE_TILES
            )
        else:
            passes += 1
            progress.stage(f"measuring, pass {passes}", prepared.read_bytes(positions))
            chunks = plan.cut(prepared.items, positions, prepared.tiles)
        return stream.reduce(chunks, reduction, prepared.transform)

    return journal.keep_statistics("method", run_statistics(generator, answer))


class _Journal:
    """What an interrupted merge had found out and written, and what this one does."""

    def __init__(self, prepared: Prepared, folder: OutputFolder, progress: Progress):
        self._folder = folder
        start = {"fingerprint": prepared.fingerprint()}
        entries = folder.journalled
        self.resumed = bool(entries) and entries[0] == start
        if entries and not self.resumed:
            progress.note(
                "the interrupted merge had another recipe, other inputs or another "
                "version; starting from the beginning"
            )
        self._entries = entries[1:] if self.resumed else []
        if not self.resumed:
            folder.clear()
            folder.journal(start)

    def statistics(self, name: str) -> Info | None:
        for entry in self._entries:
            if entry.get("statistics") == name:
                return {
                    key: np.frombuffer(bytes.fromhex(text), dtype).reshape(shape)
                    for key, (dtype, shape, text) in entry["values"].items()
                }
        return None

    def keep_statistics(self, name: str, info: Info) -> Info:
        values = {
            key: (value.dtype.str, list(value.shape), value.tobytes().hex())
            for key, value in info.items()
        }
        self._folder.journal({"statistics": name, "values": values})
        return info

    def tensors(self) -> dict[str, dict[str, Any]]:
        return {e["tensor"]: e for e in self._entries if "tensor" in e}

    def keep_tensor(self, name: str, checksum: str, inputs: list[str]) -> None:
        self._folder.journal({"tensor": name, "checksum": checksum, "inputs": inputs})


class _Recorder(Emit):
    """Writes what is merged and keeps the checksums of what was read and written."""

    def __init__(self, prepared: Prepared, writer: ShardWriter, journal: _Journal):
        self._prepared = prepared
        self._writer = writer
        self._journal = journal
        self._running: dict[int, list[Any]] = {}
        self._input_checksums: dict[int, list[str]] = {}
        self.checksums: dict[int, str] = {}
        for i, item in enumerate(prepared.items):
            if item.size == 0:
                sources = prepared.inputs.tensors[i].sources
                empty = xxhash.xxh3_128().hexdigest()
                self._finish(i, empty, [empty] * len(sources))

    def write(self, item: int, start: int, values: np.ndarray) -> None:
        entry = self._entry(item)
        offset = entry.start + start * entry.dtype.itemsize
        self._writer.write(self._prepared.places[item], offset, values)

    def record(
        self, item: int, start: int, values: np.ndarray, inputs: list[np.ndarray]
    ) -> None:
        parts = [values, *inputs]
        running = self._running.setdefault(item, [xxhash.xxh3_128() for _ in parts])
        for checksum, part in zip(running, parts, strict=True):
            checksum.update(part.view(np.uint8))
        if start + len(values) == self._prepared.items[item].size:
            digests = [c.hexdigest() for c in self._running.pop(item)]
            name = self._prepared.inputs.tensors[item].name
            self._finish(item, digests[0], digests[1:])
            self._journal.keep_tensor(name, digests[0], digests[1:])

    def recover(self) -> int:
        """Takes over the journalled tensors whose bytes are still what was written."""
        known = self._journal.tensors()
        count = 0
        for i, tensor in enumerate(self._prepared.inputs.tensors):
            entry = known.get(tensor.name)
            if entry is not None and self._checksum_on_disk(i) == entry["checksum"]:
                self._finish(i, entry["checksum"], entry["inputs"])
                count += 1
        return count

    def input_checksums(self) -> list[str | None]:
        """Per checkpoint, one checksum over those of the tensors read from it."""
        checkpoints = self._prepared.checkpoints
        lines: list[list[str]] = [[] for _ in checkpoints]
        for i, digests in self._input_checksums.items():
            tensor = self._prepared.inputs.tensors[i]
            copied = not tensor.merged and len(digests) == 1
            first = 0 if copied else len(checkpoints) - len(digests)
            for place, digest in enumerate(digests, start=first):
                lines[place].append(f"{tensor.name} {digest}\n")
        return [
            xxhash.xxh3_128("".join(sorted(own)).encode()).hexdigest() if own else None
            for own in lines
        ]

    def _finish(self, item: int, checksum: str, inputs: list[str]) -> None:
        self.checksums[item] = checksum
        self._input_checksums[item] = inputs

    def _entry(self, item: int) -> Any:
        shard = self._prepared.shards[self._prepared.places[item]]
        return shard.entries[self._prepared.inputs.tensors[item].name]

    def _checksum_on_disk(self, item: int) -> str:
        entry = self._entry(item)
        checksum = xxhash.xxh3_128()
        block = np.empty(8 << 20, np.uint8)
        for offset in range(entry.start, entry.stop, len(block)):
            part = block[: min(len(block), entry.stop - offset)]
            self._writer.read(self._prepared.places[item], offset, part)
            checksum.update(part)
        return checksum.hexdigest()
