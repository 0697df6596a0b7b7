"""Models that are put together of blocks of others.

program = m3jax.search.dis_program(selected, order, scales)
params, scales = m3jax.programs.apply(base, [maths, code], program)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from m3jax.checkpoints.errors import shown
from m3jax.checkpoints.formats import tree
from m3jax.search.pytrees import is_embedding, num_layers, place_of

BASE = -1  # the model of a block that is the base's


class Block(NamedTuple):
    """Block `layer` of a model, and what multiplies the hidden state after it."""

    model: int
    layer: int
    scale: float = 1.0


class Child(NamedTuple):
    """What a program makes.

    Attributes:
      params: nested dicts whose blocks are numbered from 0.
      scales: (blocks,), of the hidden state after each block, its residual included.
        They are no weights: the child's own code has to apply them, from its config.
    """

    params: dict[str, Any]
    scales: list[float]


def apply(base: Any, models: Sequence[Any], program: Sequence[Sequence[Any]]) -> Child:
    """The model of the blocks that a program lists, in its order.

    Child block i is block layer_i of model_i, bit for bit. Embeddings are those of the
    first block's model, the head, the last norm and whatever else lies outside the
    blocks those of the last one's; of the base where the program is empty (ours).
    Agrees with `MergeUtils` of Guinan-Su/auto-merge-llm.

    Args:
      base: the pytree of model −1.
      models: K pytrees of nested dicts. The first number in a tensor's name is that of
        its block.
      program: (model, layer) or (model, layer, scale) each, as of
        `m3jax.search.dis_program` or of the blocks of `m3jax.search.rmm_step`.

    Raises:
      ValueError: there is no such model, it has no such block, or blocks of several
        stacks, such as an encoder and a decoder.
      CheckpointError: the names of the child's tensors do not fit each other.
    """
    blocks = [Block(*entry) for entry in program]
    flat = [tree.flatten(params)[0] for params in (*models, base)]  # base is [-1]
    for i, block in enumerate(blocks):
        if not BASE <= block.model < len(models):
            raise ValueError(
                f"program[{i}] names model {block.model}; there are {len(models)}, "
                "from 0, and the base, -1"
            )
        stacks = {p.before for p in map(place_of, flat[block.model]) if p is not None}
        if len(stacks) > 1:
            raise ValueError(
                f"model {block.model} has blocks in {sorted(stacks)}: give each stack, "
                "such as an encoder, a program of its own"
            )
        count = num_layers(flat[block.model])
        if not 0 <= block.layer < count:
            raise ValueError(
                f"program[{i}] names block {block.layer} of model {block.model}, which "
                f"has {count} blocks"
            )
    child: dict[str, Any] = {}
    first, last = (blocks[i].model if blocks else BASE for i in (0, -1))
    for model, embeddings in ((first, True), (last, False)):
        for name, leaf in flat[model].items():
            if place_of(name) is None and is_embedding(name) is embeddings:
                child[name] = leaf
    for i, block in enumerate(blocks):
        for name, leaf in flat[block.model].items():
            place = place_of(name)
            if place is not None and place.layer == block.layer:
                renumbered = f"{place.before}{i}{place.after}"
                assert renumbered not in child, shown(renumbered)
                child[renumbered] = leaf
    return Child(tree.nest(child), [float(block.scale) for block in blocks])
