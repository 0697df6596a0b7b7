"""The faults that `make mutations` plants can be planted in the source as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutations.faults import FAULTS, Fault

import m3jax


def test_there_are_enough():
    assert len(FAULTS) >= 10
    assert len({fault.promise for fault in FAULTS.values()}) == len(FAULTS)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_the_line_is_there_once(fault: Fault):
    text = (Path(m3jax.__file__).parent / fault.file).read_text()
    assert text.count(fault.old) == 1
    assert fault.old not in fault.new
    for test in fault.tests:
        assert (Path(__file__).parent / test.partition("::")[0]).exists()
