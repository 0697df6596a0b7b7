"""Runs an exploration from beginning to end, or from where it was interrupted."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax

from m3jax import programs
from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.places import durable
from m3jax.evaluation.evaluator import Evaluator
from m3jax.exploration.merger import Merger
from m3jax.exploration.progress import Progress
from m3jax.exploration.search.places import choose_places, in_order, make_mergers
from m3jax.exploration.search.result import Exploration, Row
from m3jax.exploration.search.scoring import Objective, Scored, score
from m3jax.exploration.search.searches import Search
from m3jax.exploration.search.trials import (
    Proposal,
    Trial,
    at_the_largest_budget,
    best,
)
from m3jax.exploration.sharing.worker import Worker
from m3jax.models.layers import Parameters
from m3jax.programs import Block
from m3jax.recipe import Mixup, Recipe
from m3jax.runs.log import Log

Say = Callable[[str], None]
T = TypeVar("T")
L = TypeVar("L")


def nothing(line: str) -> None:
    """Says nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What an exploration needs beside models, sampler and schedule.

    Attributes:
      recipe: of the baselines, and what the draws have in common.
      answers: the search looks at what the draws answer.
      aligned: a recipe that reads what all draws together read; None: as `recipe`.
      evaluators: by list of tasks; ``validation`` is what is chosen on.
      objective: of scores on it.
      seed: of the baselines, and of whatever the evaluators draw.
      budget: the full one.
      test_all_draws: evaluate every draw on the other lists, too.
      at_once: draws at a time; see `choose_places`.
      trials, rows: what has been found before, and where to keep what is found.
      times: a file for how long things took; they are not the same in every run.
      say: is told what happens.
      merger: makes what merges the draws.
      worker: shares the evaluations with other processes; None: all are done here.
    """

    recipe: Recipe
    evaluators: Mapping[str, Evaluator]
    objective: Objective
    seed: int
    budget: int | None
    test_all_draws: bool
    at_once: int | None
    trials: Log
    rows: Log
    times: Path | None = None
    say: Say = nothing
    aligned: Recipe | None = None
    answers: bool = False
    merger: Callable[[Any, Sequence[Any], Recipe], Merger] = Merger
    worker: Worker | None = None

    def __call__(
        self,
        trees: list[Any],
        names: Sequence[str],
        search: Search,
        total: int | None,
    ) -> Exploration:
        """Evaluates parents, baselines, draws and the winner.

        Args:
          trees: base (or None) and models; emptied, so that what the merges do not
            need can go.
          names: of the models.
          search: asks for the draws.
          total: how many trials there will be, if that is known.
        """
        first = next(search, None)
        if first is None:
            raise CheckpointError("no draw makes a model; ask for more of them")
        places = choose_places(trees, self.at_once, len(first))
        parents = {
            name: functools.partial(lambda own: own, tree)
            for name, tree in zip(["base", *names], trees, strict=True)
            if tree is not None
        }
        rows = self._rows("parent", parents)
        del parents
        mergers = make_mergers(trees, self.aligned or self.recipe, places, self.merger)
        baselines = {
            name: functools.partial(mergers[0], recipe, self.seed)
            for name, recipe in self._baselines(len(names)).items()
        }
        rows += self._rows("baseline", baselines)
        trials, chosen = self._all_trials(mergers, search, first, total, names)
        winner = chosen or best(at_the_largest_budget(trials), 1)[0]
        if math.isnan(winner.objective):
            raise CheckpointError(
                "every draw scored NaN, so none is best: the models, or what they are "
                "merged into, overflow; try --dtype=float32, or another recipe"
            )
        name = f"winner (draw {winner.index})"
        make = functools.partial(mergers[0], winner.recipe, winner.seed)
        rows += self._rows("winner", {name: make}, winner.program)
        return Exploration(
            trials=tuple(trials),
            winner=winner,
            rows=tuple(rows),
            objective=self.objective,
            models=tuple(names),
            seed=self.seed,
            statistics=tuple(mergers[0].statistics(winner.recipe)),
        )

    def _baselines(self, num_models: int) -> dict[str, Recipe]:
        equal = Mixup(ratios=(1 / num_models,) * num_models)
        plain = Mixup(alpha=None)
        named = {f"plain {self.recipe.method.name}": plain}
        if self.recipe.mixup.on:  # otherwise the method has no ratios, or its own
            named = {"equal ratios": equal, **named}
        return {
            name: dataclasses.replace(self.recipe, mixup=mixup)
            for name, mixup in named.items()
        }

    def _rows(
        self,
        kind: str,
        makers: Mapping[str, Callable[[], Parameters]],
        program: Sequence[Block] | None = None,
    ) -> list[Row]:
        """The rows that were found before, or new ones, of what is made."""
        known = {line["row"]: line for line in self.rows.lines}

        def line(name: str, place: None) -> dict[str, Any]:
            if name in known:
                return known[name]
            parameters = makers[name]()
            scored = {
                own: self._score(own, parameters, self.budget, program=program)
                for own in self.evaluators
            }
            return Row(name, kind, scored).to_dict()

        rows = []
        named = {f"{kind} {name}": name for name in makers}
        for found, _ in self._each(named, line, [None]):
            row = Row.from_dict(found)
            rows.append(row)
            if row.name in known:
                continue
            self.rows.append(row.to_dict())
            scores = row.scored["validation"].scores
            self.say(f"{row.name}: {described(self.objective(scores), scores)}")
        return rows

    def _each(
        self,
        items: Mapping[str, T],
        work: Callable[[T, L], dict[str, Any]],
        places: Sequence[L],
    ) -> Generator[tuple[dict[str, Any], bool]]:
        """What the work gives for each item, in order, and whether it was done here."""
        if self.worker is not None:
            yield from self.worker.each(items, work, places)
            return
        with contextlib.closing(in_order(work, [*items.values()], places)) as found:
            for line in found:
                yield line, True

    def _all_trials(
        self,
        mergers: Sequence[Merger],
        search: Search,
        first: Sequence[Proposal],
        total: int | None,
        names: Sequence[str],
    ) -> tuple[list[Trial], Trial | None]:
        """All of them, and the one that the search chose, if it did."""
        trials: list[Trial] = []
        of_all = "" if total is None else f" of {total}"
        asked, progress = first, Progress()
        # Trials of other budgets take other times; then what is left is the rung.
        alike = total is not None and first[0].budget == self.budget
        while True:
            start = len(trials)
            for trial in self._run(asked, start, mergers):
                trials.append(trial)
                recorded = len(trials) <= len(self.trials.lines)
                progress.add(trial, recorded=recorded)
                if not recorded:
                    end = total if alike else total and start + len(asked)
                    left = None if end is None else end - len(trials)
                    what = described(trial.objective, trial.scores, trial.mean_ratios)
                    if trial.program is not None:
                        what = f"{programs.counted(trial.program, names)}; {what}"
                    self.say(
                        f"{len(trials)}{of_all}: draw {trial.index}, {what}; "
                        f"{progress.text(trial, left)}"
                    )
            try:
                asked = search.send(trials[start:])
            except StopIteration as end:
                return trials, end.value

    def _run(
        self, asked: Sequence[Proposal], start: int, mergers: Sequence[Merger]
    ) -> Iterator[Trial]:
        """The trials of proposals, read from the log or run and written down there.

        Args:
          asked: in their order.
          start: the first one's place in the log.
          mergers: to run them on.
        """
        known = dict(enumerate(self.trials.lines[start : start + len(asked)], start))
        items = {
            f"trial {place}": (place, own) for place, own in enumerate(asked, start)
        }

        def line(item: tuple[int, Proposal], merger: Merger) -> dict[str, Any]:
            place, own = item
            return {"trial": known[place]} if place in known else self._do(own, merger)

        found = self._each(items, line, mergers)
        for (place, own), (own_line, here) in zip(items.values(), found, strict=True):
            trial = _recorded(own_line["trial"], own, place)
            if place not in known:
                self.trials.append(trial.to_dict())
                if here and self.times is not None:
                    entry = {"index": trial.index, "budget": trial.budget}
                    entry |= own_line["seconds"]
                    with durable.naming(self.times), self.times.open("a") as file:
                        file.write(json.dumps(entry) + "\n")
            yield trial

    def _do(self, asked: Proposal, merger: Merger) -> dict[str, Any]:
        """Merges a draw and evaluates it; the trial, and the seconds that it took."""
        recipe, seed = asked.recipe, asked.seed
        program = programs.of_recipe(recipe)
        start = time.perf_counter()
        parameters = jax.block_until_ready(merger(recipe, seed))
        merged = time.perf_counter()
        scored = self._score(
            "validation",
            parameters,
            asked.budget,
            answers=self.answers,
            part=asked.part,
            program=program,
        )
        own = scored.scores
        others = [name for name in self.evaluators if name != "validation"]
        other = {
            name: self._score(name, parameters, self.budget, program=program).scores
            for name in (others if self.test_all_draws else ())
        }
        trial = Trial(
            index=asked.index,
            budget=asked.budget,
            recipe=recipe,
            seed=seed,
            ratios=merger.ratios(recipe, seed),
            scores=own,
            objective=self.objective(own),
            other=other,
            answers=scored.answers if self.answers else None,
            part=asked.part,
        )
        seconds = {
            "merge_seconds": round(merged - start, 6),
            "evaluate_seconds": round(time.perf_counter() - merged, 6),
        }
        return {"trial": trial.to_dict(), "seconds": seconds}

    def _score(
        self,
        name: str,
        parameters: Parameters,
        budget: int | None,
        *,
        answers: bool = False,
        part: int = 0,
        program: Sequence[Block] | None = None,
    ) -> Scored:
        key = jax.random.key(self.seed)  # of every draw: the same luck for all
        return score(
            self.evaluators[name],
            parameters,
            budget,
            key,
            answers,
            part=part,
            layers=None if program is None else [block.layer for block in program],
        )


def _recorded(line: Mapping[str, Any], asked: Proposal, place: int) -> Trial:
    """The trial of a line, which has to be that of the proposal."""
    trial = Trial.from_dict(line)
    if trial.proposal != asked:
        raise CheckpointError(
            f"trial {place}, which was evaluated before or by another process, is "
            "another one than would be drawn now: a package that draws is of another "
            "version; begin anew with --overwrite, and another --study"
        )
    return trial


def described(
    objective: float,
    scores: Mapping[str, float],
    ratios: Sequence[float] | None = None,
) -> str:
    """Ratios and scores on a line."""
    parts = [] if ratios is None else ["λ " + " ".join(f"{r:.3f}" for r in ratios)]
    parts += [f"{name} {value:.4f}" for name, value in scores.items()]
    if len(scores) > 1:
        parts.append(f"objective {objective:.4f}")
    return ", ".join(parts)
