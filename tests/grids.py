"""Grids of parameters: thin in `make test`, dense in `make test-long`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def thin(*axes: Iterable[Any]) -> list[Any]:
    """All combinations of values, of which `make test` takes as many as the longest
    axis has: each value of each axis is among them."""
    values = [list(axis) for axis in axes]
    longest = max(map(len, values))
    kept = {tuple(t % len(axis) for axis in values) for t in range(longest)}
    found = []
    for places in itertools.product(*(range(len(axis)) for axis in values)):
        case = pytest.param(*(axis[i] for axis, i in zip(values, places, strict=True)))
        found.append(case if places in kept else slow(case))
    return found


def thinned(cases: Iterable[Any], keep: Callable[[Any], bool]) -> list[Any]:
    """The cases, values or `pytest.param`; those that `keep` refuses are slow."""
    return [case if keep(case) else slow(case) for case in cases]


def slow(case: Any) -> Any:
    """A case of a parametrized test that only `make test-long` runs."""
    if not hasattr(case, "marks"):
        return pytest.param(case, marks=pytest.mark.slow)
    return pytest.param(*case.values, id=case.id, marks=(*case.marks, pytest.mark.slow))
