"""Greedy soup, arXiv 2203.05482: add a model where the average then scores better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from m3jax.search.pytrees import align, interpolate, narrowed, widened


class Trial(NamedTuple):
    """A candidate: the soup with `model`, its score, and whether it was kept."""

    model: int
    score: float
    accepted: bool


class Soup(NamedTuple):
    """The average of some models, in the dtypes of the best one.

    Attributes:
      params: the pytree.
      members: which models are in it, in the order in which they came.
      score: of the soup.
      trials: the candidates in order.
    """

    params: Any
    members: list[int]
    score: float
    trials: list[Trial]


def greedy_soup(
    models: Sequence[Any],
    evaluate: Callable[[Any], float],
    *,
    scores: Sequence[float] | None = None,
) -> Soup:
    """Averages models, best first, as long as each makes the average better.

    The candidate of the n + 1st model is n/(n+1) soup + 1/(n+1) model; it is kept if
    its score is strictly greater. Agrees with the loop of mlfoundations/model-soups;
    of two equal single scores the earlier model comes first (ours; the released sort
    takes the later). The soup is carried in float32, so that rounding to the models'
    dtype does not add up.

    Args:
      models: K pytrees with the same leaves; leaves that are no floats are the first
        member's.
      evaluate: the score of a pytree, higher is better.
      scores: of the single models, K numbers; by default each is evaluated.

    Raises:
      ValueError: there are not K scores.
      CheckpointError: the pytrees do not fit each other.
    """
    align(models)
    single = own_scores(models, evaluate, scores)
    best, *others = best_first(single)
    soup, members, score = widened(models[best]), [best], single[best]
    trials = []
    for k in others:
        count = len(members)
        candidate = interpolate(soup, models[k], count / (count + 1))
        reached = float(evaluate(narrowed(candidate, models[best])))
        accepted = reached > score
        trials.append(Trial(k, reached, accepted))
        if accepted:
            soup, score = candidate, reached
            members.append(k)
    return Soup(narrowed(soup, models[best]), members, score, trials)


def own_scores(
    models: Sequence[Any],
    evaluate: Callable[[Any], float],
    scores: Sequence[float] | None = None,
) -> list[float]:
    """The score of each model alone, as given or evaluated."""
    if scores is None:
        return [float(evaluate(model)) for model in models]
    if len(scores) != len(models):
        raise ValueError(f"{len(scores)} scores were given for {len(models)} models")
    return [float(score) for score in scores]


def best_first(scores: Sequence[float]) -> list[int]:
    """Indices by falling score, equal ones in order, NaN last."""
    return sorted(
        range(len(scores)), key=lambda k: (scores[k] != scores[k], -scores[k])
    )
