"""Adapters merged into one adapter, by what they change: ΔW, never A and B apart.

Merging A with A and B with B, as some tools do, adds products B_i·A_j that none of the
adapters has. Here, for every module,

    concatenate  Σ_k w_k ΔW_k, exactly, of rank Σ_k r_k: the factors side by side
    svd          any recipe merges the ΔW_k in full; the best change of a rank is kept
    core         any recipe merges the ΔW_k in the space that all of them share (Core
                 Space), which holds them exactly, of rank Σ_k r_k; or cut to a rank

What adapters save whole (modules_to_save, biases) is merged by the recipe as in a merge
of models, with the base's tensor where an adapter has none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from m3jax.checkpoints.adapters import Adapter, alone, open_adapter
from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.folder import open_checkpoint
from m3jax.checkpoints.formats.peft import Module
from m3jax.checkpoints.places import hub
from m3jax.checkpoints.source import Array, read_whole
from m3jax.engine.in_memory import merge_params
from m3jax.lora import factors
from m3jax.lora.extract import Fit
from m3jax.lora.factors import Core, Pair, Svd
from m3jax.lora.output import AdapterWriter
from m3jax.recipe import Recipe, RecipeError

HOW = ("concatenate", "svd", "core")
_LINEAR = ("average", "linear", "task_arithmetic")
Arrays = dict[str, Any]
# What a recipe makes of a table of changes for each model, and of what is saved whole.
Merge = Callable[[Sequence[Mapping[str, Any]]], tuple[Arrays, Arrays]]


@dataclasses.dataclass(frozen=True)
class _Changes:
    """What each of K adapters changes of a module; None: nothing.

    Attributes:
      embedding: it is an embedding.
      scalings: s of each.
    """

    pairs: tuple[Pair | None, ...]
    scalings: tuple[float, ...]
    embedding: bool

    @property
    def given(self) -> Pair:
        return next(pair for pair in self.pairs if pair is not None)

    @property
    def filled(self) -> list[Pair]:
        """With a pair of rank 0 where there is none."""
        a, b = self.given
        return [Pair(a[:0], b[:, :0]) if p is None else p for p in self.pairs]


def combine(
    models: Sequence[str],
    output: str,
    recipe: Recipe,
    *,
    how: str = "concatenate",
    rank: int | None = None,
    energy: float | None = None,
    base: str | None = None,
    seed: int = 0,
    dtype: str = "float32",
) -> list[Fit]:
    """Writes the merge of adapters as an adapter.

    Args:
      models: folders or ids of adapters; their order is that of the ratios.
      output: the folder to make.
      recipe: what to do; M3 draws its ratios as in a merge of models.
      how: see above.
      rank, energy: of what is kept, as in `extract.Settings`; svd needs one of them.
      base: the base model; needed where an adapter saves whole what another does not,
        or where the recipe needs it.
      seed, dtype: of the draws, of the factors.

    Returns:
      A line for each module; the error is that of cutting to a rank and rounding.

    Raises:
      RecipeError, CheckpointError: one line.
    """
    _check(recipe, how, rank, energy)
    recipe.check(num_models=len(models), has_base=True)
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(_opened(name)) for name in models]
        changes = _changes(opened)
        wholes = _wholes(opened, base, recipe)
        writer, fits = AdapterWriter(dtype), list[Fit]()
        merge = functools.partial(_merged, wholes=wholes, recipe=recipe, seed=seed)
        if how == "core":
            merged, wide = _in_core(changes, len(models), merge)
        elif how == "svd" and not _is_linear(recipe):
            merged, wide = _in_full(changes, len(models), merge)
        else:
            merged, wide = _side_by_side(changes, len(models), merge, how)
        for module, change in merged.items():
            fits.append(_written(module, change, changes[module], writer, rank, energy))
        for name, own in wide.items():
            writer.whole(name, Array(np.asarray(own), name))
            fits.append(Fit(name, own.shape, 0, 0.0, 0.0))
        writer.write(
            output,
            base=base or opened[0].config.base,
            modules=(),
            transposed=opened[0].config.transposed,
            task=opened[0].config.task,
            record={
                "merge": {"models": list(models), "how": how, "seed": seed},
                "recipe": recipe.to_dict(),
                "rank": rank,
                "energy": energy,
            },
        )
        for adapter in opened:
            adapter.file.check_unchanged()
    return fits


def _check(recipe: Recipe, how: str, rank: int | None, energy: float | None) -> None:
    if how not in HOW:
        raise RecipeError(f"how={how!r} needs one of {', '.join(HOW)}")
    if how == "svd" and rank is None and energy is None:
        raise RecipeError("how=svd needs a rank or an energy, or both")
    if how == "concatenate" and not (rank is None and energy is None):
        raise RecipeError("how=concatenate keeps all of it: how=svd cuts to a rank")
    if how == "concatenate" and not _is_linear(recipe):
        raise RecipeError(
            f"how=concatenate adds adapters up: it needs method {', '.join(_LINEAR)} "
            "and no transforms; how=core or svd take any"
        )


def _is_linear(recipe: Recipe) -> bool:
    return recipe.method.name in _LINEAR and not recipe.transforms


def _opened(name: str) -> Adapter:
    location, _ = hub.locate(name)
    folder = alone(location) or (location if location.is_dir() else location.parent)
    if alone(location) is None:
        raise CheckpointError(
            f"{name}: no adapter; give the folder of adapter_config.json and "
            "adapter_model.safetensors"
        )
    return open_adapter(name, folder)


def _changes(adapters: Sequence[Adapter]) -> dict[str, _Changes]:
    """What each adapter changes, by module."""
    first = adapters[0]
    found: dict[str, list[Module | None]] = {}
    for k, adapter in enumerate(adapters):
        if adapter.config.dora:
            raise CheckpointError(
                f"{adapter.name}: DoRA's change depends on the base's weights; merge "
                "the models (m3jax merge --models=BASE+ADAPTER,...) and extract an "
                "adapter of the result (m3jax lora extract)"
            )
        if adapter.config.transposed != first.config.transposed:
            raise CheckpointError(
                f"{adapter.name} and {first.name} differ in fan_in_fan_out; give "
                "adapters of one base"
            )
        for module in adapter.modules:
            strange = set(module.tensors) - {"a", "b"}
            if strange:
                raise CheckpointError(
                    f"{adapter.name}: {shown(module.tensors[min(strange)])} is not "
                    "merged between adapters; merge the models instead"
                )
            if adapter.config.targets(module.name):
                slots = found.setdefault(module.name, [None] * len(adapters))
                slots[k] = module
    return {
        name: _change(name, slots, adapters) for name, slots in sorted(found.items())
    }


def _change(
    name: str, slots: Sequence[Module | None], adapters: Sequence[Adapter]
) -> _Changes:
    pairs: list[Pair | None] = []
    for adapter, module in zip(adapters, slots, strict=True):
        if module is None:
            pairs.append(None)
            continue
        a, b = adapter.factors(module)
        pairs.append(Pair(a.read(0, a.rows).T, b.read(0, b.rows)))
    shapes = {(len(p.b), p.a.shape[1]): i for i, p in enumerate(pairs) if p is not None}
    if len(shapes) > 1:
        each = ", ".join(f"{list(s)} in {adapters[i].name}" for s, i in shapes.items())
        raise CheckpointError(f"{shown(name)} is changed with shape {each}")
    scalings = tuple(adapter.config.scaling(name) for adapter in adapters)
    embedding = any(module is not None and module.embedding for module in slots)
    return _Changes(tuple(pairs), scalings, embedding)


def _wholes(
    adapters: Sequence[Adapter], base: str | None, recipe: Recipe
) -> list[Arrays]:
    """The tensors that adapters save whole: of the base, then of each adapter."""
    names = sorted({name for adapter in adapters for name in adapter.others})
    if not names:
        return [{} for _ in range(len(adapters) + 1)]
    lacking = [a.name for a in adapters if set(names) - set(a.others)]
    if base is None and (lacking or recipe.needs_base):
        why = f"{lacking[0]} has not" if lacking else f"{recipe.method.name} needs it"
        raise CheckpointError(
            f"{shown(names[0])} is saved whole: give --base, whose tensor is merged "
            f"where {why}"
        )
    own = [
        {n: read_whole(a.tensors[stored]) for n, stored in a.others.items()}
        for a in adapters
    ]
    if base is None:
        return [{name: np.zeros_like(own[0][name]) for name in names}, *own]
    with open_checkpoint(base) as under:
        missing = [name for name in names if name not in under.tensors]
        if missing:
            raise CheckpointError(f"{base}: has no tensor {shown(missing[0])}")
        start = {name: read_whole(under.tensors[name]) for name in names}
    for adapter, table in zip(adapters, own, strict=True):
        for name in names:
            table.setdefault(name, start[name])
            if table[name].shape != start[name].shape:
                raise CheckpointError(
                    f"{adapter.name}: {shown(name)} has shape "
                    f"{list(table[name].shape)}, {base} {list(start[name].shape)}"
                )
    return [start, *own]


def _merged(
    tables: Sequence[Mapping[str, Any]],
    wholes: Sequence[Arrays],
    recipe: Recipe,
    seed: int,
) -> tuple[Arrays, Arrays]:
    """The recipe on changes, whose base is 0, and on what is saved whole."""
    zeros = {f"{n}.weight": np.zeros_like(own) for n, own in tables[0].items()}
    trees = [{f"{n}.weight": own for n, own in table.items()} for table in tables]
    base = {**zeros, **wholes[0]}
    models = [{**t, **w} for t, w in zip(trees, wholes[1:], strict=True)]
    merged = merge_params(base, models, recipe, seed)
    back = {n: np.asarray(merged[f"{n}.weight"], np.float64) for n in tables[0]}
    return back, {name: merged[name] for name in wholes[0]}


def _side_by_side(
    changes: Mapping[str, _Changes], count: int, merge: Merge, how: str
) -> tuple[dict[str, Pair | Svd], Arrays]:
    """Σ_k w_k ΔW_k. The weights are what the recipe makes of the unit vectors."""
    units = np.eye(count, dtype=np.float32)
    weights, wide = merge([dict.fromkeys(changes, unit) for unit in units])
    made: dict[str, Pair | Svd] = {}
    for module, own in changes.items():
        scaled = [w * s for w, s in zip(weights[module], own.scalings, strict=True)]
        pair = factors.joined(own.filled, scaled)
        made[module] = pair if how == "concatenate" else factors.decomposed(pair)
    return made, wide


def _in_core(
    changes: Mapping[str, _Changes], count: int, merge: Merge
) -> tuple[dict[str, Pair | Svd], Arrays]:
    cores: dict[str, Core] = {
        module: factors.core(own.filled, own.scalings)
        for module, own in changes.items()
    }
    tables = [
        {m: own.cores[k].astype(np.float32) for m, own in cores.items()}
        for k in range(count)
    ]
    merged, wide = merge(tables)
    return {m: own.back(merged[m]) for m, own in cores.items()}, wide


def _in_full(
    changes: Mapping[str, _Changes], count: int, merge: Merge
) -> tuple[dict[str, Pair | Svd], Arrays]:
    tables = [
        {
            m: (own.scalings[k] * own.filled[k].dense).astype(np.float32)
            for m, own in changes.items()
        }
        for k in range(count)
    ]
    merged, wide = merge(tables)
    return {m: factors.exact(own) for m, own in merged.items()}, wide


def _written(
    module: str,
    change: Pair | Svd,
    changes: _Changes,
    writer: AdapterWriter,
    rank: int | None,
    energy: float | None,
) -> Fit:
    """Cuts a change, hands it to the writer, and says how near it is."""
    shape = (len(changes.given.b), changes.given.a.shape[1])
    if isinstance(change, Pair):
        pair, whole, least = change, change, 0.0
    else:
        squares = float(np.square(change.values).sum())
        count = factors.kept(change, rank, energy, squares)
        pair, whole = change.cut(count), change.cut(len(change.values))
        left = float(np.linalg.norm(change.values[count:]))
        least = factors.relative_error(math.sqrt(squares), left)
    if not pair.rank:
        return Fit(module, shape, 0, 0.0, 0.0)
    stored = writer.pair(module, pair, embedding=changes.embedding)
    size = factors.norm(whole)
    left = factors.norm(factors.joined([whole, stored], [1.0, -1.0]))
    return Fit(module, shape, pair.rank, factors.relative_error(size, left), least)
