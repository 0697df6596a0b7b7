"""What transformers knows of a model's names: its conversions, its ties, its defaults.

transformers 5 reads checkpoints of any age through a registry of renamings and
conversions (experts stacked, projections cut or joined, matrices turned). Here its
tables are applied to names and to views of tensors, never to weights: `canonical` gives
the tensors under the names of the model's modules, as transformers would load them. The
modules are built on torch's meta device, where nothing is allocated.

Without torch, or for a model that the installed transformers does not know, there is
nothing here, and the names must match otherwise. Code that comes with a checkpoint is
never run.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from m3jax.checkpoints.naming.table import Table, counted
from m3jax.checkpoints.source import Source
from m3jax.checkpoints.sources import views

_MAX_COUNT = 1_000  # layers or experts of a model that is built; each is Python objects
_MAX_NUMBER = 1 << 24  # anything else in config.json that may be a size
_COUNTS = ("layer", "block", "depth", "stage", "expert")


class _UnknownError(Exception):
    """A conversion that views cannot express."""


@dataclasses.dataclass(frozen=True)
class Registry:
    """What transformers knows of one model.

    Attributes:
      names: shapes of the tensors of its modules.
      prefix: of its base model.
      tied: what each tensor is a copy of, of those that config.json ties.
      renamings, converters: of the registry, in order; transformers' objects.
    """

    names: Mapping[str, tuple[int, ...]]
    prefix: str
    tied: Mapping[str, str]
    renamings: list[Any]
    converters: list[Any]

    def canonical(self, table: Mapping[str, Source]) -> tuple[Table, list[str]]:
        """The tensors by the names of the model's modules, as far as they lead there.

        Names of which no tensor of the model comes stay as they are.

        Returns:
          The table, and what was done.
        """
        from transformers import core_model_loading as loading

        made: Table = {}
        groups: dict[str, dict[str, list[str]]] = {}
        by_pattern = {p: c for c in self.converters for p in c.source_patterns}
        moved = []
        shapes = dict.fromkeys(self.names, True)
        # Experts in the order of their numbers, as loaders stack them.
        for name in sorted(table, key=loading.dot_natural_key):
            new, pattern = loading.rename_source_key(
                name, self.renamings, self.converters, self.prefix, shapes
            )
            if pattern is None or pattern not in by_pattern:
                known = new in self.names and new not in made
                made[new if known else name] = table[name]
                moved += [name] * (known and new != name)
            else:
                parts = groups.setdefault(new, collections.defaultdict(list))
                parts[pattern].append(name)
        for target, parts in groups.items():
            converter = by_pattern[next(iter(parts))]
            sources = {p: [table[name] for name in own] for p, own in parts.items()}
            used = [name for own in parts.values() for name in own]
            try:
                converted = _convert(converter, target, sources, self.names)
            except (_UnknownError, IndexError, KeyError, ValueError):
                converted = {}
            if converted and not converted.keys() & made.keys():
                made |= converted
                moved += used
            else:
                made |= {name: table[name] for name in used}
        done = f"as transformers reads them: {counted(sorted(moved))}" if moved else ""
        return made, [done] if done else []


def of(config: Mapping[str, Any] | None) -> Registry | None:
    """What transformers knows of the model that config.json describes, if anything."""
    if not config or not _sane(config):
        return None
    return _build(json.dumps(config, sort_keys=True))


@functools.lru_cache(maxsize=4)
def _build(text: str) -> Registry | None:
    config = json.loads(text)
    try:
        with _silent():
            model = _on_meta(config)
            from transformers import conversion_mapping as mapping
            from transformers import core_model_loading as loading

            transforms = mapping.get_model_conversion_mapping(model)
            state = model.state_dict(keep_vars=True)
            return Registry(
                names={name: tuple(own.shape) for name, own in state.items()},
                prefix=model.base_model_prefix,
                tied=dict(model.all_tied_weights_keys),
                renamings=[
                    t for t in transforms if not isinstance(t, loading.WeightConverter)
                ],
                converters=[
                    t for t in transforms if isinstance(t, loading.WeightConverter)
                ],
            )
    # Whatever a stranger's config.json brings forth in another library.
    except Exception:
        return None


def _on_meta(config: Mapping[str, Any]) -> Any:
    """The model's modules without weights."""
    import torch
    import transformers

    own = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    (name,) = config.get("architectures") or ["AutoModel"]
    found = getattr(transformers, name, None)
    if not (
        isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    ):
        raise TypeError(name)
    with torch.device("meta"):
        return found(own)


def ties_by_default(config: Mapping[str, Any] | None) -> bool | None:
    """Whether a head is its embedding where config.json says nothing; None: unknown."""
    kind = (config or {}).get("model_type")
    return _default(kind) if isinstance(kind, str) else None


@functools.cache
def _default(kind: str) -> bool | None:
    try:
        with _silent():
            import transformers

            own = transformers.CONFIG_MAPPING[kind]()
            tied = getattr(own, "tie_word_embeddings", None)
            return tied if isinstance(tied, bool) else None
    except Exception:
        return None


def _convert(
    converter: Any,
    target: str,
    sources: dict[str, list[Source]],
    names: Mapping[str, tuple[int, ...]],
) -> Table:
    """What a converter's operations make of its sources, as views."""
    patterns = list(converter.source_patterns)
    targets = list(converter.target_patterns)
    held: dict[str, list[Source]] = {p: sources[p] for p in patterns if p in sources}
    if len(held) < len(patterns):
        raise _UnknownError("parts lack")
    names_out = [target.replace(targets[0], other) for other in targets]
    for operation in converter.operations:
        kind = type(operation).__name__
        if kind == "MergeModulelist" and operation.dim == 0:
            held = {p: [views.stacked(own)] for p, own in held.items()}
        elif kind == "Concatenate":
            every = [source for own in held.values() for source in own]
            held = {patterns[0]: [views.concatenated(every, operation.dim)]}
        elif kind == "Chunk" and operation.num_shards_attribute is None:
            (source,) = next(iter(held.values()))
            each = views.chunks(source, len(targets), operation.dim)
            held = {p: [own] for p, own in zip(targets, each, strict=True)}
        elif kind == "Transpose":
            held = {
                p: [_turned(operation, own, target, names)] for p, own in held.items()
            }
        else:
            raise _UnknownError(kind)
    if len(held) != len(names_out) or any(len(own) != 1 for own in held.values()):
        raise _UnknownError("several tensors of one name")
    made = dict(zip(names_out, (own[0] for own in held.values()), strict=True))
    if any(name in names and names[name] != own.shape for name, own in made.items()):
        raise _UnknownError("other shapes than the model's")
    return made


def _turned(
    operation: Any,
    sources: list[Source],
    target: str,
    names: Mapping[str, tuple[int, ...]],
) -> Source:
    (source,) = sources
    rank = len(source.shape)
    axes = sorted((operation.dim0 % rank, operation.dim1 % rank))
    if operation.check_dims and names.get(target) == source.shape:
        return source
    if axes != [rank - 2, rank - 1]:
        raise _UnknownError("Transpose of outer axes")
    return views.Transposed(source)


def _sane(value: Any, key: str = "", depth: int = 8) -> bool:
    """Whether no number of a config would make a model of untold size."""
    if isinstance(value, Mapping):
        return depth > 0 and all(_sane(v, str(k), depth - 1) for k, v in value.items())
    if isinstance(value, list):
        return depth > 0 and all(_sane(v, key, depth - 1) for v in value)
    if isinstance(value, int) and "theta" not in key:
        count = any(word in key for word in _COUNTS)
        return abs(value) <= (_MAX_COUNT if count else _MAX_NUMBER)
    return True


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """transformers' warnings about a config are not about this merge."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
