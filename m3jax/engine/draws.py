"""The numbers of one merge: all that a seed and a recipe's numbers decide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from m3jax import mixup, prng
from m3jax.engine.jobs import Job
from m3jax.engine.kernel import Numbers
from m3jax.methods.fields import Number, Weights
from m3jax.methods.step import Step, namespace
from m3jax.recipe import values


def tables(
    job: Job,
    names: Sequence[str],
    num_models: int,
    key: Any,
    ratios: Callable[[], Any],
) -> Numbers:
    """Tables of the parameters of a recipe's steps over N tensors, and the mask keys.

    Args:
      job: whose numbers they are. Tensors of other jobs have no numbers that count.
      names: of all tensors.
      num_models: K.
      key: a seed, or a key of `jax.random`.
      ratios: gives M3's ratios by group, None where it is off. Asked when the weights
        are: drawing them may go on in the background.
    """

    recipe = job.recipe

    def weights(step: Any, field: Weights) -> Any:
        equal = (field.equal(num_models),) * num_models
        if recipe.mixup.on:
            granularity = recipe.mixup.granularity
            return mixup.coefficients(ratios(), names, granularity, equal)
        given = equal if step.weights is None else step.weights
        xp = namespace([given])
        return values.table(given, field, names, num_models, xp, job.places)

    def table(step: Step, name: str, field: Number) -> Any:
        if isinstance(field, Weights):
            return lambda: weights(step, field)
        value = getattr(step, name)
        xp = namespace([value])
        return values.table(value, field, names, num_models, xp, job.places)

    p = tuple(
        {
            name: table(step, name, field)
            for name, field in step.fields().items()
            if isinstance(field, Number)
        }
        for step in recipe.steps
    )
    keys = None
    if job.program.draws():
        keys = prng.mask_keys(prng.root_key(key), num_models, list(names))
    return Numbers(p, (), keys)


def early(numbers: Numbers, num_models: int, count: int) -> Numbers:
    """The numbers with zeros for tables that are not there yet: to compile with."""
    zeros = np.zeros((num_models, count))
    p = tuple(
        {name: zeros if callable(own) else own for name, own in step.items()}
        for step in numbers.p
    )
    return numbers._replace(p=p)
