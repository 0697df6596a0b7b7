"""docs/SMOLLM2.md: what the explorations found, in two tables."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence

import bench

from m3jax.exploration.search.result import Exploration, Row
from m3jax.exploration.search.scoring import Scored
from m3jax.runs import bootstrap

Scores = Mapping[str, float]
LISTS = ("validation", "test")
LABELS = {"average": "average", "task_arithmetic": "task arithmetic", "ties": "TIES"}
KINDS = {"m3": " + M3", "dare": " + DARE", "m3_dare": " + DARE + M3"}
MEAN = "mean"


def main_table(found: Mapping[str, Exploration], skills: Sequence[str]) -> str:
    """Parents, methods without M3, draws and winners, on both lists of tasks.

    The best of each column is bold; a score that is no loss is better if greater.

    Args:
      found: of recipes ``METHOD_m3``, ``METHOD_dare`` and ``METHOD_m3_dare``.
      skills: the tasks whose mean loss is the objective.
    """
    first = next(iter(found.values()))
    columns = {
        name: [*skills, MEAN, *(t for t in own.scores if t not in skills)]
        for name, own in first.rows[0].scored.items()
    }

    rows: list[tuple[str, list[dict[str, Scores]]]] = [
        (row.name, [_scores(row)]) for row in first.rows if row.kind == "parent"
    ]
    for method, label in LABELS.items():
        own = found[f"{method}_m3"]
        plain, equal = (
            _scores(_row(own, name)) for name in (f"plain {method}", "equal ratios")
        )
        rows.append((label, [plain]))
        if equal != plain:
            rows.append((f"{label}, equal ratios", [equal]))
        for kind, suffix in KINDS.items():
            own, name = found[f"{method}_{kind}"], label + suffix
            rows.append((f"{name}, {len(own.draws)} draws", _scores_of_draws(own)))
            if own.winner.mean_ratios is not None:
                winner = f"{name}, winner (λ = {own.winner.mean_ratios[0]:.2f})"
                rows.append((winner, [_scores(own.rows[-1])]))
    places = [(name, column) for name in LISTS for column in columns[name]]
    texts = [[name] for name, _ in rows]
    for name, column in places:
        values = [
            [_value(scores[name], column, skills) for scores in sets]
            for _, sets in rows
        ]
        means = [round(statistics.fmean(own), 4) for own in values]
        best = min(means) if column in (*skills, MEAN) else max(means)
        for text, own, mean in zip(texts, values, means, strict=True):
            cell = f"{mean:.4f}"
            if len(own) > 1:
                cell += f" ± {statistics.stdev(own):.4f}"
            text.append(f"**{cell}**" if mean == best else cell)
    return bench.table(["", *(f"{n}: {c}" for n, c in places)], texts)


def comparison(
    found: Mapping[str, Exploration], skills: Sequence[str]
) -> tuple[str, str]:
    """A table of M3 against none on test, and a sentence that counts its rows.

    M3 is also held against equal ratios, which are one more way to have ratios that
    sum to 1.
    """
    rows = []
    better_draws = 0
    better, worse = [0, 0], [0, 0]  # than without M3, than equal ratios
    for method, dare in itertools.product(LABELS, (False, True)):
        own = found[f"{method}_m3_dare" if dare else f"{method}_m3"]
        if dare:
            without = _scores_of_draws(found[f"{method}_dare"])
        else:
            without = [_scores(_row(own, f"plain {method}"))]
        plain, drawn = (
            [_value(scores["test"], MEAN, skills) for scores in sets]
            for sets in (without, _scores_of_draws(own))
        )
        better_draws += statistics.fmean(drawn) < statistics.fmean(plain)
        winner, changes = own.rows[-1], []
        for i, name in enumerate((f"plain {method}", "equal ratios")):
            change, low, high = difference(
                winner.scored["test"], _row(own, name).scored["test"], skills, own.seed
            )
            better[i] += high < 0
            worse[i] += low > 0
            changes.append(f"{change:+.4f} [{low:+.4f}, {high:+.4f}]")
        rows.append(
            [
                LABELS[method] + (" + DARE" if dare else ""),
                f"{statistics.fmean(plain):.4f}",
                f"{statistics.fmean(drawn):.4f}",
                f"{min(drawn):.4f}–{max(drawn):.4f}",
                f"{_value(winner.scored['test'].scores, MEAN, skills):.4f}",
                *changes,
            ]
        )
    header = [
        "",
        "without M3",
        "M3, mean",
        "M3, range",
        "M3, winner",
        "winner − without",
        "winner − equal ratios",
    ]
    sentence = (
        f"Of {len(rows)} recipes, M3's mean over draws is below the loss without M3 in "
        f"{better_draws}; the winner is better than the recipe without M3 in "
        f"{better[0]} and worse in {worse[0]}, better than equal ratios in {better[1]} "
        f"and worse in {worse[1]}, as far as an interval that excludes 0 can tell."
    )
    return bench.table(header, rows), sentence


def difference(
    ours: Scored, theirs: Scored, skills: Sequence[str], seed: int
) -> tuple[float, float, float]:
    """Mean loss less that of others, and the ends of its 95 % interval.

    Both are resampled alike, so that what is hard for both cancels.
    """
    means = []
    for scored in (ours, theirs):
        assert scored.examples is not None
        samples = bootstrap.resampled({s: scored.examples[s] for s in skills}, seed)
        means.append(sum(samples.values()) / len(skills))
    ends = bootstrap.interval(means[0] - means[1])
    assert ends is not None
    values = [_value(scored.scores, MEAN, skills) for scored in (ours, theirs)]
    return values[0] - values[1], *ends


def _value(scores: Scores, column: str, skills: Sequence[str]) -> float:
    if column == MEAN:
        return statistics.fmean(scores[skill] for skill in skills)
    return scores[column]


def _row(found: Exploration, name: str) -> Row:
    return next(row for row in found.rows if row.name == name)


def _scores(row: Row) -> dict[str, Scores]:
    return {name: own.scores for name, own in row.scored.items()}


def _scores_of_draws(found: Exploration) -> list[dict[str, Scores]]:
    return [{"validation": trial.scores, **trial.other} for trial in found.draws]
