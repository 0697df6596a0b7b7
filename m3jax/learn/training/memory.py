"""What a run takes of memory, found from headers, shapes and the compiled program."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.engine.progress import size
from m3jax.learn.gradient import tensors as stores
from m3jax.learn.gradient.pullback import Merge
from m3jax.learn.training import learner, objectives
from m3jax.learn.training.config import Config
from m3jax.learn.training.loop import Descent
from m3jax.learn.training.sources import Texts, read_tasks


def needed(
    base: Any,
    models: Sequence[Any],
    config: Config,
    *,
    tasks: Sequence[str | Path],
    streamed: bool = False,
    mesh: Mapping[str, int] | None = None,
) -> str:
    """The lines that --dry_run prints; no tensor is read.

    Bytes of the whole run: with a mesh each device has about its share of those that
    are split. What the backward pass needs is the compiler's own number for one device.
    """
    given = learner.Given(
        base=base, models=models, config=config, tasks=read_tasks(tasks)
    )
    recipe = learner.checked(given, streamed)
    student, objective = learner.speaker(given), given.objective()
    texts = Texts(config, objective, student, 0)
    train = texts.shapes(given.tasks)
    reading = learner.reading(config, recipe)
    with stores.of_files(base, models, reading) as tensors:
        bench: Any = tensors.bench
        descent = Descent(
            merge=Merge(tensors, recipe, 0, config.dtype),
            objective=objective,
            apply=student.apply,
            config=config,
            seed=0,
            tasks=train,
        )
        merged = {
            name: jax.ShapeDtypeStruct(shape, config.dtype)
            for name, shape in tensors.shapes.items()
        }
        fixed = tensors.fixed
        stored = [bench.bytes_of(i) for i in bench.merged]
        elements = [math.prod(shape) for shape in tensors.shapes.values()]
        raw = config.space.start(tensors.shapes, descent.equal)
        state = jax.eval_shape(descent.optimizer_start, raw)
        kept, temporary = _backward(descent, merged, fixed, train, objective)
    model = _bytes(merged)
    working = 4 * max(elements, default=0) * (len(models) + 2)
    rows = {
        "models": (
            f"{size(max(stored, default=0))} of the largest tensor's at a time "
            f"(streamed from {size(sum(stored))} of files)"
            if streamed
            else f"{size(sum(stored))} of base and models"
        ),
        "to merge": f"{size(working)} for the largest tensor, in float32",
        "merged": f"{size(model)} in {config.dtype}",
        "gradient": f"{size(model)}, and as much while a task's is added",
        "coefficients": (
            f"{size(_bytes(raw))} ({config.space.size(tensors.shapes, len(models)):,} "
            f"numbers), {size(_bytes(state))} of {config.optimizer.name}"
        ),
        "backward": f"{size(temporary)} for one batch, by the compiler"
        + " (activations; remat is on)" * config.remat
        + " (activations)" * (not config.remat),
        "teachers": f"{size(kept)} of their outputs, on the host"
        + (", one model at a time before it starts" if texts.needs_experts else ""),
    }
    first = max(stored, default=0) if streamed else sum(stored)
    total = first + working + 3 * model + _bytes(raw) * 2 + _bytes(state) + temporary
    rows["together"] = f"about {size(total)} on devices"
    if mesh is not None:
        count = math.prod(mesh.values())
        share = (total - temporary) / count
        rows["together"] += f"; over {count} devices {size(share + temporary)} on each"
    return "\n".join(f"{name:14}{text}" for name, text in rows.items())


def _backward(
    descent: Descent,
    merged: Any,
    fixed: Any,
    train: Any,
    objective: objectives.Weighted,
) -> tuple[int, int]:
    """Bytes of what is kept of teachers, and of the largest backward pass."""
    kept = temporary = 0
    for task in train:
        batch = dict(task.batches[0])
        if objective.needs_teacher:
            taught = jax.eval_shape(
                lambda m, b: objective.teach(
                    descent.apply(descent.merge.tensors.params(m, fixed), b)
                ),
                merged,
                batch,
            )
            kept += len(task.batches) * _bytes(taught)
            batch |= taught
        weight = jax.ShapeDtypeStruct((), jnp.float32)
        lowered = descent.accumulated.lower(merged, fixed, batch, weight, merged)
        analysis = lowered.compile().memory_analysis()
        temporary = max(temporary, int(getattr(analysis, "temp_size_in_bytes", 0)))
    return kept, temporary


def _bytes(arrays: Any) -> int:
    return sum(
        math.prod(own.shape) * np.dtype(own.dtype).itemsize
        for own in jax.tree.leaves(arrays)
    )
