"""Model-GLUE's selective merging, arXiv 2410.05357: one model after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from m3jax.search.pytrees import align, interpolate, narrowed, widened
from m3jax.search.soup import best_first, own_scores


class Round(NamedTuple):
    """One model's turn: the best coefficient of what there was, and its score."""

    model: int
    coefficient: float
    score: float
    accepted: bool


class Selected(NamedTuple):
    """The merge, the (K,) effective weight of each model in it, its score, the rounds.

    `params` equals Σ weights_k θ_k, in the dtypes of the first model taken.
    """

    params: Any
    weights: list[float]
    score: float
    rounds: list[Round]


def selective_merge(
    models: Sequence[Any],
    evaluate: Callable[[Any], float],
    *,
    grid: Sequence[float],
    order: str = "score",
) -> Selected:
    """Merges model after model, each with the best coefficient of a grid.

    For each next model the candidates are c current + (1 − c) next, c on the grid; the
    last of the best c is taken, and kept if its score is at least the best so far.
    Agrees with the loop of Model-GLUE's heuristic_merge.py, except that the release
    saves the merge of the grid's last value whatever won.

    Args:
      models: K pytrees with the same leaves.
      evaluate: the score of a pytree, higher is better.
      grid: coefficients in [0, 1]; the paper's are 0.1, 0.2, ..., 0.9.
      order: ``score``, the best single model first, or ``given`` (ours).

    Raises:
      ValueError: another order, an empty grid, or a coefficient outside [0, 1].
      CheckpointError: the pytrees do not fit each other.
    """
    if order not in ("score", "given"):
        raise ValueError(f"order={order!r} is neither 'score' nor 'given'")
    if not len(grid) or not all(0 <= c <= 1 for c in grid):
        raise ValueError(f"grid={list(grid)} needs one number or more, each in [0, 1]")
    align(models)
    by_score = order == "score"
    single = own_scores(models if by_score else models[:1], evaluate)
    first, *others = best_first(single) if by_score else range(len(models))
    current, score = widened(models[first]), single[first]
    weights = [float(k == first) for k in range(len(models))]
    rounds = []
    for k in others:
        reached, c, best = None, 0.0, None
        for trial in grid:
            candidate = interpolate(current, models[k], float(trial))
            trial_score = float(evaluate(narrowed(candidate, models[first])))
            if reached is None or trial_score >= reached:
                reached, c, best = trial_score, float(trial), candidate
        assert reached is not None
        accepted = reached >= score
        rounds.append(Round(k, c, reached, accepted))
        if accepted:
            current, score = best, reached
            weights = [c * weight for weight in weights]
            weights[k] += 1 - c
    return Selected(narrowed(current, models[first]), weights, score, rounds)
