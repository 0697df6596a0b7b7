"""What a merge has to know of the models before it merges: reading passes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from m3jax.engine import plan
from m3jax.engine.journal import Journal
from m3jax.engine.prepare import Prepared
from m3jax.engine.progress import Progress
from m3jax.engine.share import Share
from m3jax.engine.streamed import Stream
from m3jax.engine.tables import TileTables
from m3jax.methods import METHODS, dare
from m3jax.methods.method import Info, Reduction, run_statistics
from m3jax.prng import RATE_STEPS, drop_thresholds

# A sample of 4 Mi elements finds a threshold to within a tenth of a histogram's
# window; it is worth its reads only if reading everything takes far longer.
_SAMPLE_TILES = 4096
_SAMPLE_PAYS = 16  # times the sample


def dare_tables(
    prepared: Prepared,
    share: Share,
    stream: Stream,
    journal: Journal,
    progress: Progress,
) -> TileTables:
    """The per-tensor numbers, DARE's included; by magnitude they take passes."""
    rates = prepared.recipe.dare.rates(len(prepared.models))
    if rates is None:
        return TileTables()
    rescale, target = prepared.recipe.dare.rescale, prepared.recipe.dare.target
    if prepared.transform.strategy == "random":
        drop = drop_thresholds(rates)
        kept = 1 - drop / RATE_STEPS
        return TileTables(
            keys=prepared.mask_keys(),
            drop=drop,
            scales=dare.rescale_factors(kept, rescale=rescale),
        )
    saved = journal.statistics("magnitudes")
    if saved is None:
        thresholds = np.zeros((len(rates), len(prepared.items)), np.float32)
        positions = share.merged(prepared)
        progress.stage("measuring magnitudes", 2 * prepared.read_bytes(positions))
        plain = dataclasses.replace(prepared.transform, strategy=None)
        for i in positions:
            chunks = plan.cut(prepared.items, [i], prepared.tiles)

            def answer(reduction: Reduction, chunks: list[plan.Chunk] = chunks) -> Any:
                if reduction.sample:
                    return None
                return stream.reduce(chunks, reduction, plain)

            found = dare.magnitude_thresholds(
                rates, prepared.items[i].size, target=target
            )
            thresholds[:, i] = run_statistics(found, answer)
        # Each column is one process's, and 0 everywhere else.
        total = share.processes.sum(thresholds)
        saved = journal.keep_statistics("magnitudes", {"thresholds": total})
    kept = 1 - np.array(rates)
    return TileTables(
        drop=saved["thresholds"],
        scales=dare.rescale_factors(kept, rescale=rescale),
    )


def method_info(
    prepared: Prepared,
    share: Share,
    stream: Stream,
    journal: Journal,
    progress: Progress,
) -> Info:
    """What the method needs to know of the whole model."""
    method = METHODS[prepared.recipe.method]
    if method.statistics is None:
        return {}
    saved = journal.statistics("method")
    if saved is not None:
        return saved
    size = sum(prepared.items[i].size for i in prepared.merged)
    positions = share.merged(prepared)
    generator = method.statistics(len(prepared.models), size, prepared.recipe.trim_rate)
    passes = 0

    def answer(reduction: Reduction) -> Any:
        nonlocal passes
        if reduction.sample:
            if size < _SAMPLE_PAYS * _SAMPLE_TILES * plan.TILE:
                return None
            wanted = -(-_SAMPLE_TILES // share.processes.count)
            chunks = plan.sample(prepared.items, positions, prepared.tiles, wanted)
        else:
            passes += 1
            progress.stage(f"measuring, pass {passes}", prepared.read_bytes(positions))
            chunks = plan.cut(prepared.items, positions, prepared.tiles)
        counts = stream.reduce(chunks, reduction, prepared.transform)
        return share.processes.sum(counts)

    return journal.keep_statistics("method", run_statistics(generator, answer))
