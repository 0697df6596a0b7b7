"""Experts and projections: one by one in one checkpoint, in one tensor in another.

    experts.gate_up_proj (E, 2I, H)   experts.N.gate_proj.weight over …up_proj.weight
    experts.down_proj    (E, H, I)    experts.N.down_proj.weight
    qkv_proj, in_proj_               q_proj over k_proj over v_proj
    gate_up_proj                     gate_proj over up_proj

with Mixtral's w1, w3, w2 for gate, up, down. These orders are those of transformers'
modules; the shapes are checked. What is turned or interleaved, `registry` knows.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

from m3jax.checkpoints.naming.table import Table, counted
from m3jax.checkpoints.source import Source
from m3jax.checkpoints.sources import views

_EXPERTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
_ROWS = {
    "qkv_proj.": ("q_proj.", "k_proj.", "v_proj."),
    "gate_up_proj.": ("gate_proj.", "up_proj."),
    "in_proj_": ("q_proj.", "k_proj.", "v_proj."),
}
_FUSED_EXPERTS = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")
_FUSED_ROWS = re.compile(r"(.*\.)(qkv_proj\.|gate_up_proj\.|in_proj_)(weight|bias)")


def fuse(
    table: Mapping[str, Source], others: Sequence[Mapping[str, Source]]
) -> tuple[Table, list[str]]:
    """Makes the tensors in which other checkpoints have several of this one's.

    Args:
      table: of a checkpoint.
      others: those whose layout counts.

    Returns:
      The table, with views in the place of what they are made of, and what was done.
    """
    made, fused = dict(table), []
    for name, source in itertools.chain(*(other.items() for other in others)):
        if name in made:
            continue
        for parts in _candidates(name, made):
            whole = _together(name, parts, made)
            if whole.shape == source.shape:
                for part in itertools.chain(*parts):
                    del made[part]
                made[name] = whole
                fused.append(name)
                break
    return made, [
        f"several tensors read as one of: {counted(sorted(fused))}"
    ] if fused else []


def _candidates(
    name: str, table: Mapping[str, Source]
) -> Iterator[Sequence[Sequence[str]]]:
    """The names that may make up a fused tensor: of each expert, or of one."""
    if match := _FUSED_EXPERTS.fullmatch(name):
        for words in _EXPERTS[match[2]]:
            parts = []
            for expert in itertools.count():
                own = [f"{match[1]}.{expert}.{word}.weight" for word in words]
                if not all(part in table for part in own):
                    break
                parts.append(own)
            if parts and _alike(parts, table):
                yield parts
    elif match := _FUSED_ROWS.fullmatch(name):
        own = [f"{match[1]}{word}{match[3]}" for word in _ROWS[match[2]]]
        if all(part in table and table[part].shape for part in own) and (
            len({table[part].shape[1:] for part in own}) == 1
        ):
            yield [own]


def _alike(parts: Sequence[Sequence[str]], table: Mapping[str, Source]) -> bool:
    """Whether all experts have the shapes of the first, each a matrix."""
    shapes = {tuple(table[name].shape for name in own) for own in parts}
    (first, *others) = shapes
    return not others and all(len(s) == 2 and s[1] == first[0][1] for s in first)


def _together(
    name: str, parts: Sequence[Sequence[str]], table: Mapping[str, Source]
) -> Source:
    if not _FUSED_EXPERTS.fullmatch(name):
        return views.concatenated([table[part] for part in parts[0]], 0)
    by_word = list(zip(*parts, strict=True))
    each = [views.stacked([table[name] for name in names]) for names in by_word]
    return each[0] if len(each) == 1 else views.concatenated(each, 1)
