"""config.json of a model whose layers come from slices: numbers and lists by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from m3jax.checkpoints.folder import Checkpoint
from m3jax.engine.slices import Stack

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")
_PARTS = ("encoder", "decoder")  # of one config
_SECTIONS = {"vision": ("vis", "image"), "audio": ("audio", "speech")}
_OF_TEXT = ("text_config", "llm_config", "language_config", "decoder")
# Lists that may be as long as there are layers, and are none of them.
_OTHER_LISTS = ("architectures", "token_id", "token_ids", "tokens", "shape", "size")
_INDEX_LISTS = ("_layers", "_idxs", "_indices", "_ids", "_indexes")
# What counts layers, and holds no longer where they have moved.
_RHYTHMS = (
    "attn_layer_period",
    "decoder_sparse_step",
    "expert_layer_period",
    "first_k_dense_replace",
    "full_attention_interval",
    "global_attn_every_n_layers",
    "interleave_moe_layer_step",
    "max_window_layers",
    "no_rope_layer_interval",
    "num_kv_shared_layers",
    "sliding_window_pattern",
)


def follow(
    first: Checkpoint,
    stacks: Sequence[Stack],
    changes: dict[str, Any],
    notes: list[str],
) -> None:
    """Makes config.json follow the slices: the number of layers, and what has an entry
    for each of them, or names some by their places.

    Args:
      first: whose config.json goes along.
      stacks: the output's layers.
      changes: to config.json; gets more.
      notes: for the user; gets more.
    """
    if first.config is None:
        return
    for stack in stacks:
        path, key = _count_of(first.config, stack.module)
        layers = [layer for _, layer in stack.layers]
        if key is None:
            if stack.layers and stack.module == "":
                notes.append(
                    f"config.json of {first.name} names no number of layers that could "
                    f"follow the slices; the output has {len(layers)}"
                )
            continue
        section = _at(first.config, path)
        old = section[key]
        if layers == list(range(old)):
            continue
        changed = {key: len(layers), **_lists(stack, path, old, first)}
        notes += [
            f"config.json: {name}={section[name]!r} counts layers, and stays: see "
            "whether it is right for the layers of the slices"
            for name in _RHYTHMS
            if section.get(name) and _counts(section, name)
        ]
        if path is None:
            changes |= changed
        else:
            changes[path] = {**section, **changes.get(path, {}), **changed}


def _count_of(config: Mapping[str, Any], module: str) -> tuple[str | None, str | None]:
    """Where the number of a module's layers stands: in which section, by which key."""

    def found(path: str | None, keys: Sequence[str]) -> str | None:
        section = _at(config, path)
        return next((k for k in keys if type(section.get(k)) is int), None)

    for part in _PARTS:
        if part in module:
            keys = (f"{part}_layers", f"num_{part}_layers", *_COUNTS)
            return None, found(None, keys)
    sections = [name for name, own in config.items() if isinstance(own, dict)]
    for name, words in _SECTIONS.items():
        if any(word in module for word in words):
            wanted = next((own for own in sections if name in own), None)
            return (wanted, found(wanted, _COUNTS)) if wanted else (None, None)
    for path in (None, *(own for own in _OF_TEXT if own in sections)):
        key = found(path, _COUNTS)
        if key is not None:
            return path, key
    return None, None


def _lists(
    stack: Stack, path: str | None, old: int, first: Checkpoint
) -> dict[str, Any]:
    """The lists of a section that have an entry by layer, or the places of some."""
    changed: dict[str, Any] = {}
    for name, value in _at(first.config or {}, path).items():
        if not isinstance(value, list) or name.endswith(_OTHER_LISTS):
            continue

        def of(owner: Checkpoint, name: str = name, own: Any = value) -> list[Any]:
            theirs = _at(owner.config or {}, path).get(name)
            return theirs if isinstance(theirs, list) else own

        if name.endswith(_INDEX_LISTS) and _are_places(value, old):
            places = enumerate(stack.layers)
            changed[name] = [i for i, (own, layer) in places if layer in of(own)]
        elif len(value) == old:
            rows = [(of(own), layer) for own, layer in stack.layers]
            if all(layer < len(own) for own, layer in rows):
                changed[name] = [own[layer] for own, layer in rows]
    return changed


def _are_places(value: list[Any], count: int) -> bool:
    numbers = all(type(own) is int and 0 <= own < count for own in value)
    return numbers and sorted(set(value)) == value and value != []


def _counts(section: Mapping[str, Any], name: str) -> bool:
    """Whether such a field has an effect."""
    if name == "max_window_layers":
        return bool(section.get("use_sliding_window")) and "layer_types" not in section
    if name == "decoder_sparse_step":
        return section[name] != 1
    listed = name in ("sliding_window_pattern", "full_attention_interval")
    return not (listed and "layer_types" in section)


def _at(config: Mapping[str, Any], path: str | None) -> Mapping[str, Any]:
    own = config if path is None else config.get(path)
    return own if isinstance(own, Mapping) else {}
