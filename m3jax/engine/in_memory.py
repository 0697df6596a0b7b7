"""Merges pytrees of arrays in device memory, sharded or not."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from m3jax import mixup, prng
from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.engine import draws
from m3jax.engine import leaves as kernels
from m3jax.engine.jobs import Job, jobs
from m3jax.engine.kernel import At, Numbers, Program, Reducing, take
from m3jax.engine.measure import (
    Groups,
    completed,
    int64_rows,
    is_traced_at,
    measured_by,
    put_together,
    stacked,
    traced_rows,
)
from m3jax.engine.placement import Placement
from m3jax.engine.trees import Leaf, align_trees
from m3jax.methods.selection import count_codes_on_host
from m3jax.methods.step import Reduction
from m3jax.recipe import Recipe
from m3jax.traced import at_once, is_traced

# Reading everything twice costs as little as a sample and reading it once below this.
_SAMPLE_PAYS = 1 << 26  # elements
_SAMPLE_STRIDE = 64


def merge_params(
    base: Any,
    models: Sequence[Any],
    recipe: Recipe | None = None,
    key: int | jax.Array = 0,
    *,
    donate: bool = False,
    allow_nonfinite: bool = False,
    statistics: Sequence[Any] = (),
) -> Any:
    """Merges pytrees of arrays into a pytree, in device memory.

    Gives, bit for bit, what `m3jax.merge` writes for the same tensors, recipe and
    seed. The name of a leaf, which decides its DARE mask, is its path joined by ".":
    ``{"model": {"norm": {"weight": ...}}}`` holds "model.norm.weight".

    Arrays with a `NamedSharding` keep it: every device merges its own shards, and
    nothing is gathered. A second merge of the same shapes compiles nothing, whatever
    its seed, ratios, rates or scaling.

        >>> import jax.numpy as jnp, m3jax
        >>> base = {"norm": {"weight": jnp.zeros(4)}}
        >>> maths = {"norm": {"weight": jnp.ones(4)}}
        >>> code = {"norm": {"weight": jnp.full(4, 3.0)}}
        >>> recipe = m3jax.Recipe(
        ...     method="task_arithmetic", mixup=m3jax.Mixup(ratios=(0.75, 0.25))
        ... )
        >>> merged = m3jax.merge_params(base, [maths, code], recipe, 0)
        >>> merged["norm"]["weight"].tolist()
        [1.5, 1.5, 1.5, 1.5]

    Args:
      base: the base model's pytree; None if the recipe needs none.
      models: the fine-tuned models' pytrees; their order is that of the ratios.
      recipe: what to do; the default is M3's average.
      key: a seed, 0 <= seed < 2**32, or a key such as ``jax.random.key(seed)``.
      donate: give up the inputs: their memory is reused, and they cannot be read
        afterwards, apart from leaves that the result takes over.
      allow_nonfinite: merge NaN and infinity instead of refusing them.
      statistics: one pytree per model, for a method that reads what was measured
        (Fisher information, Gram matrices): a leaf stands where its weight does.

    Returns:
      A pytree of the structure of `base` (of ``models[0]`` without a base), each leaf
      of its dtype, or of the recipe's. float64 stays only where JAX has 64 bits on.

    Raises:
      RecipeError, SeedError: the recipe does not fit the models; the seed.
      CheckpointError: the pytrees do not fit each other, or hold NaN or infinity; one
        line that names the leaf.
    """
    recipe = recipe or Recipe()
    recipe.check(num_models=len(models), has_base=base is not None)
    recipe.check_statistics(len(statistics), len(models))
    prng.root_key(key)  # raises SeedError before anything is done
    with at_once():
        leaves, structure = align_trees(base, models, recipe, statistics)
        if donate:
            _check_distinct(leaves)
        if not allow_nonfinite:
            check_inputs(leaves)
        bench = Leaves(leaves, recipe.num_inputs(len(models)))
        numbers = measured(bench, recipe, key)
    merged = combine(bench, numbers, donate=donate)
    if not allow_nonfinite:
        _check_overflow(leaves, merged)
    return unflatten(structure, merged)


class Leaves:
    """Aligned leaves in device memory; a `measure.Bench`."""

    few = 0
    at_hand = False

    def __init__(self, leaves: Sequence[Leaf], num_models: int):
        self.leaves = leaves
        self.num_models = num_models
        self.names = [leaf.name for leaf in leaves]
        self.sizes = [leaf.size for leaf in leaves]
        arrays = [a for leaf in leaves if leaf.merged for a in leaf.arrays]
        self.traced = any(map(is_traced, arrays))

    @property
    def merged(self) -> list[int]:
        """The places of the leaves that are merged rather than copied."""
        return [i for i, leaf in enumerate(self.leaves) if leaf.merged]

    def own(self, places: Sequence[int]) -> list[int]:
        return list(places)

    def reduce(
        self,
        at: At,
        groups: Groups,
        reductions: Sequence[Reduction],
        *,
        everywhere: bool,
    ) -> list[tuple[Any, ...] | None]:
        """See `measure.Bench`."""
        del everywhere  # every process has shards of every leaf
        first = reductions[0]
        size = sum(self.sizes[i] for i in groups[0])
        traced = is_traced_at(self, at)
        if first.sample and (size < _SAMPLE_PAYS or len(groups) > 1 or traced):
            return [None] * len(groups)
        on_cpu = jax.default_backend() == "cpu" and jax.process_count() == 1
        on_host = on_cpu and not traced and max(self.sizes) <= kernels.MAX_COUNTED
        arguments = stacked(reductions)
        how = Reducing.of(at, first, count=not on_host)
        numbers = at.numbers.first(at.depth)

        def dispatched(g: int, i: int) -> tuple[Any, ...]:
            leaf = self.leaves[i].placed(at.unit, i)
            placement = Placement.of(leaf.models[0])
            axes = 1 if at.unit == "element" else len(placement.shape)
            return kernels.reduce_leaf(
                leaf.models,
                leaf.base,
                leaf.beside,
                take(numbers, i, axes, leaf.compute_dtype),
                self.draw(at, i, placement),
                take(arguments, g, axes),
                how=how,
                placement=placement,
                stride=_SAMPLE_STRIDE if first.sample else 1,
            )

        def fetched(parts: tuple[Any, ...]) -> list[Any]:
            if traced:
                return [
                    traced_rows(h, p) for h, p in zip(first.combine, parts, strict=True)
                ]
            return [
                _counted(np.asarray(part))
                if how == "histogram" and on_host
                else int64_rows(how, multihost(part))
                for how, part in zip(first.combine, parts, strict=True)
            ]

        places = [(g, i) for g, own in enumerate(groups) for i in own]
        # What no transformation goes through is found at once, also inside a jit.
        with contextlib.nullcontext() if traced else at_once():
            if on_host and "histogram" in first.combine:
                # Codes are as many as elements: one leaf's at a time.
                results = [fetched(dispatched(g, i)) for g, i in places]
            else:
                results = list(map(fetched, [dispatched(g, i) for g, i in places]))
        found: list[Any] = [None] * len(groups)
        for (g, _), own in zip(places, results, strict=True):
            before = found[g]
            found[g] = (
                own
                if before is None
                else [
                    jnp.maximum(a, b)
                    if traced and how == "max"
                    else put_together(how, a, b)
                    for how, a, b in zip(first.combine, before, own, strict=True)
                ]
            )
        return [None if own is None else tuple(own) for own in found]

    def draw(self, at: At, i: int, placement: Placement) -> Any:
        """Masks or lanes of leaf i, lying as it does; None where nothing is drawn."""
        if not at.draws:
            return None
        keys, thresholds = at.numbers.keys[:, i], at.threshold[:, i]
        return kernels.draw(keys, thresholds, at.draws, placement=placement)

    def merge(
        self, program: Program, numbers: Numbers, i: int, *, donate: bool
    ) -> dict[str, Any]:
        """The parts that leaf i is merged to."""
        whole = self.leaves[i]
        leaf = whole.placed(program.unit(len(program.steps)), i)
        first, *others = leaf.models
        placement = Placement.of(first)
        in_place = donate and first.dtype == leaf.dtype and leaf is whole
        own = numbers._replace(keys=None)
        made = kernels.merge_leaf(
            first,
            tuple(others),
            leaf.base,
            leaf.beside,
            take(own, i, len(placement.shape), leaf.compute_dtype),
            self.draw(At.method(program, numbers), i, placement),
            program=program,
            dtypes=leaf.kernel_dtypes,
            placement=placement,
            in_place=in_place,
        )
        dtypes = {part: own.dtype.numpy for part, own in leaf.parts.items()}
        return {
            part: whole.back(
                values if leaf.parts[part].packed else _as(values, dtypes[part], leaf)
            )
            for part, values in made.items()
        }


def _as(values: Any, dtype: np.dtype, leaf: Leaf) -> Any:
    wanted = leaf.dtype if dtype == np.float64 else dtype
    return values if values.dtype == wanted else values.astype(wanted)


def numbers_of(
    bench: Leaves, recipe: Recipe, key: int | jax.Array
) -> tuple[tuple[Job, Numbers], ...]:
    """The jobs of a merge and their numbers before anything is measured.

    Args:
      bench: holds the leaves.
      recipe: what is done.
      key: a seed or a key.
    """
    merged = [bench.names[i] for i in bench.merged]

    @functools.cache
    def ratios() -> Any:
        return mixup.draw_ratios(recipe.mixup, bench.num_models, merged, key)

    return tuple(
        (job, draws.tables(job, bench.names, bench.num_models, key, ratios))
        for job in jobs(recipe, zip(bench.merged, merged, strict=True))
    )


def measured(
    bench: Leaves,
    recipe: Recipe,
    key: int | jax.Array,
    kept: Callable[[str, Callable[[], Any]], Any] = lambda name, find: find(),
) -> tuple[tuple[Job, Numbers], ...]:
    """The jobs of a merge and their numbers, with all that their steps measure."""
    return tuple(
        (job, completed(job.program, measured_by(bench, job, numbers, kept)))
        for job, numbers in numbers_of(bench, recipe, key)
    )


def combine(
    bench: Leaves, numbers: Sequence[tuple[Job, Numbers]], *, donate: bool = False
) -> list[dict[str, Any]]:
    """The merged leaves by part; differentiable in the numbers.

    Args:
      bench: holds the leaves.
      numbers: from `measured`.
      donate: reuse the memory of the leaves' arrays.
    """
    programs = {i: (job.program, own) for job, own in numbers for i in job.places}
    merged = []
    for i, leaf in enumerate(bench.leaves):
        if not leaf.merged:
            others = {
                part: jnp.zeros(own.shape, bool if own.packed else own.dtype.numpy)
                for part, own in leaf.parts.items()
                if part
            }
            merged.append({"": leaf.base, **others})
            continue
        merged.append(bench.merge(*programs[i], i, donate=donate))
        if donate:
            for array in leaf.arrays:
                if isinstance(array, jax.Array):
                    array.delete()
    return merged


def unflatten(structure: Any, merged: Sequence[dict[str, Any]]) -> Any:
    """The merged pytree; where the method makes several parts, one by part.

    A leaf that is copied is in the part "" alone, and None in the others.
    """
    parts = {part: None for own in merged for part in own}
    trees = {part: structure([own.get(part) for own in merged]) for part in parts}
    return trees[""] if list(trees) == [""] else trees


def _counted(codes: np.ndarray) -> np.ndarray:
    return sum(map(count_codes_on_host, codes), np.zeros((), np.int64))


def multihost(array: jax.Array) -> np.ndarray:
    """A small array on the host, other processes' shards of it included."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def check_inputs(leaves: Sequence[Leaf]) -> None:
    """Raises CheckpointError, naming leaf and model, for NaN or infinity."""
    places = []
    for leaf in leaves:
        places += [(f"models[{i}]", leaf.name, m) for i, m in enumerate(leaf.models)]
        if leaf.merged and leaf.base is not None:
            places.append(("base", leaf.name, leaf.base))
    finite = _are_finite([array for *_, array in places])
    for (who, name, _), ok in zip(places, finite, strict=True):
        if not ok:
            raise CheckpointError(
                f"{who}: tensor {shown(name)} holds NaN or infinity; mend it, or pass "
                "allow_nonfinite=True to merge it anyway"
            )


def _check_overflow(leaves: Sequence[Leaf], merged: Sequence[dict[str, Any]]) -> None:
    places = [
        (i, array)
        for i, leaf in enumerate(leaves)
        if leaf.merged
        for array in merged[i].values()
        if array.dtype != np.bool_
    ]
    finite = _are_finite([array for _, array in places])
    for (i, _), ok in zip(places, finite, strict=True):
        if not ok:
            raise CheckpointError(
                f"tensor {shown(leaves[i].name)}: a merged value overflows "
                f"{leaves[i].dtype.name}; choose a wider dtype, or pass "
                "allow_nonfinite=True"
            )


def _are_finite(arrays: Sequence[Any]) -> list[bool]:
    if any(map(is_traced, arrays)):
        return [True] * len(arrays)  # nobody can look
    with at_once():
        checks = [kernels.all_finite(a, placement=Placement.of(a)) for a in arrays]
        return [bool(np.all(multihost(check))) for check in checks]


def _check_distinct(leaves: Sequence[Leaf]) -> None:
    """Raises ValueError if an array that is to be given up occurs twice."""
    seen = set()
    for leaf in leaves:
        for array in (*leaf.models, leaf.base):
            if array is not None and id(array) in seen:
                raise ValueError(
                    f"donate=True: the array of tensor {shown(leaf.name)} occurs more "
                    "than once among the inputs; copy it, or do not donate"
                )
            seen.add(id(array))
