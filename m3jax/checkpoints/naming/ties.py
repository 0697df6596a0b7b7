"""Tensors that are another one in the loaded model: heads tied to their embedding.

A checkpoint stores such a tensor once, twice, or under the other name alone, and says
so in config.json (`tie_word_embeddings`) or leaves it to its architecture's default.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from m3jax.checkpoints.naming import registry
from m3jax.checkpoints.naming.table import Table
from m3jax.checkpoints.sources.views import equal

_HEADS = re.compile(
    r"(.*\.)?(lm_head|lm_head\.decoder|embed_out|proj_out|output_projection|vocab_projector"
    r"|generator_lm_head|cls\.predictions\.decoder|decoder\.output_projection)\.weight"
)
_EMBEDDINGS = re.compile(
    r"(.*\.)?(shared|embed_tokens|wte|word_embeddings|tok_embeddings|embed_in)\.weight"
)
_SHARED = re.compile(r"(.*\.)?(encoder|decoder)\.embed_tokens\.weight")
_BIASES = re.compile(r"(.*\.)?(cls\.predictions|lm_head)\.decoder\.bias")
# What their names end with, all but a few of which are told apart at once.
_ENDS = (
    *("shared.weight", "embed_tokens.weight", "wte.weight", "word_embeddings.weight"),
    *("tok_embeddings.weight", "embed_in.weight", "lm_head.weight", "decoder.weight"),
    *("embed_out.weight", "proj_out.weight", "output_projection.weight"),
    *("vocab_projector.weight", "decoder.bias", "predictions.bias", "lm_head.bias"),
)
FIELD = "tie_word_embeddings"
Pair = tuple[str, str, bool]  # an alias, what it is a copy of; whether config decides


def may_lack(name: str) -> bool:
    """Whether a tensor may be another one, so that a checkpoint need not store it."""
    return any(own.fullmatch(name) for own in (_HEADS, _SHARED, _BIASES))


def said(config: Mapping[str, Any] | None) -> bool | None:
    """What config.json says of the head, or its text_config; None: nothing."""
    config = config or {}
    text = config.get("text_config")
    for own in (config, text if isinstance(text, dict) else {}):
        if isinstance(own.get(FIELD), bool):
            return own[FIELD]
    return None


def is_tied(config: Mapping[str, Any] | None) -> bool:
    """Whether a loader takes the embedding for a head that is not stored.

    As config.json says, or its architecture's default in transformers.
    """
    known = said(config)
    if known is None:
        known = registry.ties_by_default(config)
    return known is True


def resolve(
    tables: Sequence[Table],
    configs: Sequence[Mapping[str, Any] | None],
    names: Sequence[str],
) -> tuple[list[Table], dict[str, Any], list[str]]:
    """Brings all tables to one form of every tied tensor.

    Where all heads are their embeddings bit for bit, none is kept; else each model gets
    a head, a tied one its embedding, and the output is untied.

    Args:
      tables: of the checkpoints, the first's names.
      configs, names: of the same checkpoints.

    Returns:
      The tables, changes to config.json, and what was done.
    """
    made = [dict(table) for table in tables]
    changes: dict[str, Any] = {}
    lines: list[str] = []
    named = [*_pairs(made)]
    for alias, original, by_config in [*named, *_known(made, configs, named)]:
        some = [t for t in made if alias in t]
        everywhere = all(alias in table and original in table for table in made)
        if everywhere and not (
            by_config and _may_be_tied(made, configs, alias, original)
        ):
            continue
        tied = [not by_config or is_tied(config) for config in configs]
        for table, own, name in zip(made, tied, names, strict=True):
            if alias in table and original not in table and own:
                table[original] = table[alias]
                lines.append(f"{name}: {original} is stored as {alias} alone")
        copies = all(
            original in table and equal(table[alias], table[original]) for table in some
        )
        lacking = [name for t, name in zip(made, names, strict=True) if alias not in t]
        if copies and tied[0]:
            for table in some:
                del table[alias]
            lines.append(
                f"{alias} equals {original} where it is stored, and stays tied"
            )
            continue
        for table, own, name in zip(made, tied, names, strict=True):
            if alias not in table and original in table and own:
                table[alias] = table[original]
                if by_config:
                    lines.append(
                        f"{name}: its head is tied; its embedding is merged as "
                        f"{alias}, and the output has a head of its own"
                    )
                else:
                    lines.append(f"{name}: {original} is read as {alias} too")
        if by_config and tied[0]:
            changes |= untied(configs[0])
            if not lacking:
                lines.append(f"{alias} differs from {original}: the output is untied")
    return made, changes, lines


def _pairs(tables: Sequence[Table]) -> Iterator[Pair]:
    """Those that names alone tell, of all tables."""
    shapes = {
        name: own.shape
        for table in tables
        for name, own in table.items()
        if name.endswith(_ENDS)
    }
    for name in sorted(shapes):
        if match := _SHARED.fullmatch(name):
            shared = f"{match[1] or ''}shared.weight"
            if shapes.get(shared) == shapes[name]:
                yield name, shared, False
        elif _BIASES.fullmatch(name):
            original = name.removesuffix("decoder.bias") + "bias"
            if original in shapes:
                yield name, original, False
    for name in sorted(shapes):
        if _HEADS.fullmatch(name):
            found = [
                other
                for other in shapes
                if _EMBEDDINGS.fullmatch(other)
                and shapes[other][1:] == shapes[name][1:]
                and "encoder." not in other
            ]
            best = [n for n in found if n.endswith("shared.weight")] or found
            if len(best) == 1:
                yield name, best[0], True


def _known(
    tables: Sequence[Table],
    configs: Sequence[Mapping[str, Any] | None],
    named: Sequence[Pair],
) -> Iterator[Pair]:
    """Those that transformers ties in these models, of names that some tables lack and
    that are not in the pairs `named`."""
    every = set[str]().union(*tables)
    told = {name for alias, original, _ in named for name in (alias, original)}
    lacking = every.difference(set(tables[0]).intersection(*tables)) - told
    for config in configs if lacking else ():
        known = registry.of(config)
        if known is None:
            continue
        for names in known.tied.items():
            # The base model's prefix may be off.
            bare = [name.removeprefix(f"{known.prefix}.") for name in names]
            for alias, original in (names, bare):
                pair = {alias, original}
                if pair & lacking and pair <= every and alias not in told:
                    told.add(alias)
                    yield alias, original, True


def _may_be_tied(
    tables: Sequence[Table],
    configs: Sequence[Mapping[str, Any] | None],
    alias: str,
    original: str,
) -> bool:
    """Whether a head that all store may be none: as the first says, or as all are."""
    known = said(configs[0])
    if known is not None:
        return known
    return all(equal(table[alias], table[original]) for table in tables)


def untied(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Changes to config.json for a head of its own."""
    text = (config or {}).get("text_config")
    inner = isinstance(text, dict) and FIELD in text
    return {FIELD: False, **({f"text_config.{FIELD}": False} if inner else {})}
