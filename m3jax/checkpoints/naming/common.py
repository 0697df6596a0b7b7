"""Tensors of several checkpoints by the names of the first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from m3jax.checkpoints.naming import (
    buffers,
    layouts,
    prefixes,
    registry,
    rules,
    ties,
    wrappers,
)
from m3jax.checkpoints.naming.table import Table, counted
from m3jax.checkpoints.source import Source
from m3jax.checkpoints.sources import views

if TYPE_CHECKING:
    from m3jax.checkpoints.folder import Checkpoint

Read = tuple[Table, list[str]]  # a checkpoint's tensors, and what was done to them


@dataclasses.dataclass(frozen=True)
class Named:
    """Checkpoints whose tensors have the first one's names, as far as they have any.

    Attributes:
      tables: of each checkpoint, by name.
      copied: tensors that are the first's whatever others hold.
      config: changes to config.json.
      notes: what was done, a line each.
    """

    tables: list[Table]
    copied: frozenset[str]
    config: dict[str, Any]
    notes: list[str]


def common(
    checkpoints: Sequence[Checkpoint],
    rename: Sequence[str] = (),
    passed_over: Callable[[str], bool] = lambda name: False,
    keep_buffers: bool = False,
) -> Named:
    """Finds each tensor of the first checkpoint in the others.

    Args:
      checkpoints: the first gives the names; a mismatch is for the caller to see.
      rename: the user's rules, for names that the first does not have.
      passed_over: names that nobody needs to have.
      keep_buffers: treat buffers as any tensor.

    Raises:
      CheckpointError: two tensors of a checkpoint would get one name.
    """
    notes: list[str] = []
    tables: list[Table] = []
    used: set[str] = set()
    for checkpoint in checkpoints:
        table, line = wrappers.unwrap(checkpoint.tensors)
        lines = [line] * bool(line)
        if tables:
            table, more, own = rules.apply(table, tables[0], rename)
            lines, used = lines + more, used | own
        notes += [f"{checkpoint.name}: {line}" for line in lines]
        tables.append(table)
    notes += [
        f"rename: {rule!r} matches no tensor" for rule in rename if rule not in used
    ]
    if any(table.keys() != tables[0].keys() for table in tables):
        _match(checkpoints, tables, passed_over, notes)
    copied: frozenset[str] = frozenset()
    if not keep_buffers:
        copied = _buffers(tables, notes, checkpoints[0].name)
    configs = [checkpoint.config for checkpoint in checkpoints]
    names = [checkpoint.name for checkpoint in checkpoints]
    tables, config, lines = ties.resolve(tables, configs, names)
    return Named(tables, copied, config, [*notes, *lines])


def _match(
    checkpoints: Sequence[Checkpoint],
    tables: list[Table],
    passed_over: Callable[[str], bool],
    notes: list[str],
) -> None:
    """Renames the tensors of `tables` to the first's names, where they are others."""
    for i, checkpoint in enumerate(checkpoints):
        if i and not _same(tables[0], tables[i], passed_over):
            tables[i], lines = prefixes.fit(tables[i], tables[0])
            notes += [f"{checkpoint.name}: {line}" for line in lines]
    canonical: list[Read] = [(table, []) for table in tables]
    if not all(_same(tables[0], table, passed_over) for table in tables):
        plain, canonical = canonical, _fused(canonical)
        if not all(_same(canonical[0][0], own, passed_over) for own, _ in canonical):
            known = registry.of(checkpoints[0].config)
            # What one step makes of a name may be what the other knows.
            options = [_by(known, own) for own in (plain, canonical) if known]
            canonical = min(
                (canonical, *options), key=lambda own: _apart(own, passed_over)
            )
    first, _ = canonical[0]
    for i, (table, lines) in enumerate(canonical):
        notes += [f"{checkpoints[i].name}: {line}" for line in lines]
        if i and first is not tables[0]:
            tables[i] = _as_first(tables[0], first, table)


def _by(known: registry.Registry, read: Sequence[Read]) -> list[Read]:
    """The tables by the names of transformers' modules."""
    made = [known.canonical(table) for table, _ in read]
    return _fused(
        [
            (prefixes.fit(table, made[0][0])[0], [*before, *lines])
            for (_, before), (table, lines) in zip(read, made, strict=True)
        ]
    )


def _fused(read: Sequence[Read]) -> list[Read]:
    """The tables with the tensors in which others have several of theirs."""
    tables = [table for table, _ in read]
    made = [layouts.fuse(table, tables) for table in tables]
    return [
        (table, [*before, *lines])
        for (_, before), (table, lines) in zip(read, made, strict=True)
    ]


def _same(a: Table, b: Table, passed_over: Callable[[str], bool]) -> bool:
    """Whether names are equal, but for those that may be missing or are no weights."""
    alone = [
        [
            name
            for name in own.keys() - other.keys()
            if not passed_over(name) and not buffers.is_buffer(name, own[name])
        ]
        for own, other in ((a, b), (b, a))
    ]
    if all(alone):  # a name on each side may be one tensor's
        return False
    return all(ties.may_lack(name) for names in alone for name in names)


def _apart(read: Sequence[Read], passed_over: Callable[[str], bool]) -> int:
    """How many names the tables do not have in common."""
    every = set[str]().union(*(table for table, _ in read))
    shared = every.intersection(*(table for table, _ in read))
    return sum(not passed_over(name) for name in every - shared)


def _as_first(
    stored: Mapping[str, Source], canonical: Table, other: Mapping[str, Source]
) -> Table:
    """Another checkpoint's tensors as the first stores them.

    Args:
      stored: the first's tensors.
      canonical: the same, under the names that `other` has.
      other: tensors of another checkpoint.
    """
    found: views.Found = {}
    left = dict(other)
    leaves = {id(source) for source in stored.values()}
    for name, made in canonical.items():
        # A stored tensor of another shape is a mismatch that the caller sees.
        if name in left and (made.shape == left[name].shape or id(made) in leaves):
            views.inverted(made, left.pop(name), found)
    table: Table = {}
    for name, source in stored.items():
        entries = found.get(id(source))
        whole = views.gathered(entries) if entries else None
        if whole is not None:
            table[name] = whole
    return left | table


def _buffers(tables: list[Table], notes: list[str], first: str) -> frozenset[str]:
    """Takes buffers out of all tables but the first, whose are copied."""
    copied = {n: s for n, s in tables[0].items() if buffers.is_buffer(n, s)}
    differ: set[str] = set()
    for table in tables[1:]:
        own = {n: table.pop(n) for n in list(table) if buffers.is_buffer(n, table[n])}
        differ |= own.keys() ^ copied.keys()
        differ |= {
            name
            for name in own.keys() & copied.keys()
            if (own[name].dtype, own[name].shape)
            != (copied[name].dtype, copied[name].shape)
        }
    if differ:
        notes.append(
            f"{counted(sorted(differ))} in some checkpoints alone, no weights but what "
            f"follows from config.json: as in {first}"
        )
    return frozenset(copied)
