"""Hyperband's brackets, arXiv 1603.06560, in exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction


def hyperband_brackets(
    min_budget: float, max_budget: float, eta: float
) -> list[list[tuple[int, float]]]:
    """How many configurations are run at which budget, bracket by bracket.

    s_max = ⌊log(max/min) / log η⌋. Bracket s = s_max, ..., 0 starts with
    n = ⌈η^s (s_max + 1) / (s + 1)⌉ configurations and runs the best ⌊n η^−i⌋ of them at
    the budget max · η^(i−s), i = 0, ..., s. Agrees with `determine_HB` of SMAC 2.4.1,
    except where its floating logarithm loses a bracket: (1, 243, 3) has six.

    Args:
      min_budget, max_budget: in any unit, such as examples; cut to integers by whoever
        needs integers.
      eta: what a rung divides the number of configurations by.

    Returns:
      Per bracket (configurations, budget) per rung.

    Raises:
      ValueError: unless 0 < min ≤ max and eta > 1, all finite.
    """
    if not (0 < min_budget <= max_budget < math.inf and 1 < eta < math.inf):
        raise ValueError(
            f"min_budget={min_budget}, max_budget={max_budget}, eta={eta}: "
            "0 < min_budget <= max_budget and eta > 1 are needed"
        )
    rate, most = Fraction(eta), Fraction(max_budget)
    ratio, last = most / Fraction(min_budget), 0
    while rate ** (last + 1) <= ratio:
        last += 1
    return [
        [
            (
                math.floor(math.ceil(rate**s * (last + 1) / (s + 1)) / rate**i),
                float(most * rate ** (i - s)),
            )
            for i in range(s + 1)
        ]
        for s in range(last, -1, -1)
    ]
