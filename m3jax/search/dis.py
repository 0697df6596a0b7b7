"""DIS of "Fine, I'll Merge It Myself", arXiv 2502.04030: which blocks in a row."""

from __future__ import annotations

import math
from collections.abc import Sequence

from m3jax.programs import BASE, Block


def dis_program(
    selected: Sequence[Sequence[int]], order: Sequence[int], scales: Sequence[float]
) -> list[Block]:
    """The blocks that a genotype of depth-wise integration stands for.

    Layer by layer the blocks of the selected models, in the order of the permutation
    that `order` says; without any the base's block, model −1. The layer's scale sits on
    its last block, the others have 1. Agrees with `DisMerge` of
    Guinan-Su/auto-merge-llm.

    Args:
      selected: (L, K) of 0 and 1.
      order: (L,) indices into the K! permutations of the models in lexicographic order.
      scales: (L,) of the hidden state after the layer.

    Returns:
      [(model, layer, scale), ...] for `m3jax.programs.apply`. The search of the release
      counts more than 50 as the worst score; so should others.

    Raises:
      ValueError: the lengths differ, an entry is neither 0 nor 1, or an index is
        outside 0 to K! − 1.
    """
    if not len(selected) == len(order) == len(scales):
        raise ValueError(
            f"{len(selected)} rows of selected, {len(order)} of order and "
            f"{len(scales)} scales: one of each per layer is needed"
        )
    program = []
    for layer, (row, index, scale) in enumerate(
        zip(selected, order, scales, strict=True)
    ):
        if len(row) != len(selected[0]) or not set(row) <= {0, 1}:
            raise ValueError(
                f"selected[{layer}]={list(row)} needs {len(selected[0])} entries of 0 "
                "or 1"
            )
        models = [k for k in _permutation(len(row), int(index), layer) if row[k]]
        models = models or [BASE]
        program += [Block(k, layer, 1.0) for k in models[:-1]]
        program.append(Block(models[-1], layer, float(scale)))
    return program


def _permutation(count: int, index: int, layer: int) -> list[int]:
    """The index-th permutation of 0, ..., count − 1 in lexicographic order."""
    if not 0 <= index < math.factorial(count):
        raise ValueError(
            f"order[{layer}]={index} needs 0 to {math.factorial(count) - 1}: there are "
            f"{count} models"
        )
    left, chosen = list(range(count)), []
    for remaining in reversed(range(count)):
        place, index = divmod(index, math.factorial(remaining))
        chosen.append(left.pop(place))
    return chosen
