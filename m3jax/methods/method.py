"""What a merging method is: statistics over the whole model, then one rule per entry.

None of its functions knows a file, a name, a chunk or a device. `base` is one tensor
or a part of one, in float32; `stack` holds the K models on its leading axis and
broadcasts against `base` behind it. `coefficients` has the same leading axis K and
broadcasts against the stack.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Generator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")
Info = dict[str, Any]  # small arrays by name: what the statistics found
Statistics = Generator["Reduction", Any, Info]


@dataclasses.dataclass(frozen=True)
class Reduction:
    """A reading pass that a method asks for.

    Attributes:
      function: (base, stack, valid, arguments) -> pytree of int32 counts, where
        `valid` is a bool array of base's shape: count only where it is True. Counts
        are added up over chunks, tensors and hosts as int64.
      arguments: a pytree of arrays handed to `function`.
      histogram: `function` returns a tuple: first codes, of which the engine makes a
        histogram where that is fastest, then any number of arrays of counts.
      sample: a pass over a fixed sample of the elements is enough. The engine
        answers None where reading everything costs as little.
    """

    function: Callable[[Any, jax.Array, jax.Array, Any], Any]
    arguments: Any
    histogram: bool = False
    sample: bool = False


@dataclasses.dataclass(frozen=True)
class Method:
    """A merging method.

    Attributes:
      apply: (base, stack, coefficients, info, scaling) -> merged, elementwise and
        differentiable in the coefficients.
      default_coefficient: K -> the coefficient of each model without M3.
      needs_base: whether `apply` reads `base`; otherwise it may be None.
      shows_nonfinite: NaN or infinity anywhere in the inputs makes the entry NaN or
        infinite, so that a look at the result tells whether the inputs are finite.
      statistics: (K, number of elements, trim rate) -> a generator that yields the
        `Reduction`s it needs, receives their sums, and returns `info`.
    """

    apply: Callable[..., jax.Array]
    default_coefficient: Callable[[int], float]
    needs_base: bool
    shows_nonfinite: bool = False
    statistics: Callable[[int, int, float], Statistics] | None = None

    def default_coefficients(self, num_models: int) -> tuple[float, ...]:
        return (self.default_coefficient(num_models),) * num_models


def run_statistics(
    statistics: Generator[Reduction, Any, T], answer: Callable[[Reduction], Any | None]
) -> T:
    """Drives a statistics generator; `answer` performs each reading pass."""
    try:
        reduction = next(statistics)
        while True:
            reduction = statistics.send(answer(reduction))
    except StopIteration as stop:
        return stop.value


def sum_over_models(stack: jax.Array) -> jax.Array:
    """Σ_i stack[i], in order of the models.

    Written out, because the order is then fixed and XLA's CPU backend fuses it with
    what comes before and after: 15 times faster than its reduction over this axis.
    """
    return functools.reduce(operator.add, [stack[i] for i in range(stack.shape[0])])


def rounded_product(values: jax.Array, factors: jax.Array) -> jax.Array:
    """values · factors, for a sum: rounded to float32 before it is added to anything.

    XLA contracts a product and the sum it goes into, or does not, depending on the
    shape and on what else stands in the kernel, and a fused multiply-add rounds once
    instead of twice. A select between the two prevents it, so that every kernel gives
    the same bits, which are also NumPy's.
    """
    return jnp.where(jnp.isnan(values), values, values * factors)
