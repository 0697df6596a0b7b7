"""AdaMMS's choice of α without labels, arXiv 2503.23733: where answers change least."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Stability(NamedTuple):
    """How many answers change at each α that has a count, and the α of the fewest."""

    counts: list[float]
    best: list[float]


def response_stability(
    responses: Sequence[Sequence[Any]] | Mapping[float, Sequence[Any]],
    alphas: Sequence[float],
    *,
    rule: str = "sum",
    smooth: int = 0,
) -> Stability:
    """Finds the α at which a merge's answers differ least from those of its neighbours.

    Answers are compared as `str`, lower-cased, not stripped. d_i is the number of
    samples whose answers at α_i and α_{i+1} differ.
    ``sum`` (the paper): d_{i−1} + d_i for each α with two neighbours.
    ``both`` (the released script): samples that differ from either neighbour, each
    counted once, for the same α.
    ``previous``: d_{i−1}, for each α but the first.

    Args:
      responses: [α][sample], in the order of `alphas` or by α. The paper has some 100
        samples.
      alphas: rising; the paper's are 0.4 to 1.0 by 0.1.
      smooth: w; each count becomes the mean of those up to w places away, as far as
        there are any.

    Returns:
      The counts, and every α at their minimum, rising.

    Raises:
      ValueError: fewer than three α, α that do not rise, another rule, or answers whose
        numbers differ.
    """
    if len(alphas) < 3:
        raise ValueError(f"{len(alphas)} alphas were given; 3 or more are needed")
    if any(b <= a for a, b in itertools.pairwise(alphas)):
        raise ValueError(f"alphas={list(alphas)} do not rise")
    if rule not in ("sum", "both", "previous"):
        raise ValueError(f"rule={rule!r} is none of 'sum', 'both' and 'previous'")
    if smooth < 0:
        raise ValueError(f"smooth={smooth} needs 0 or more")
    if isinstance(responses, Mapping):
        if set(responses) != set(alphas):
            raise ValueError("responses has other alphas than `alphas`")
        responses = [responses[alpha] for alpha in alphas]
    answers = [[str(answer).lower() for answer in row] for row in responses]
    if len(answers) != len(alphas) or len({len(row) for row in answers}) != 1:
        raise ValueError(
            f"responses has rows of {[len(row) for row in answers]} answers; one row "
            f"of the same length for each of the {len(alphas)} alphas is needed"
        )
    changes = [
        [a != b for a, b in zip(low, high, strict=True)]
        for low, high in itertools.pairwise(answers)
    ]
    if rule == "previous":
        counts, tried = [float(sum(change)) for change in changes], alphas[1:]
    else:
        tried, counts = alphas[1:-1], []
        for below, above in itertools.pairwise(changes):
            pairs = zip(below, above, strict=True)
            counts.append(
                float(sum(a + b if rule == "sum" else a or b for a, b in pairs))
            )
    around = [counts[max(i - smooth, 0) : i + smooth + 1] for i in range(len(counts))]
    counts = [sum(window) / len(window) for window in around]
    fewest = min(counts)
    best = [a for a, n in zip(tried, counts, strict=True) if n == fewest]
    return Stability(counts, best)
