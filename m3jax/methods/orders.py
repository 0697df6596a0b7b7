"""Order statistics by rank over a whole model, signed ones too."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping
from typing import Any

import numpy as np

from m3jax.lazy import jnp
from m3jax.methods.selection import kth_smallest
from m3jax.methods.step import Problem, Reduction


def magnitudes_at(
    values: Any, arguments: Mapping[str, Any], ranks: Any, problem: Problem
) -> Generator[Reduction, Any, Any]:
    """The magnitude of rank r, 1 the smallest and n the largest, of J rows each.

    Args:
      values: (operands, arguments) -> (J, ...) float32; a function of a module.
      arguments: arrays () or (I,) that `values` reads; not ``low`` and ``shift``, which
        are of the window.
      ranks: (J,), at least 1 each.
      problem: the group.

    Yields:
      The reading passes of `selection.kth_smallest`.

    Returns:
      (J,) float32.
    """
    rates = (np.asarray(ranks) + 0.5) / max(
        problem.size, 1
    )  # int(n · rate) is the rank
    rows = dataclasses.replace(problem, num_models=len(rates))
    search = kth_smallest(values, rates, rows)
    answer = None
    while True:
        try:
            asked = search.send(answer)
        except StopIteration as stop:
            return stop.value
        every = {**arguments, **asked.arguments}
        answer = yield dataclasses.replace(asked, arguments=every)


def halves(values: Any) -> Any:
    """The positive parts, then the negated negative ones: (2 J, ...) of (J, ...)."""
    zero = jnp.zeros((), values.dtype)
    return jnp.concatenate([jnp.maximum(values, zero), jnp.maximum(-values, zero)])


def signed(found: Any) -> Any:
    """The value of rank r from its half's magnitude of rank r and the other's of
    n − r + 1: one of them is 0 unless the value is."""
    above, below = found[: len(found) // 2], found[len(found) // 2 :]
    return (jnp if not isinstance(found, np.ndarray) else np).where(
        above > 0, above, -below
    )
