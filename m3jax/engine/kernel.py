"""The one kernel: what a recipe does to arrays, whatever they are parts of.

Both benches call it: tiles of files (`engine.tiles`) and leaves in device memory
(`engine.leaves`). Everything that differs between tensors, draws and models is an
array argument, so a program compiles once for its words and a shape of arrays.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.methods.selection import ABOVE, count_codes
from m3jax.methods.step import UNITS, Method, Operands, Reduction, Step, Transform
from m3jax.recipe import Recipe

WIDTH = 1024  # elements whose integers an int32 can sum up; the columns of a tile


@dataclasses.dataclass(frozen=True)
class Program:
    """What is done to some tensors, in words: numbers are arguments of the kernel."""

    transforms: tuple[Transform, ...]
    method: Method

    @classmethod
    def of(cls, recipe: Recipe) -> Program:
        transforms: Any = tuple(step.static for step in recipe.transforms)
        method: Any = recipe.method.static
        return cls(transforms, method)

    @property
    def steps(self) -> tuple[Step, ...]:
        return (*self.transforms, self.method)

    def before(self, depth: int) -> Program:
        """The first `depth` transforms, whatever comes then: reductions of all methods
        behind them share what is compiled."""
        return Program(self.transforms[:depth], Method())

    def unit(self, depth: int) -> str:
        """What the first `depth` steps have to see whole."""
        whole = depth == len(self.steps)
        seen = [s for s in self.steps[:depth] if whole or not getattr(s, "after", 0)]
        return max((s.unit for s in seen), key=UNITS.index, default="element")

    def draws(self, depth: int | None = None) -> str:
        """The random numbers that the first `depth` transforms take, or ""."""
        return "".join(step.draws for step in self.transforms[:depth])

    def threshold(self, numbers: Numbers) -> Any:
        """(K, N) uint32: the lanes below are masked; zeros for a step of lanes."""
        place = next(i for i, step in enumerate(self.transforms) if step.draws)
        zeros = np.zeros(numbers.keys.shape[:2], np.uint32)
        return numbers.info[place].get("threshold", zeros)


class Numbers(NamedTuple):
    """The numbers of a merge: one carrier from the recipe to the kernel.

    As tables over N tensors each array is (N,), or (K, N) if it differs between the K
    models; `take` makes of them what the kernel gets for a part of a tensor.

    Attributes:
      p: per step, its parameters by name.
      info: per step, what was measured and derived.
      keys: (K, N, 2) uint32, the mask keys; None where nothing is drawn, and in what
        `take` gives.
    """

    p: tuple[Mapping[str, Any], ...]
    info: tuple[Mapping[str, Any], ...] = ()
    keys: Any = None

    def first(self, depth: int) -> Numbers:
        """Those of the first steps, which have no gaps, for a reduction."""
        return Numbers(self.p[:depth], self.info[:depth])


class At(NamedTuple):
    """A step of a program, and the numbers of it and of those before.

    Attributes:
      program: whose step it is.
      depth: its place: so many transforms come before it.
      numbers: tables, with what the steps before have found.
    """

    program: Program
    depth: int
    numbers: Numbers

    @classmethod
    def method(cls, program: Program, numbers: Numbers) -> At:
        """The last step."""
        return cls(program, len(program.transforms), numbers)

    @property
    def step(self) -> Step:
        return self.program.steps[self.depth]

    @property
    def parameters(self) -> Mapping[str, Any]:
        return self.numbers.p[self.depth]

    @property
    def unit(self) -> str:
        """What the transforms before it have to see whole."""
        return self.program.unit(self.depth)

    @property
    def draws(self) -> str:
        """The random numbers that the transforms before it take, or ""."""
        return self.program.draws(self.depth)

    @property
    def threshold(self) -> Any:
        """See `Program.threshold`."""
        return self.program.threshold(self.numbers)


@dataclasses.dataclass(frozen=True)
class Reducing:
    """What a kernel finds in parts of tensors, in words.

    Attributes:
      program: whose transforms are applied first.
      function, combine: of the `Reduction`.
      count: make histograms here; otherwise the codes are returned.
    """

    program: Program
    function: Callable[..., tuple[Any, ...]]
    combine: tuple[str, ...]
    count: bool

    @classmethod
    def of(cls, at: At, reduction: Reduction, *, count: bool) -> Reducing:
        before = at.program.before(at.depth)
        return cls(before, reduction.function, reduction.combine, count)


def take(tables: Any, items: Any, ndim: int, dtype: Any = np.float32) -> Any:
    """The numbers of some tensors, ready to broadcast against parts of them.

    Args:
      tables: a pytree of (N,) and (K, N) arrays.
      items: the tensor's place, or the place of each row of a (T, WIDTH) part, (T,).
      ndim: axes of the part behind those of `items`.
      dtype: of real numbers, and of the 64-bit integers that the host counts; bit
        patterns keep theirs.

    Returns:
      The pytree with (*items.shape, 1, …) and (K, *items.shape, 1, …) arrays.
    """

    def one(table: Any) -> Any:
        values = table[..., items]
        if values.dtype == np.int64 or jnp.issubdtype(values.dtype, jnp.floating):
            values = values.astype(dtype)
        return values.reshape((*values.shape, *(1,) * ndim))

    return jax.tree.map(one, tables)


def merge(
    x: Operands,
    numbers: Numbers,
    draw: Any,
    *,
    program: Program,
    dtypes: tuple[tuple[str, str], ...],
) -> dict[str, jax.Array]:
    """One part of a tensor, merged: the only code that applies a recipe to arrays.

    Args:
      x: base (...) and models (K, ...), of any float dtype.
      numbers: from `take`.
      draw: masks or lanes, (K, ...), of the transform that draws; or None.
      program: what to do.
      dtypes: of each part of the output; the only rounding of the merge goes to it.

    Returns:
      The parts of the output by name; "" is the merged model.
    """
    x = _transformed(_wide(x), numbers, draw, program)
    merged = program.method.apply(x, numbers.p[-1], numbers.info[-1])
    for i, step in enumerate(program.transforms):
        if step.after:
            merged = step.finish(x, merged, numbers.p[i], numbers.info[i])
    parts = merged if isinstance(merged, Mapping) else {"": merged}
    return {part: parts[part].astype(dtype) for part, dtype in dtypes}


def reduce(
    x: Operands,
    numbers: Numbers,
    draw: Any,
    arguments: Any,
    valid: jax.Array,
    how: Reducing,
) -> tuple[jax.Array, ...]:
    """What a `Reduction` finds in one part, for the host to put together.

    Args:
      x, numbers, draw: as for `merge`.
      arguments: of the reduction, ready to broadcast.
      valid: (R, WIDTH) bool, in the order of the part's elements: which are real.
      how: what to find.

    Returns:
      For each array of the function: sums and maxima of each row, (R, ...); a
      histogram (1, K, BINS + 1), or codes (1, K, R, WIDTH); values likewise.
    """
    x = _transformed(_wide(x), numbers, draw, how.program)
    shape = x.models.shape[1:]

    def rows(part: jax.Array) -> jax.Array:
        lead = part.shape[: part.ndim - len(shape)]
        flat = jnp.broadcast_to(part, (*lead, *shape)).reshape(*lead, -1)
        missing = valid.size - flat.shape[-1]
        if missing:
            flat = jnp.pad(flat, (*((0, 0),) * len(lead), (0, missing)))
        return flat.reshape(*lead, *valid.shape)

    parts: list[Any] = [
        [rows(own) for own in part] if isinstance(part, list) else rows(part)
        for part in how.function(x, arguments)
    ]
    combine = how.combine
    found: list[Any] = [None] * len(combine)
    over = [j for j, kind in enumerate(combine) if kind in _OVER_ROWS]
    for j, kind in enumerate(combine):
        if j in over:
            continue
        part = jnp.stack(parts[j]) if isinstance(parts[j], list) else parts[j]
        if kind == "values":
            found[j] = part[None]
        elif kind == "histogram":
            codes = jnp.where(valid, part, jnp.uint16(ABOVE))
            found[j] = count_codes(codes)[None] if how.count else codes[None]
        else:
            real = jnp.where(valid, part, 0)
            found[j] = jnp.moveaxis(jnp.sum(real, -1, dtype=jnp.float32), -1, 0)
    reduced = _over_rows(
        [parts[j] for j in over],
        [combine[j] for j in over],
        valid,
        together=not how.count,
    )
    for j, own in zip(over, reduced, strict=True):
        found[j] = jnp.moveaxis(own, -1, 0)
    return tuple(found)


_OVER_ROWS: Mapping[str, Any] = {"sum": jax.lax.add, "max": jax.lax.max}
_TOGETHER = 12  # reductions in a loop, which the processor's registers hold


def _over_rows(
    parts: list[Any], combine: list[str], valid: jax.Array, *, together: bool
) -> list[jax.Array]:
    """What becomes of the last axis of parts (..., R, WIDTH): a sum or a maximum each.

    `together`: in a loop for all of them. Whatever several reductions share XLA's CPU
    backend writes to memory first otherwise, and takes ten times as long.
    """

    def integers(row: jax.Array, how: str) -> jax.Array:
        if how == "sum":
            return jnp.where(valid, row.astype(jnp.int32), 0)
        # Floats from 0 on have the order of their bits, NaN above all.
        return jnp.where(valid, jax.lax.bitcast_convert_type(row, jnp.int32), 0)

    shapes, rows = [], []
    for part, how in zip(parts, combine, strict=True):
        listed = isinstance(part, list)
        shapes.append((len(part),) if listed else part.shape[:-2])
        each = part if listed else part.reshape(-1, *part.shape[-2:])
        rows += [(integers(row, how), how) for row in each]
    size = _TOGETHER if together else 1
    reduced: list[jax.Array] = []
    for start in range(0, len(rows), size):
        arrays, ways = zip(*rows[start : start + size], strict=True)

        def pairwise(left: Any, right: Any, ways: Any = ways) -> Any:
            pairs = zip(ways, left, right, strict=True)
            return tuple(_OVER_ROWS[how](a, b) for how, a, b in pairs)

        zeros = (np.int32(0),) * len(arrays)
        reduced += jax.lax.reduce(arrays, zeros, pairwise, (1,))
    results = []
    for shape, how in zip(shapes, combine, strict=True):
        count = math.prod(shape)
        own = jnp.stack(reduced[:count]).reshape(*shape, -1)
        del reduced[:count]
        results.append(
            jax.lax.bitcast_convert_type(own, jnp.float32) if how == "max" else own
        )
    return results


def _transformed(
    x: Operands, numbers: Numbers, draw: Any, program: Program
) -> Operands:
    """The operands after the transforms."""
    for i, step in enumerate(program.transforms):
        if step.after:
            continue
        own = draw if step.draws else None
        x = step.apply(x, numbers.p[i], numbers.info[i], own)
    return x


def _wide(x: Operands) -> Operands:
    """The operands in the dtype of the arithmetic, whatever that of the output."""
    dtype = jnp.float64 if x.models.dtype == jnp.float64 else jnp.float32
    return jax.tree.map(lambda array: array.astype(dtype), x)
