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
    if len(responses) != len(alphas) or len({len(row) for row in responses}) != 1:
        raise ValueError(
            f"responses has rows of {[len(row) for row in responses]} answers; one row "
            f"of the same length for each of the {len(alphas)} alphas is needed"
        )
    changes = _changes(responses)
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


def most_stable(responses: Sequence[Sequence[Any]], ratios: Sequence[float]) -> int:
    """Finds the merge whose answers change least around its ratio, as `ratios` lie.

    The minimum of (d_{i−1} + d_i + 1) / (ratio_{i+1} − ratio_{i−1}) over the ratios
    with two neighbours, with d as for `response_stability`: of ratios that lie evenly
    it is the paper's choice. Ours: changes are counted per unit of ratio, since drawn
    ratios lie unevenly, and there is one more, so that of neighbourhoods in which
    nothing changes the widest is the best.

    Args:
      responses: [merge][sample].
      ratios: of each merge, in any order; of equal ones the first counts.

    Returns:
      The place of the merge.

    Raises:
      ValueError: fewer than three ratios.
    """
    places = {ratio: place for place, ratio in reversed([*enumerate(ratios)])}
    rising = sorted(places)
    if len(rising) < 3:
        raise ValueError(f"{len(rising)} ratios differ; 3 or more are needed")
    counts = [sum(own) for own in _changes([responses[places[r]] for r in rising])]
    rates = [
        (below + above + 1) / (rising[i + 2] - rising[i])
        for i, (below, above) in enumerate(itertools.pairwise(counts))
    ]
    return places[rising[1 + rates.index(min(rates))]]


def _changes(responses: Sequence[Sequence[Any]]) -> list[list[bool]]:
    """Which answers differ between each row and the next."""
    answers = [[str(answer).lower() for answer in row] for row in responses]
    return [
        [a != b for a, b in zip(low, high, strict=True)]
        for low, high in itertools.pairwise(answers)
    ]
