"""What a merging method is: parameters, statistics it asks for, one rule per element.

A merge is a row of transforms (DARE, …) and a method behind them. Each is a `Step`: a
frozen dataclass that owns its parameters and is found by its registration. Nothing
here knows a file, a tensor's name, a chunk or a device, so that one kernel applies a
step wherever the arrays are.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar, dataclass_transform

import numpy as np

from m3jax.lazy import jax, jnp
from m3jax.methods.fields import (
    Choice,
    Field,
    Weights,
    choice,
    number,
    scaling,
    share,
    switch,
    weights,
)
from m3jax.traced import is_traced

S = TypeVar("S", bound="type[Step]")
Numbers = Mapping[str, Any]  # arrays by the name of a parameter or a finding
Info = dict[str, Any]  # what a step's statistics found: arrays () or (K,) by name
Statistics = Generator["Reduction", Any, Info]

UNITS = ("element", "row", "matrix")


class Operands(NamedTuple):
    """One part of one tensor, in float32 (float64 where an input is float64).

    Attributes:
      base: θ0, (...); None where no step reads it.
      models: θ_i, (K, ...).
      beside: what comes beside each model, (K, ...) by name: "fisher", "gram".
    """

    base: Any
    models: Any
    beside: Mapping[str, Any] = {}

    @property
    def deltas(self) -> Any:
        """The task vectors τ_i = θ_i − θ0, (K, ...)."""
        return self.models - self.base[None]


@dataclasses.dataclass(frozen=True)
class Reduction:
    """A reading pass that a step asks for.

    Attributes:
      function: (operands, arguments) -> a tuple of arrays whose last axes are those
        of the operands' parts: one number for each element; (J, ...) may be a list of J
        arrays. Hashable: a function of a module, or a frozen dataclass with `__call__`.
      arguments: arrays () or (J,) by name; `function` gets them ready to broadcast.
      combine: for each array of the tuple, what the engine makes of it over a group.
        ``sum``: of integers of at most 2**20, exact, as int64. ``max``. ``histogram``:
        of uint16 codes, counted up to `selection.BINS`. ``values``: the numbers
        themselves, (J, n) in any order, if the problem has `few`. ``float``: a plain
        float32 sum, under a transformation of the caller's alone, where int64 may be
        missing.
      sample: a pass over a fixed sample of the elements is enough. The engine
        answers None where reading everything costs as little.
    """

    function: Callable[[Operands, Numbers], tuple[Any, ...]]
    arguments: Mapping[str, Any]
    combine: tuple[str, ...] = ("sum",)
    sample: bool = False


@dataclasses.dataclass(frozen=True)
class Problem:
    """The group of tensors that a step's statistics are about.

    Attributes:
      num_models: K.
      size: elements of the group's tensors.
      numbers: the step's parameters, () or (K,) float64 each. Reading one that differs
        between the tensors of the group is an error.
      traced: the arrays are those of a `jax.jit`, `grad` or `vmap` around the merge:
        Python cannot look at what a pass finds.
      few: the elements are so few that a pass may ask for ``values``.
      at_hand: they lie in memory: a pass that counts little costs little.
    """

    num_models: int
    size: int
    numbers: Numbers
    traced: bool = False
    few: bool = False
    at_hand: bool = False


@dataclasses.dataclass(frozen=True)
class Spec:
    """One tensor that a method makes of one tensor of the models.

    Attributes:
      shape: of it.
      dtype: a NumPy dtype's name; "": as the recipe and the inputs say.
      packed: bools, written as `numpy.packbits` of the flattened tensor.
    """

    shape: tuple[int, ...]
    dtype: str = ""
    packed: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """What transforms and methods have in common.

    Attributes:
      name: in recipes, flags and files; given by `register`.
      unit: what `apply` has to see whole: an ``element``, a ``row`` (all of the last
        axis) or a ``matrix`` (the whole tensor).
      scope: the groups that `measure` is about: each ``tensor``, each ``layer`` or the
        whole ``model``; "": it measures nothing.
      needs_base: whether it reads `Operands.base`.
      beside: names of the operands that come beside the models.
      studies: what others than its authors found, with the source, for who chooses.
    """

    name: ClassVar[str]
    unit: ClassVar[Any] = "element"
    scope: ClassVar[Any] = ""
    needs_base: ClassVar[Any] = True
    beside: ClassVar[tuple[str, ...]] = ()
    studies: ClassVar[str] = ""

    @classmethod
    def fields(cls) -> dict[str, Field]:
        """The parameters by name."""
        return {f.name: f.metadata["field"] for f in dataclasses.fields(cls)}

    @property
    def static(self) -> Step:
        """The step with its words alone, without numbers: what a kernel is for."""
        numbers = {
            name: None
            for name, field in self.fields().items()
            if not isinstance(field, Choice)
        }
        return dataclasses.replace(self, **numbers)

    def measure(self, problem: Problem) -> Statistics:
        """Asks for reading passes over a group, and returns what they find."""
        del problem
        return {}
        yield

    def derive(self, numbers: Numbers, info: Info, xp: Any) -> Info:
        """What `apply` gets as `info`: made once per tensor, in float64 on the host.

        Args:
          numbers: the parameters, (N,) or (K, N), for all N tensors.
          info: what `measure` found, likewise.
          xp: NumPy; `jax.numpy` where a transformation goes through the merge.
        """
        del numbers, xp
        return info


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transform(Step):
    """Changes the models before the method sees them, or afterwards what it has made.

    Attributes:
      after: it is for what the method has made: `finish` in place of `apply`, and
        nothing is measured.
      draws: the random numbers it takes: "", ``mask`` (True where the 16-bit lane of
        an element is below `derive`'s ``threshold``, uint32 per model) or ``lanes``
        (the lanes themselves, uint16).
    """

    after: ClassVar[bool] = False
    draws: ClassVar[Any] = ""

    @property
    def on(self) -> bool:
        """Whether it does anything: no number is missing that has no default."""
        needed = [name for name, own in self.fields().items() if own.default is None]
        return all(getattr(self, name) is not None for name in needed)

    def apply(self, x: Operands, p: Numbers, info: Numbers, draw: Any) -> Operands:
        """The operands with other models; `draw` is (K, ...), or None."""
        raise NotImplementedError

    def finish(self, x: Operands, merged: Any, p: Numbers, info: Numbers) -> Any:
        """The merged part, changed; `x` is what the method has seen."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(Step):
    """Makes one tensor of K.

    Attributes:
      shows_nonfinite: NaN or infinity anywhere in the inputs makes the element NaN or
        infinite, so that a look at the result tells whether the inputs are finite.
      num_models: how many models it merges; None: any number.
      records: what of `info` goes to m3jax.json, found for the whole model.
      weighs_statistics: what `measure` finds depends on the weights or the scaling.
      differentiable: in the weights, with what `measure` finds held fixed, and by
        element, so that `m3jax learn` can learn them.
      beside_repeats: what comes beside the models may have 1 element along an axis.
      by_task: what it makes is turned into a model for each task afterwards, so that
        the output keeps what is excluded of each model, in a file for each.
    """

    shows_nonfinite: ClassVar[bool] = False
    num_models: ClassVar[int | None] = None
    records: ClassVar[tuple[str, ...]] = ()
    weighs_statistics: ClassVar[bool] = False
    differentiable: ClassVar[bool] = False
    beside_repeats: ClassVar[bool] = False
    by_task: ClassVar[bool] = False

    def apply(self, x: Operands, p: Numbers, info: Numbers) -> Any:
        """The merged part, float32; a dict of them if `outputs` names several.

        Args:
          x: the operands.
          p: the parameters. Each broadcasts against a part; those by model have a
            leading axis K and broadcast against `x.models`.
          info: from `derive`, likewise.
        """
        raise NotImplementedError

    def outputs(self, spec: Spec, num_models: int) -> dict[str, Spec]:
        """What is made of a tensor, by part of the output; "" is the model itself."""
        del num_models
        return {"": spec}

    def beside_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what comes beside a tensor of that shape."""
        return shape

    def equal_weights(self, num_models: int) -> tuple[float, ...] | None:
        """The coefficient of each model where nothing is said; None: it has none."""
        field = self.fields().get("weights")
        if not isinstance(field, Weights):
            return None
        return (field.equal(num_models),) * num_models


METHODS: dict[str, type[Method]] = {}
TRANSFORMS: dict[str, type[Transform]] = {}


@dataclass_transform(
    kw_only_default=True,
    frozen_default=True,
    field_specifiers=(number, share, scaling, weights, choice, switch),
)
def register(name: str) -> Callable[[S], S]:
    """Makes a class a step with parameters, known by `name` to everything."""

    def add(cls: S) -> S:
        made: Any = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        made.name = name
        (METHODS if issubclass(made, Method) else TRANSFORMS)[name] = made
        return made

    return add


def run_statistics(
    statistics: Generator[Reduction, Any, Any], answer: Callable[[Reduction], Any]
) -> Any:
    """Drives a generator of statistics; `answer` performs each reading pass."""
    try:
        reduction = next(statistics)
        while True:
            reduction = statistics.send(answer(reduction))
    except StopIteration as stop:
        return stop.value


def namespace(*trees: Any) -> Any:
    """NumPy, or `jax.numpy` where a leaf is an argument of a transformation."""
    return jnp if any_traced(*trees) else np


def any_traced(*trees: Any) -> bool:
    """Whether a leaf of some dicts and tuples is an argument of a transformation."""
    return any(is_traced(leaf) for tree in trees for leaf in _leaves(tree))


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, Mapping):
        return [leaf for child in tree.values() for leaf in _leaves(child)]
    if isinstance(tree, (tuple, list)):
        return [leaf for child in tree for leaf in _leaves(child)]
    return [tree]


def sum_over_models(stack: jax.Array | Sequence[jax.Array]) -> jax.Array:
    """Σ_i stack[i], in order of the models.

    Written out, because the order is then fixed and XLA's CPU backend fuses it with
    what comes before and after: 15 times faster than its reduction over this axis.
    """
    return functools.reduce(operator.add, [stack[i] for i in range(len(stack))])


def rounded_product(values: jax.Array, factors: jax.Array) -> jax.Array:
    """values · factors, for a sum: rounded before it is added to anything.

    XLA contracts a product and the sum it goes into, or does not, depending on the
    shape and on what else stands in the kernel, and a fused multiply-add rounds once
    instead of twice. A select between the two prevents it, so that every kernel gives
    the same bits, which are also NumPy's.
    """
    return jnp.where(jnp.isnan(values), values, values * factors)
