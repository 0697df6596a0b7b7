"""Everything about a merge that is known before the first element is read."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax

from m3jax import mixup, prng
from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.folder import Checkpoint, open_checkpoint
from m3jax.checkpoints.places.files import Location
from m3jax.checkpoints.record import companions
from m3jax.checkpoints.side_files import check_side_files
from m3jax.engine import differences, plan
from m3jax.engine.buffers import buffer_bytes
from m3jax.engine.by_token import by_token
from m3jax.engine.by_token import compared as compare_by_row
from m3jax.engine.execution import Execution
from m3jax.engine.inputs import MergeInputs, MismatchError
from m3jax.engine.lineup import align
from m3jax.engine.output_files import output_files, written_name
from m3jax.engine.prepared import Prepared
from m3jax.engine.tokenizer_files import not_taken, tokenizer_files, tokenizer_owner
from m3jax.engine.vocabulary import is_named
from m3jax.recipe import Recipe
from m3jax.recipe.tokenizer import check_vocabulary

T = TypeVar("T")

# Bytes of one thread's input buffers: large enough that the cost of a kernel call is
# lost in them. On a CPU also small enough to stay in its caches. See benchmarks/.
_BUDGET = 32 << 20
_BUDGET_CPU = 8 << 20


@contextlib.contextmanager
def prepare(
    base: str | None,
    models: Sequence[str] | Checkpoint,
    recipe: Recipe,
    seed: int,
    execution: Execution,
    statistics: Sequence[str] = (),
) -> Iterator[Prepared]:
    """Opens the checkpoints and plans the merge; a context manager.

    Args:
      base, models, recipe, seed, execution, statistics: as for `m3jax.merge`.

    Yields:
      `Prepared`.

    Raises:
      RecipeError, SeedError, CheckpointError: one line each.
    """
    given = [models] if isinstance(models, Checkpoint) else models
    recipe.check(num_models=len(given), has_base=base is not None)
    recipe.check_statistics(len(statistics), len(given))
    prng.check_seed(seed)
    known = [own.name if isinstance(own, Checkpoint) else own for own in given]
    check_vocabulary(recipe.vocabulary, [*([] if base is None else [base]), *known])
    with contextlib.ExitStack() as stack:
        opened_base = (
            None if base is None else stack.enter_context(open_checkpoint(base))
        )
        opened = [
            own
            if isinstance(own, Checkpoint)
            else stack.enter_context(open_checkpoint(own, base=base))
            for own in given
        ]
        beside = [stack.enter_context(open_checkpoint(own)) for own in statistics]
        yield _plan(opened_base, opened, beside, recipe, seed, execution)


def _plan(
    base: Checkpoint | None,
    models: list[Checkpoint],
    statistics: list[Checkpoint],
    recipe: Recipe,
    seed: int,
    execution: Execution,
) -> Prepared:
    tokens = by_token(recipe, base, models)
    compared = compare_by_row(recipe, base, models) if tokens is None else tokens
    inputs = align(base, models, recipe, statistics, compared)
    first = models[0] if base is None else base
    owner = tokenizer_owner(recipe, base, models, execution.tokenizer_from, tokens)
    chosen = companions.choose(first, owner, models, not_taken(recipe))
    check_side_files(chosen.owners)  # now, before a long merge begins
    lines = differences.found(
        models if base is None else [base, *models],
        inputs.tensors,
        owner,
        chosen.owners,
        asked=tokens is not None or execution.tokenizer_from is not None,
        speaks=recipe.tokenizer.copy and recipe.tokenizer.chat_template is None,
    )
    if lines and execution.strict:
        raise MismatchError(lines, "refused, since --strict is set")
    tensors = sorted(inputs.tensors, key=lambda t: plan.natural_order(t.name))
    own = [tensor for tensor in tensors if not tensor.file]
    sizes = [math.prod(t.shape) * t.dtype.itemsize for t in own]
    beside = tokenizer_files(
        recipe,
        [first, *models],
        owner,
        chosen.owners,
        execution.tokenizer_from is None,
        tokens,
        _new_rows(inputs, first),
    )
    shards = output_files(tensors, sizes, recipe, execution.output_format, first)
    by_name = {tensor.name: tensor for tensor in tensors}
    order = [name for s in shards for name in s.entries if name in by_name]
    inputs = dataclasses.replace(
        inputs,
        tensors=tuple(by_name[n] for n in order),
        config={**beside.config, **inputs.config},
        notes=tuple(
            dict.fromkeys((*inputs.notes, *lines, *chosen.notes, *beside.notes))
        ),
    )
    holder = {name: i for i, shard in enumerate(shards) for name in shard.entries}
    places = {
        (i, part): holder[written_name(tensor.name, part)]
        for i, tensor in enumerate(inputs.tensors)
        for part in tensor.parts
    }
    items = tuple(
        plan.Item(math.prod(t.shape), t.signature, t.merged, t.shape)
        for t in inputs.tensors
    )
    merged_names = [t.name for t in inputs.tensors if t.merged]
    devices = tuple(execution.devices or jax.local_devices())
    tiles = plan.chunk_tiles(
        execution.chunk_size,
        sum(buffer_bytes(inputs.tensors, items, 1)) // plan.TILE,
        len(devices),
        _BUDGET_CPU if devices[0].platform == "cpu" else _BUDGET,
    )
    # A small model needs no chunk larger than itself.
    whole = sum(-(-item.size // plan.TILE) for item in items)
    tiles = min(tiles, max(len(devices), -(-whole // len(devices)) * len(devices)))
    return Prepared(
        base=base,
        models=tuple(models),
        statistics=tuple(statistics),
        recipe=recipe,
        seed=seed,
        inputs=inputs,
        drawn=_in_background(
            mixup.draw_ratios,
            recipe.mixup,
            recipe.num_inputs(len(models)),
            merged_names,
            seed,
        ),
        items=items,
        shards=tuple(shards),
        places=places,
        tiles=tiles,
        devices=devices,
        execution=execution,
        side_files=chosen.owners,
        other_files={
            **{n: own for n, own in first.made.items() if n not in chosen.owners},
            **beside.files,
        },
        rows="" if tokens is None else tokens.alignment.digest,
    )


def _new_rows(inputs: MergeInputs, first: Checkpoint) -> int | None:
    """Rows of the output's vocabulary, where they are not the first checkpoint's."""
    for tensor in inputs.tensors:
        if is_named(tensor.name) and tensor.name in first.tensors:
            rows = tensor.shape[0]
            return None if rows == first.tensors[tensor.name].shape[0] else rows
    return None


def _in_background(function: Callable[..., T], *arguments: Any) -> Future[T]:
    executor = ThreadPoolExecutor(1)
    future = executor.submit(function, *arguments)
    executor.shutdown(wait=False)
    return future


def check_apart(output: Location, checkpoints: Sequence[Checkpoint]) -> None:
    """Raises CheckpointError if the output is, holds or lies in an input."""
    final: Any = output.resolve()
    for checkpoint in checkpoints:
        location: Any = checkpoint.location.resolve()
        if type(location) is not type(final):
            continue  # one is here, one in a store
        if final.is_relative_to(location) or location.is_relative_to(final):
            raise CheckpointError(
                f"{output}: lies in (or holds) the input {checkpoint.name}; "
                "choose another --output"
            )
