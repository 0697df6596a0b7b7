"""Runs a model over many token sequences, in batches of like length."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from m3jax.models.config import Config
from m3jax.models.generation import Sampling, generate
from m3jax.models.layers import Parameters
from m3jax.models.likelihood import token_scores

_SHORTEST = 16  # slots; below it nothing is gained
_FEWEST = 8  # rows, so that small budgets share a shape


class Scored(NamedTuple):
    """log p(completion | context) in nats; whether it is what greedy decoding gives."""

    log_likelihood: float
    greedy: bool


def log_likelihoods(
    parameters: Parameters,
    contexts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    config: Config,
    tokens_per_batch: int,
    dtype: Any = None,
) -> list[Scored]:
    """Scores each completion behind its context.

    Args:
      parameters: nested dict of arrays.
      contexts, completions: tokens; none of them empty.
      config: of the model.
      tokens_per_batch: bound of a batch, padding included.
      dtype: of the matrix products; None: the parameters' own.
    """
    whole = [
        [*context, *completion]
        for context, completion in zip(contexts, completions, strict=True)
    ]
    batches = plan_batches([len(tokens) for tokens in whole], tokens_per_batch)
    pending = [
        token_scores(parameters, *pad(whole, batch), config=config, dtype=dtype)
        for batch in batches
    ]
    found = [Scored(math.nan, False)] * len(whole)
    for batch, scores in zip(batches, pending, strict=True):
        values = np.asarray(scores.log_likelihood, np.float64)
        greedy = np.asarray(scores.greedy)
        for row, member in enumerate(batch.members):
            # The score of token t + 1 stands at t.
            part = slice(len(contexts[member]) - 1, len(whole[member]) - 1)
            total = float(values[row, part].sum())
            found[member] = Scored(total, bool(greedy[row, part].all()))
    return found


def continuations(
    parameters: Parameters,
    prompts: Sequence[Sequence[int]],
    *,
    config: Config,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...],
    sampling: Sampling,
    key: jax.Array,
    tokens_per_batch: int,
    dtype: Any = None,
) -> list[list[int]]:
    """Continues each prompt.

    Args:
      parameters: nested dict of arrays.
      prompts: tokens; none of them empty.
      config, max_new_tokens, stop_tokens, sampling: as for `generation.generate`.
      key: prompt i is sampled with ``fold_in(key, i)``, whatever its batch.
      tokens_per_batch: bound of a batch, padding and new tokens included.
      dtype: of the matrix products; None: the parameters' own.

    Returns:
      The new tokens of each, with the stop token if there was one.
    """
    lengths = [len(prompt) for prompt in prompts]
    batches = plan_batches(lengths, tokens_per_batch, extra=max_new_tokens)
    keys_of = jax.vmap(lambda member: jax.random.fold_in(key, member))
    pending = []
    for batch in batches:
        members = np.zeros(batch.rows, np.uint32)
        members[: len(batch.members)] = batch.members
        generated = generate(
            parameters,
            *pad(prompts, batch),
            config=config,
            max_new_tokens=max_new_tokens,
            stop_tokens=stop_tokens,
            sampling=sampling,
            key=keys_of(members),
            dtype=dtype,
        )
        pending.append(generated)
    found: list[list[int]] = [[] for _ in prompts]
    for batch, generated in zip(batches, pending, strict=True):
        tokens, counts = np.asarray(generated.tokens), np.asarray(generated.lengths)
        for row, member in enumerate(batch.members):
            found[member] = tokens[row, : counts[row]].tolist()
    return found


@dataclasses.dataclass(frozen=True)
class Batch:
    """Sequences that are run together.

    Attributes:
      members: their indices; the rows behind them are padding.
      rows, slots: the shape.
    """

    members: tuple[int, ...]
    rows: int
    slots: int


def plan_batches(
    lengths: Sequence[int], tokens_per_batch: int, extra: int = 0
) -> list[Batch]:
    """Batches of every sequence once, long ones first.

    Shapes are powers of two, and one and a half times those: few, because each is a
    compilation, and little of them is padding. Long batches come first, so that a
    lack of memory shows at once.

    Args:
      lengths: tokens of each sequence.
      tokens_per_batch: bound of rows × (slots + extra), unless one row exceeds it.
      extra: slots that each row needs beside its own.
    """
    by_slots: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        by_slots.setdefault(round_up(max(length, _SHORTEST)), []).append(i)
    batches = []
    for slots, members in sorted(by_slots.items(), reverse=True):
        most = 1 << (max(1, tokens_per_batch // (slots + extra)).bit_length() - 1)
        rows = min(most, max(_FEWEST, 1 << (len(members) - 1).bit_length()))
        for start in range(0, len(members), rows):
            part = tuple(members[start : start + rows])
            batches.append(Batch(part, rows, slots))
    return batches


def pad(
    sequences: Sequence[Sequence[int]], batch: Batch
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (rows, slots) int32, padded on the right by 0, and which are valid."""
    tokens = np.zeros((batch.rows, batch.slots), np.int32)
    valid = np.zeros((batch.rows, batch.slots), bool)
    for row, member in enumerate(batch.members):
        sequence = sequences[member]
        tokens[row, : len(sequence)] = sequence
        valid[row, : len(sequence)] = True
    return tokens, valid


def up_to_depth(layers: Sequence[int]) -> list[int]:
    """The layers of a model, and the last again up to one of few depths."""
    return [*layers, *[layers[-1]] * (round_up(len(layers)) - len(layers))]


def round_up(length: int) -> int:
    """The next power of two, or one and a half times one."""
    power = 1 << (length - 1).bit_length()
    return power * 3 // 4 if length <= power * 3 // 4 else power
