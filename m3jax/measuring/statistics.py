"""Fisher information and Gram matrices of a checkpoint, from its files to files."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3jax import prng
from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.formats import tree
from m3jax.checkpoints.places.files import Location
from m3jax.engine.progress import Progress
from m3jax.evaluation.tasks.task import Task
from m3jax.learn.information import KINDS, zeros_like
from m3jax.measuring import fisher as fisher_information
from m3jax.measuring import gram
from m3jax.measuring.accumulate import Accumulation, accumulate
from m3jax.measuring.texts import Batch, Question, batches, questions
from m3jax.models.config import Config
from m3jax.models.parameters import Model, load_model
from m3jax.models.tokenizer import Tokenizer


def measure_fisher(
    name: str,
    tasks: Sequence[Task],
    output: str | PathLike[str],
    *,
    kind: str = "sampled",
    samples: int = 1,
    seed: int = 0,
    limit: int | None = None,
    tokens_per_batch: int = 4096,
    resume: bool = False,
    progress: Progress | None = None,
) -> Location:
    """Writes the diagonal of a model's Fisher information, for `fisher` and `df_merge`.

    F = the mean over the tasks' examples of Σ_c q_c (∂s_c)², float32, one tensor for
    each of the model's; see `fisher.add` for the kinds. The square is taken of each
    example's gradient. Memory: the parameters, F and the gradients in hand, all
    float32.

    Args:
      name: the checkpoint.
      tasks: of kinds loss, choice, exact_match or numeric.
      output: the folder to make.
      kind: ``exact``, ``sampled`` or ``empirical``.
      samples: draws per example, of ``sampled``.
      seed: of the draws.
      limit: only the first examples of each task.
      tokens_per_batch: padding included.
      resume: go on with what an interrupted run has kept.
      progress: is told the examples.

    Raises:
      ValueError: another kind, or no draws.
      CheckpointError, TaskError: the model, a task or the output cannot be used.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} needs one of {', '.join(KINDS)}")
    if samples < 1:
        raise ValueError(f"samples={samples} needs 1 or more")
    prng.check_seed(seed)
    model, parameters, asked = _opened(name, tasks, limit)
    leaves, structure = tree.flatten(parameters)
    names = list(leaves)

    def add(state: dict[str, Any], batch: Batch) -> dict[str, Any]:
        found = _with_batch(
            structure(state[n] for n in names),
            parameters,
            asked,
            batch,
            jax.random.key(seed),
            config=model.config,
            kind=kind,
            samples=samples,
        )
        return tree.flatten(found)[0]

    drawn = {"samples": samples, "seed": seed} if kind == "sampled" else {}
    return accumulate(
        Accumulation(
            start=lambda: {
                n: jnp.zeros(x.shape, jnp.float32) for n, x in leaves.items()
            },
            add=add,
            batches=batches(asked, tokens_per_batch),
            count=_count,
            finish=lambda state: {n: x / len(asked) for n, x in state.items()},
            record=_record("fisher", name, tasks, asked, kind=kind, **drawn),
            inputs=_files(model),
        ),
        output,
        resume=resume,
        progress=progress,
    )


def fisher_of(
    parameters: Any,
    config: Config,
    asked: Sequence[Question],
    *,
    kind: str,
    key: jax.Array,
    tokens_per_batch: int,
) -> Any:
    """The same in memory: F, a pytree of the floats among the parameters."""
    parameters = _floats(parameters)
    total = zeros_like(parameters)
    for batch in batches(asked, tokens_per_batch):
        total = _with_batch(
            total, parameters, asked, batch, key, config=config, kind=kind, samples=1
        )
    return jax.tree.map(lambda own: own / len(asked), total)


def _with_batch(
    total: Any,
    parameters: Any,
    asked: Sequence[Question],
    batch: Batch,
    key: jax.Array,
    *,
    config: Config,
    kind: str,
    samples: int,
) -> Any:
    """The sum with that of a batch; see `fisher.add`."""
    own = [asked[i] for i in batch.index.tolist() if i >= 0]
    longest = max(len(question.item.completions[0]) for question in own)
    return fisher_information.add(
        total,
        parameters,
        batch,
        key,
        config=config,
        kind=kind,
        samples=samples,
        is_choice=own[0].is_choice,
        # Few shapes, since each is a compilation.
        positions=1 << (longest - 1).bit_length() if kind == "exact" else 1,
        at_once=min(fisher_information.rows_at_once(parameters), len(batch.index)),
    )


def measure_gram(
    name: str,
    tasks: Sequence[Task],
    output: str | PathLike[str],
    *,
    limit: int | None = None,
    tokens_per_batch: int = 4096,
    resume: bool = False,
    progress: Progress | None = None,
) -> Location:
    """Writes the second moments of what goes into each linear layer, for `regmean`.

    G = Σ x xᵀ / tokens, (in, in) float32 by the weight's name, over the tokens of the
    tasks' prompts with their right answers; padding does not count. Products are
    float32 at the highest precision. Memory: the parameters in float32 and all G.

    Args:
      name, tasks, output, limit, tokens_per_batch, resume, progress: as for
        `measure_fisher`.

    Raises:
      CheckpointError, TaskError: the model, a task or the output cannot be used.
    """
    model, parameters, asked = _opened(name, tasks, limit)
    start = gram.start(parameters, model.config)
    if not start:
        raise CheckpointError(
            f"{name}: {model.config.family} stores its linear weights (in, out); "
            "regmean takes Gram matrices of weights (out, in) alone"
        )
    tokens = sum(len(question.whole[question.correct]) for question in asked)
    return accumulate(
        Accumulation(
            start=lambda: start,
            add=lambda state, batch: gram.add(
                state, parameters, batch, config=model.config
            ),
            batches=batches(asked, tokens_per_batch),
            count=_count,
            finish=lambda state: {n: x / tokens for n, x in state.items()},
            record=_record("gram", name, tasks, asked, tokens=tokens),
            inputs=_files(model),
        ),
        output,
        resume=resume,
        progress=progress,
    )


def _opened(
    name: str, tasks: Sequence[Task], limit: int | None
) -> tuple[Model, dict[str, Any], list[Question]]:
    """The model, its parameters in float32, and what it is asked.

    Leaves that are no floats (masks) are left out: no forward pass reads them.
    """
    model = load_model(name)
    tokenizer = Tokenizer(model.folder)
    asked = questions(tasks, tokenizer, model.config.max_position_embeddings, limit)
    return model, _floats(model.parameters), asked


def _floats(parameters: Any) -> dict[str, Any]:
    """The leaves that are floats, as float32."""
    leaves, _ = tree.flatten(parameters)
    floats = {
        n: jnp.asarray(x, jnp.float32)
        for n, x in leaves.items()
        if jnp.issubdtype(x.dtype, jnp.floating)
    }
    return tree.nest(floats)


def _count(batch: Batch) -> int:
    return int(np.count_nonzero(batch.index >= 0))


def _record(
    what: str,
    name: str,
    tasks: Sequence[Task],
    asked: Sequence[Question],
    **more: Any,
) -> dict[str, Any]:
    import m3jax

    return {
        "m3jax": m3jax.__version__,
        "measured": what,
        "model": name,
        "tasks": [task.name for task in tasks],
        "examples": len(asked),
        **more,
    }


def _files(model: Model) -> list[tuple[str, int, int]]:
    """Which files the model is, by their sizes and times."""
    stats = [(path.name, path.stat()) for path in sorted(model.folder.iterdir())]
    return [(name, own.st_size, own.st_mtime_ns) for name, own in stats]
