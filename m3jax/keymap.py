"""Merges models of different architectures, whose tensors have other names and layouts.

    merged = m3jax.keymap.merge(cogvlm, mplug_owl, keymap, alpha=0.6)

A keymap says which of the source's tensors a tensor of the target is merged with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from m3jax.checkpoints.errors import shown
from m3jax.checkpoints.formats import tree
from m3jax.search.pytrees import alike, is_floating, weighted_sum

_NUMBER = "{i}"
_FIELDS = {"sources", "axis", "slice", "transpose"}


def merge(target: Any, source: Any, keymap: Mapping[str, Any], alpha: float) -> Any:
    """AdaMMS's merge of two architectures, arXiv 2503.23733.

    θ = α θ_target + (1 − α) θ_source for the tensors that the keymap names; all others
    stay the target's. α always multiplies the target: 1 gives its bytes. Agrees with
    THUNLP-MT/AdaMMS, except that two of its scripts have α the other way round and one
    shrinks tensors that have no partner.

    Args:
      target, source: pytrees.
      keymap: {name in the target: rule}. A rule is a name in the source; a list of
        names, put together on axis 0; or {"sources": [...], "axis": 0, "slice": [start,
        stop], "transpose": False}: put together on the axis, cut along it, transposed.
        ``{i}`` stands for the same number on both sides.
      alpha: α in [0, 1].

    Returns:
      A pytree of the target's structure and dtypes.

    Raises:
      ValueError: α is outside [0, 1], a rule is malformed or names no tensor, or the
        shapes do not fit; before anything is computed.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} needs a number from 0 to 1")
    leaves, rebuild = tree.flatten(target)
    others, _ = tree.flatten(source)
    rules = _resolved(keymap, leaves, others)
    merged = []
    for name, leaf in leaves.items():
        if name in rules and alpha != 1:
            parts = [others[part] for part in rules[name]["sources"]]
            partner = _assembled(rules[name], parts)
            leaf = weighted_sum((leaf, partner), (alpha, 1 - alpha)).astype(
                jnp.result_type(leaf)
            )
        merged.append(leaf)
    return rebuild(merged)


def _resolved(
    keymap: Mapping[str, Any], target: Mapping[str, Any], source: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The rule of each tensor of the target, with every name and shape looked at."""
    rules: dict[str, dict[str, Any]] = {}
    for pattern, given in keymap.items():
        rule = _rule(pattern, given)
        found = _matches(pattern, target)
        if not found:
            raise ValueError(
                f"the keymap's {shown(pattern)} is the name of no tensor of the target"
            )
        for name, number in found.items():
            if name in rules:
                raise ValueError(f"the keymap names {shown(name)} more than once")
            sources = [text.replace(_NUMBER, number) for text in rule["sources"]]
            rules[name] = {**rule, "sources": sources}
            _check(name, rules[name], target, source)
    return rules


def _rule(pattern: str, given: Any) -> dict[str, Any]:
    rule = dict(given) if isinstance(given, Mapping) else {"sources": given}
    if isinstance(rule.get("sources"), str):
        rule["sources"] = [rule["sources"]]
    sources = rule.get("sources")
    if not sources or not all(isinstance(text, str) for text in sources):
        raise ValueError(f"the keymap's rule of {shown(pattern)} names no source")
    if set(rule) - _FIELDS:
        raise ValueError(
            f"the keymap's rule of {shown(pattern)} has {sorted(set(rule) - _FIELDS)}; "
            f"{sorted(_FIELDS)} are allowed"
        )
    if any(_NUMBER in text for text in sources) and _NUMBER not in pattern:
        raise ValueError(f"{shown(pattern)} lacks the {_NUMBER} of its sources")
    return {"axis": 0, "slice": None, "transpose": False, **rule}


def _matches(pattern: str, names: Mapping[str, Any]) -> dict[str, str]:
    """The names that a pattern stands for, and the number in each."""
    if _NUMBER not in pattern:
        return {pattern: ""} if pattern in names else {}
    first, *others = map(re.escape, pattern.split(_NUMBER))
    expression = re.compile(first + r"(\d+)" + r"\1".join(others))
    found = {name: expression.fullmatch(name) for name in names}
    return {name: match[1] for name, match in found.items() if match}


def _check(
    name: str,
    rule: Mapping[str, Any],
    target: Mapping[str, Any],
    source: Mapping[str, Any],
) -> None:
    pair = f"{shown(name)} of the target and {', '.join(map(shown, rule['sources']))}"
    missing = [part for part in rule["sources"] if part not in source]
    if missing:
        raise ValueError(f"{pair} of the source: the source lacks {shown(missing[0])}")
    parts = [source[part] for part in rule["sources"]]
    if not all(map(is_floating, (target[name], *parts))):
        raise ValueError(f"{pair} of the source are not all tensors of floats")
    shapes = [jnp.shape(part) for part in parts]
    wanted, axis, cut = jnp.shape(target[name]), rule["axis"], rule["slice"]
    outside = {shape[:axis] + shape[axis + 1 :] for shape in shapes}
    fits = all(0 <= axis < len(shape) for shape in shapes) and len(outside) == 1
    if fits and cut is not None:
        fits = 0 <= cut[0] <= cut[1] <= sum(shape[axis] for shape in shapes)
    if len(shapes) == 1 and not shapes[0] and cut is None:
        fits = True  # a scalar has no axis to be put together on
    if fits:
        made = jax.eval_shape(lambda *x: _assembled(rule, x), *parts).shape
        if made == wanted:
            return
    raise ValueError(
        f"{pair} of the source do not fit: {wanted} is wanted, the source has "
        f"{', '.join(map(str, shapes))} (axis={axis}, slice={cut}, "
        f"transpose={rule['transpose']})"
    )


def _assembled(rule: Mapping[str, Any], parts: Any) -> jax.Array:
    arrays = alike(parts)
    whole = jnp.concatenate(arrays, rule["axis"]) if len(arrays) > 1 else arrays[0]
    if rule["slice"] is not None:
        start, stop = rule["slice"]
        whole = jax.lax.slice_in_dim(whole, start, stop, axis=rule["axis"])
    return whole.T if rule["transpose"] else whole
