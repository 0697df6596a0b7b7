"""Merges pytrees of arrays in device memory, sharded or not."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from m3jax import mixup, prng
from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.engine import leaves as kernels
from m3jax.engine.kernels import Transform
from m3jax.engine.leaves import Numbers
from m3jax.engine.placement import Placement
from m3jax.engine.trees import Leaf, align_trees
from m3jax.methods import METHODS, dare, selection
from m3jax.methods.method import Info, Reduction, run_statistics
from m3jax.recipe import Recipe

# Reading everything twice costs as little as a sample and reading it once below this.
_SAMPLE_PAYS = 1 << 26  # elements
_SAMPLE_STRIDE = 64


@dataclasses.dataclass(frozen=True)
class Draw:
    """The numbers of one merge: all that a seed and a recipe's numbers decide.

    Every field is an array argument of the kernels: a new draw compiles nothing.
    K models, N tensors in the order of the leaves.

    Attributes:
      coefficients: (K, N) float32.
      scaling: s, float32.
      keys: (K, N, 2) uint32, DARE mask keys; None without random DARE.
      thresholds: (K,) uint32 lane thresholds of random DARE, or (K, N) float32, the
        largest magnitudes that DARE by magnitude drops; None without DARE.
      scales: (K,) float32, DARE's rescale factors; None without DARE.
    """

    coefficients: Any
    scaling: Any
    keys: Any = None
    thresholds: Any = None
    scales: Any = None


def merge_params(
    base: Any,
    models: Sequence[Any],
    recipe: Recipe | None = None,
    key: int | jax.Array = 0,
    *,
    donate: bool = False,
    allow_nonfinite: bool = False,
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
    prng.root_key(key)  # raises SeedError before anything is done
    leaves, structure = align_trees(base, models, recipe)
    if donate:
        _check_distinct(leaves)
    if not allow_nonfinite:
        check_inputs(leaves)
    numbers = draw(leaves, recipe, len(models), key)
    info = measure(leaves, recipe, numbers)
    merged = combine(leaves, recipe, numbers, info, donate=donate)
    if not allow_nonfinite:
        _check_overflow(leaves, merged)
    return jax.tree.unflatten(structure, merged)


def draw(
    leaves: Sequence[Leaf], recipe: Recipe, num_models: int, key: int | jax.Array
) -> Draw:
    """Draws the ratios and derives DARE's numbers; by magnitude they take passes.

    Args:
      leaves: from `align_trees`.
      key: a seed, or a key of `jax.random`.
    """
    names = [leaf.name for leaf in leaves]
    merged = [leaf.name for leaf in leaves if leaf.merged]
    ratios = mixup.draw_ratios(recipe.mixup, num_models, merged, key)
    default = METHODS[recipe.method].default_coefficients(num_models)
    granularity = recipe.mixup.granularity
    coefficients = mixup.coefficients(ratios, names, granularity, default)
    plain = Draw(coefficients, np.float32(recipe.scaling))
    rates = recipe.dare.rates(num_models)
    if rates is None:
        return plain
    rescale, target = recipe.dare.rescale, recipe.dare.target
    if recipe.dare.strategy == "random":
        drop = prng.drop_thresholds(rates)
        return dataclasses.replace(
            plain,
            keys=prng.mask_keys(prng.root_key(key), num_models, names),
            thresholds=drop,
            scales=dare.rescale_factors(1 - drop / prng.RATE_STEPS, rescale=rescale),
        )
    thresholds = np.zeros((num_models, len(leaves)), np.float32)
    for i, leaf in enumerate(leaves):
        if leaf.merged:
            thresholds[:, i] = run_statistics(
                dare.magnitude_thresholds(rates, leaf.size, target=target),
                functools.partial(_counts, leaves, [i], Transform(None, target), plain),
            )
    scales = dare.rescale_factors(1 - np.array(rates), rescale=rescale)
    return dataclasses.replace(plain, thresholds=thresholds, scales=scales)


def measure(leaves: Sequence[Leaf], recipe: Recipe, draw: Draw) -> Info:
    """What the method needs to know of the whole model."""
    method = METHODS[recipe.method]
    if method.statistics is None:
        return {}
    places = [i for i, leaf in enumerate(leaves) if leaf.merged]
    size = sum(leaf.size for leaf in leaves)
    num_models = len(draw.coefficients)
    statistics = method.statistics(num_models, size, recipe.trim_rate)
    transform = Transform.of(recipe)
    answer = functools.partial(_counts, leaves, places, transform, draw)
    return run_statistics(statistics, answer)


def combine(
    leaves: Sequence[Leaf],
    recipe: Recipe,
    draw: Draw,
    info: Info,
    *,
    donate: bool = False,
) -> list[jax.Array]:
    """The merged leaves. Differentiable in `draw.coefficients` and `draw.scaling`.

    Args:
      leaves, draw, info: from `align_trees`, `draw` and `measure`.
      donate: reuse the memory of the leaves' arrays.
    """
    transform = Transform.of(recipe)
    merged = []
    for i, leaf in enumerate(leaves):
        if not leaf.merged:
            merged.append(leaf.base)
            continue
        first, *others = leaf.models
        placement = Placement.of(first)
        in_place = donate and first.dtype == leaf.dtype
        merge = kernels.merge_leaf_in_place if in_place else kernels.merge_leaf
        result = merge(
            first,
            others,
            leaf.base,
            _numbers(draw, i, transform, placement),
            info,
            draw.scaling,
            method=recipe.method,
            transform=transform,
            dtype=leaf.dtype.name,
            placement=placement,
        )
        merged.append(result)
        if donate:
            for array in (first, *others, leaf.base):
                if isinstance(array, jax.Array):
                    array.delete()
    return merged


def _numbers(draw: Draw, i: int, transform: Transform, placement: Placement) -> Numbers:
    """The numbers of leaf i, its masks drawn."""
    coefficients = draw.coefficients[:, i]
    if transform.strategy is None:
        return Numbers(coefficients)
    if transform.strategy == "magnitude":
        return Numbers(coefficients, draw.thresholds[:, i], draw.scales)
    masks = kernels.draw_masks(draw.keys[:, i], draw.thresholds, placement=placement)
    return Numbers(coefficients, None, draw.scales, masks)


def _counts(
    leaves: Sequence[Leaf],
    places: Sequence[int],
    transform: Transform,
    draw: Draw,
    reduction: Reduction,
) -> Any:
    """Adds up a reduction over some leaves; int64 arrays."""
    if reduction.sample and sum(leaves[i].size for i in places) < _SAMPLE_PAYS:
        return None
    on_cpu = jax.default_backend() == "cpu" and jax.process_count() == 1
    on_host = reduction.histogram and on_cpu

    def dispatched(i: int) -> Any:
        leaf = leaves[i]
        placement = Placement.of(leaf.models[0])
        return kernels.reduce_leaf(
            leaf.models,
            leaf.base,
            _numbers(draw, i, transform, placement),
            reduction.arguments,
            function=reduction.function,
            transform=transform,
            placement=placement,
            count=reduction.histogram and not on_host,
            stride=_SAMPLE_STRIDE if reduction.sample else 1,
        )

    def fetched(counts: Any) -> Any:
        if not on_host:
            return jax.tree.map(_int64_sum, counts)
        codes, *others = counts
        histogram = sum(map(selection.count_codes_on_host, np.asarray(codes)))
        return histogram, *map(_int64_sum, others)

    if on_host:  # codes are as many as elements: one leaf's at a time
        return _added(fetched(dispatched(i)) for i in places)
    return _added(map(fetched, list(map(dispatched, places))))


def _fetched(array: jax.Array) -> np.ndarray:
    """A small array on the host, other processes' shards of it included."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _added(counts: Iterable[Any]) -> Any:
    return functools.reduce(functools.partial(jax.tree.map, np.add), counts)


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


def _check_overflow(leaves: Sequence[Leaf], merged: Sequence[Any]) -> None:
    places = [i for i, leaf in enumerate(leaves) if leaf.merged]
    finite = _are_finite([merged[i] for i in places])
    for i, ok in zip(places, finite, strict=True):
        if not ok:
            raise CheckpointError(
                f"tensor {shown(leaves[i].name)}: a merged value overflows "
                f"{leaves[i].dtype.name}; choose a wider dtype, or pass "
                "allow_nonfinite=True"
            )


def _are_finite(arrays: Sequence[Any]) -> list[bool]:
    checks = [kernels.all_finite(a, placement=Placement.of(a)) for a in arrays]
    return [bool(np.all(_fetched(check))) for check in checks]


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


def _int64_sum(counts: jax.Array) -> np.ndarray:
    """Adds up the parts' counts (leading axis)."""
    return _fetched(counts).astype(np.int64).sum(axis=0)
