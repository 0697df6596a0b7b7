"""RMM's walk over the blocks of models, arXiv 2503.21272: its states and actions."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Walk(NamedTuple):
    """Where the walk stands.

    Attributes:
      counts: (blocks, models) int64, how often each block was taken; flattened it is
        what the policy observes.
      position: the block to be chosen.
      blocks: what was chosen, as (model, block): a program for `m3jax.programs.apply`.
      done: over; no further action is possible.
      failed: done without a model to evaluate; the reward is then −10.
      steps: actions so far.
      max_steps: how many there may be.
    """

    counts: np.ndarray
    position: int
    blocks: tuple[tuple[int, int], ...]
    done: bool
    failed: bool
    steps: int
    max_steps: int


def rmm_start(
    num_blocks: int, num_models: int, *, max_steps: int | None = None
) -> Walk:
    """The state before the first action.

    Args:
      num_blocks: B, of each model. Encoder and decoder are walks of their own: the
        release loses the encoder's length where a walk goes back into it.
      num_models: N.
      max_steps: a walk that is not done after that many has failed. Ours, 100 B by
        default; the release has no limit.

    Raises:
      ValueError: a number is below 1.
    """
    limit = 100 * num_blocks if max_steps is None else max_steps
    if min(num_blocks, num_models, limit) < 1:
        raise ValueError(
            f"num_blocks={num_blocks}, num_models={num_models}, max_steps={limit}: "
            "each needs 1 or more"
        )
    counts = np.zeros((num_blocks, num_models), np.int64)
    return Walk(counts, 0, (), False, False, 0, limit)


def rmm_step(state: Walk, action: int) -> Walk:
    """The state after an action.

    j < N takes the block at the position from model j (counts + 1, position + 1); N
    skips it (position + 1); N + 1 goes back (position − 1; blocks stay, so that the
    model grows deeper). Position B is the end, and what was chosen is evaluated, even
    if that is nothing; below 0 the walk has failed. Agrees with `Env_CV` of
    WuDiHJQ/Reinforced-Model-Merging, commit 7b940fe.

    Raises:
      ValueError: the walk is done, or there is no such action.
    """
    num_blocks, num_models = state.counts.shape
    if state.done:
        raise ValueError("the walk is done; begin another with rmm_start")
    if not 0 <= action <= num_models + 1:
        raise ValueError(f"action={action} needs 0 to {num_models + 1}")
    counts, position, blocks = state.counts, state.position, state.blocks
    if action < num_models:
        counts = counts.copy()
        counts[position, action] += 1
        blocks = (*blocks, (int(action), position))
    position += -1 if action == num_models + 1 else 1
    steps = state.steps + 1
    arrived = position == num_blocks
    failed = position < 0 or (not arrived and steps >= state.max_steps)
    return Walk(
        counts, position, blocks, arrived or failed, failed, steps, state.max_steps
    )
