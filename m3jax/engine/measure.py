"""What the steps of a merge have to know of the models before it: reading passes.

One driver for both benches. Each group of tensors (every tensor, every layer, or the
whole model) has a generator of its own; those that ask for the same thing at the same
time share a reading pass, so that small tensors cost little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from m3jax.engine.jobs import Job
from m3jax.engine.kernel import At, Numbers, Program
from m3jax.methods.selection import BINS
from m3jax.methods.step import Problem, Reduction, any_traced, namespace
from m3jax.mixup import group_of
from m3jax.recipe import RecipeError

Groups = list[list[int]]  # the places of the tensors of each group
# Bytes of counters and values that a pass may hold: so many groups go together.
_COUNTERS = 64 << 20
_TOGETHER = 4096  # groups, at most


class Bench(Protocol):
    """Where the arrays are.

    Attributes:
      names, sizes: of all tensors.
      num_models: K.
      traced: the arrays are arguments of a transformation of JAX.
      few: of a group of at most so many elements a pass may ask for the values.
      at_hand: the elements lie in memory, so that a pass more costs little.
    """

    names: list[str]
    sizes: list[int]
    num_models: int
    traced: bool
    at_hand: bool

    @property
    def few(self) -> int: ...

    def own(self, places: Sequence[int]) -> list[int]:
        """Those of the tensors that this process looks at."""
        ...

    def reduce(
        self,
        at: At,
        groups: Groups,
        reductions: Sequence[Reduction],
        *,
        everywhere: bool,
    ) -> list[tuple[Any, ...] | None]:
        """Performs one reading pass; the reductions differ in their arguments alone.

        Args:
          at: the step that asks; the transforms before it are applied.
          groups: of tensors.
          reductions: of each group.
          everywhere: add up over all processes.

        Returns:
          What each group's reduction asks for; None: everything is to be read.
        """
        ...


def measured_by(
    bench: Bench,
    job: Job,
    numbers: Numbers,
    kept: Callable[[str, Callable[[], dict[str, Any]]], dict[str, Any]],
    gathered: Callable[[Any], Any] = lambda table: table,
) -> Numbers:
    """Runs the statistics of a job's steps in order, and derives their numbers.

    Args:
      bench: where the tensors are.
      job: what is done to which of them.
      numbers: tables of the parameters. A table may be a function that gives it.
      kept: (name, find) -> what `find` gives, or what it gave in an interrupted run.
      gathered: puts together what the processes have found of their own tensors.

    Returns:
      The numbers with `info` filled in.
    """
    info: list[Mapping[str, Any]] = []
    program = job.program
    places = [i for i in job.places if bench.sizes[i]]
    for depth in range(len(program.steps)):
        at = At(program, depth, numbers._replace(info=tuple(info)))

        def find(at: At = at) -> dict[str, Any]:
            return _found(bench, at, places, gathered)

        found = kept(f"{job.label}step {depth}", find) if at.step.scope else {}
        info.append(found)
        if depth < len(program.transforms):
            info[-1] = derived(at, found)
    return numbers._replace(info=tuple(info))


def derived(at: At, found: Mapping[str, Any]) -> dict[str, Any]:
    """A step's `info` from its parameters and what it measured; tables."""
    if at.step.scope and not found:
        return {}  # there is no element to measure, and none to merge
    parameters = {name: table_of(own) for name, own in at.parameters.items()}
    xp = namespace(parameters, found)
    with np.errstate(all="ignore"):
        return at.step.derive(parameters, dict(found), xp)


def table_of(table: Any) -> Any:
    """The table itself, or what the function in its place gives."""
    return table() if callable(table) else table


def resolved(p: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """The parameters of the steps with all tables there."""
    return tuple({n: table_of(own) for n, own in step.items()} for step in p)


def completed(program: Program, numbers: Numbers) -> Numbers:
    """The numbers with all tables there, and what the method derives of them."""
    numbers = numbers._replace(p=resolved(numbers.p))
    last = derived(At(program, len(numbers.p) - 1, numbers), numbers.info[-1])
    return numbers._replace(info=(*numbers.info[:-1], last))


def _found(
    bench: Bench,
    at: At,
    places: Sequence[int],
    gathered: Callable[[Any], Any],
) -> dict[str, Any]:
    """What one step's statistics find: tables over all tensors."""
    step = at.step
    alone = step.scope == "tensor"
    traced = is_traced_at(bench, at)
    groups = grouped(step.scope, bench.names, bench.own(places) if alone else places)
    infos: list[Any] = [None] * len(groups)
    sizes = [sum(bench.sizes[i] for i in places) for places in groups]
    for batch in _batches(sizes, bench):
        live, asked = {}, {}
        for g in batch:
            problem = Problem(
                num_models=bench.num_models,
                size=sizes[g],
                few=sizes[g] <= bench.few,
                at_hand=bench.at_hand,
                numbers=_OfGroup(step.name, at.parameters, groups[g]),
                traced=traced,
            )
            live[g] = step.measure(problem)

        def send(g: int, value: Any) -> None:
            try:
                asked[g] = live[g].send(value)  # noqa: B023
            except StopIteration as stop:
                infos[g] = stop.value
                asked.pop(g, None)  # noqa: B023

        for g in batch:
            send(g, None)
        while asked:
            together = _alike(asked)
            answers = bench.reduce(
                at,
                [groups[g] for g in together],
                [asked[g] for g in together],
                everywhere=not alone,
            )
            for g, answer in zip(together, answers, strict=True):
                send(g, answer)
    tables = _spread(groups, infos, len(bench.names))
    return gathered(tables) if alone else tables


def is_traced_at(bench: Bench, at: At) -> bool:
    """Whether what a step sees depends on an argument of a transformation of JAX."""
    before = at.numbers.first(at.depth)
    keys = at.numbers.keys if at.draws else None
    return bench.traced or any_traced(before.p, at.parameters, before.info, keys)


def grouped(scope: str, names: Sequence[str], places: Sequence[int]) -> Groups:
    """The tensors at `places`, by group of a scope."""
    if scope == "tensor":
        return [[i] for i in places]
    if scope == "model":
        return [list(places)] if places else []
    groups: dict[str, list[int]] = {}
    for i in places:
        groups.setdefault(group_of(names[i], "layer"), []).append(i)
    return list(groups.values())


def _batches(sizes: Sequence[int], bench: Bench) -> Iterator[range]:
    """The groups, of these elements, that are measured together."""
    start = used = 0
    for g, size in enumerate(sizes):
        own = bench.num_models * (4 * size if size <= bench.few else 8 * BINS)
        if g > start and (g - start == _TOGETHER or used + own > _COUNTERS):
            yield range(start, g)
            start, used = g, 0
        used += own
    if start < len(sizes):
        yield range(start, len(sizes))


def _alike(asked: Mapping[int, Reduction]) -> list[int]:
    """The groups that ask for the same as the first of them."""
    first = next(iter(asked.values()))
    what = (first.function, first.combine, first.sample)
    return [g for g, r in asked.items() if (r.function, r.combine, r.sample) == what]


def _spread(
    groups: Groups, infos: Sequence[Mapping[str, Any]], count: int
) -> dict[str, Any]:
    """Tables over tensors, (N,) or (K, N), of what was found for groups of them."""
    if not infos:
        return {}
    group_of_tensor = np.zeros(count, np.int64)
    for g, places in enumerate(groups):
        group_of_tensor[places] = g
    known = np.zeros(count, bool)
    known[[i for places in groups for i in places]] = True
    xp = namespace(*infos)

    def spread(name: str) -> Any:
        values = xp.stack([xp.asarray(info[name]) for info in infos])[group_of_tensor]
        values = xp.moveaxis(values, 0, -1)
        return xp.where(known, values, xp.zeros((), values.dtype))

    return {name: spread(name) for name in infos[0]}


class _OfGroup(Mapping[str, Any]):
    """A step's parameters for a group of tensors, () or (K,); they may not differ."""

    def __init__(self, step: str, tables: Mapping[str, Any], places: Sequence[int]):
        self._step = step
        self._tables = tables
        self._places = places

    def __getitem__(self, name: str) -> Any:
        table = table_of(self._tables[name])
        first = table[..., self._places[0]] if self._places else table[..., 0]
        if isinstance(table, np.ndarray) and len(self._places) > 1:
            own = table[..., np.array(self._places)]
            if not np.all(own == first[..., None]):
                raise RecipeError(
                    f"{self._step}.{name} differs between tensors that are measured "
                    "together; give all of them one value"
                    + ", and mixup.granularity=model"
                    * (name == "weights")
                )
        return first

    def __iter__(self) -> Iterator[str]:
        return iter(self._tables)

    def __len__(self) -> int:
        return len(self._tables)


def stacked(reductions: Sequence[Reduction]) -> dict[str, Any]:
    """The arguments of several groups: (G,) and (J, G) tables."""
    xp = namespace(*[reduction.arguments for reduction in reductions])
    names = reductions[0].arguments
    return {
        name: xp.stack([xp.asarray(r.arguments[name]) for r in reductions], axis=-1)
        for name in names
    }


def put_together(how: str, a: Any, b: Any) -> Any:
    """What two parts of a group make together."""
    if how == "values":
        return np.concatenate([a, b], axis=-1)
    return np.maximum(a, b) if how == "max" else a + b


def int64_rows(how: str, rows: Any) -> Any:
    """The sum, or the maximum, of what `kernel.reduce` found in each row; exact."""
    rows = np.asarray(rows)
    return rows.max(axis=0) if how == "max" else rows.astype(np.int64).sum(axis=0)


def traced_rows(how: str, rows: Any) -> Any:
    """The same under a transformation: float32 sums, whose sign and small values are
    exact; histograms are int32."""
    if how == "max":
        return rows.max(axis=0)
    if how == "float":
        return rows.sum(axis=0)
    if how == "histogram":
        return rows.sum(axis=0, dtype=jnp.int32)
    low = jnp.sum(rows & 0xFFFF, axis=0, dtype=jnp.int32)
    high = jnp.sum(rows >> 16, axis=0, dtype=jnp.int32) + (low >> 16)
    return high.astype(jnp.float32) * 65536 + (low & 0xFFFF).astype(jnp.float32)
