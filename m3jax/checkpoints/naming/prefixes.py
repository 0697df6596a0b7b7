"""One model under two prefixes: with or without its base model's, or another order.

GPT-2 stands on the hub as ``h.0.…`` and is saved as ``transformer.h.0.…``; a model of
text and images was ``language_model.model.…`` and is ``model.language_model.…``. The
pairs of prefixes are found in the names themselves, so no table has to know the
architecture.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping

from m3jax.checkpoints.naming.table import Table, counted, fits
from m3jax.checkpoints.source import Source

_LONGEST = 4  # segments of a prefix
_SHORTEST_TAIL = 2  # segments that names must have in common: not "weight" alone

Pair = tuple[str, str]


def fit(
    table: Mapping[str, Source], target: Mapping[str, Source]
) -> tuple[Table, list[str]]:
    """Renames tensors by prefixes, where that makes them tensors of `target`.

    The pair of prefixes that explains most names goes first. One prefix must be made
    of the other's words, in any order or with some left out: an encoder never becomes
    a decoder. Names that begin alike but are in `target` as they are speak against a
    pair; pairs that explain the same names equally well are left alone.

    Args:
      table: of a model.
      target: the tensors that are wanted.

    Returns:
      The table, and a line for each pair.
    """
    made = dict(table)
    lines: list[str] = []
    while True:
        pair, moved = _best(made, target)
        if pair is None:
            return made, lines
        heads = {_head(name, pair[0]) for name in moved}
        new = {
            name: pair[1] + name.removeprefix(pair[0])
            if name not in target
            and name.startswith(pair[0])
            and (name in moved or _head(name, pair[0]) in heads)
            else name
            for name in made
        }
        if len(set(new.values())) < len(new):
            return made, lines
        made = {new[name]: source for name, source in made.items()}
        lines.append(f"{_in_words(pair)}: {counted(sorted(moved))}")


def _best(
    table: Mapping[str, Source], target: Mapping[str, Source]
) -> tuple[Pair | None, set[str]]:
    """The pair that explains most names, and those."""
    tails: dict[str, list[str]] = collections.defaultdict(list)
    for name in target:
        if name not in table:
            for prefix, tail in _splits(name):
                tails[tail].append(prefix)
    explained: dict[Pair, set[str]] = collections.defaultdict(set)
    for name, source in table.items():
        for prefix, tail in _splits(name) if name not in target else ():
            pairs = [
                (prefix, other)
                for other in tails.get(tail, ())
                if _related(prefix, other)
                and fits(source.shape, target[other + tail].shape)
            ]
            for pair in pairs:
                explained[pair].add(name)
            if pairs:
                break  # the longest tail
    plain = [name for name in table if name in target]
    ranked = sorted(
        (
            (len(names), pair)
            for pair, names in explained.items()
            if len(names) >= sum(name.startswith(pair[0]) for name in plain)
        ),
        key=lambda entry: (-entry[0], entry[1]),
    )
    for count, pair in ranked:
        rivals = [other for n, other in ranked if n == count and other != pair]
        if not any(explained[other] & explained[pair] for other in rivals):
            return pair, explained[pair]
    return None, set()


def _splits(name: str) -> Iterator[Pair]:
    """(prefix, tail) at each dot, the longest tail first."""
    words = name.split(".")
    for cut in range(min(_LONGEST, len(words) - _SHORTEST_TAIL) + 1):
        yield "".join(f"{word}." for word in words[:cut]), ".".join(words[cut:])


def _related(a: str, b: str) -> bool:
    """Whether one prefix is made of the other's words."""
    mine, yours = (collections.Counter(p.split(".")[:-1]) for p in (a, b))
    return a != b and (mine <= yours or yours <= mine)


def _in_words(pair: Pair) -> str:
    if not pair[1]:
        return f"prefix {pair[0]} left off"
    return (
        f"prefix {pair[0]} read as {pair[1]}" if pair[0] else f"prefix {pair[1]} added"
    )


def _head(name: str, prefix: str) -> str:
    return name.removeprefix(prefix).partition(".")[0]
