"""Explores: draw, merge in device memory, evaluate there, keep the best."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from typing import Any

import jax

import m3jax
from m3jax import prng
from m3jax.engine.load import load
from m3jax.engine.processes import joined
from m3jax.engine.sharding_rules import over_devices
from m3jax.evaluation.evaluator import Evaluator, TaskEvaluator
from m3jax.evaluation.tasks.apart import check_apart
from m3jax.exploration.groups import layer_groups
from m3jax.exploration.presets import registry
from m3jax.exploration.presets.setting import Plan, Setting
from m3jax.exploration.report import folder as files
from m3jax.exploration.run import Run, Say, nothing
from m3jax.exploration.search import by_answers, searches
from m3jax.exploration.search.make import check_sampler, make_search, tasks_of
from m3jax.exploration.search.result import Exploration
from m3jax.exploration.search.samplers import ADAPTIVE
from m3jax.exploration.search.scoring import Objective, answering, describe, losses
from m3jax.exploration.sharing.joining import shared
from m3jax.exploration.space import WHOLE, Space
from m3jax.recipe import Recipe, RecipeError
from m3jax.runs.folder import claimed
from m3jax.runs.inputs import (
    described,
    is_path,
    local,
    names_of,
    tensor_names,
)
from m3jax.runs.log import Log


def explore(
    base: Any,
    models: Sequence[Any],
    recipe: Recipe | None = None,
    *,
    evaluator: Evaluator,
    test: Evaluator | None = None,
    ood: Evaluator | None = None,
    draws: int = 32,
    seed: int = 0,
    preset: str | None = None,
    sampler: str | None = None,
    search: Sequence[str] | None = None,
    groups: int | None = None,
    weights: Mapping[str, float] | None = None,
    budget: int | None = None,
    halving: int | None = None,
    hyperband: int | None = None,
    fraction: float | None = None,
    selector: str = "scores",
    test_all_draws: bool = False,
    at_once: int | None = 1,
    generation: int = 1,
    mesh: Mapping[str, int] | None = None,
    output: str | PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    study: str | PathLike[str] | None = None,
    tokenizer_from: str | None = None,
    say: Say = nothing,
) -> Exploration:
    """Merges many draws of a recipe, evaluates each, and finds the best.

    Base and models are loaded once; beside them device memory holds a merged copy for
    each draw at a time. The best draw is chosen by `evaluator` alone; `test` and `ood`
    say what it is worth.

        def evaluator(parameters, budget, key):
            return {"accuracy": ...}

        found = m3jax.explore("base", ["maths", "code"], evaluator=evaluator)
        best = m3jax.merge_params(base, models, found.winner.recipe, found.winner.seed)

    Args:
      base, models: pytrees, or paths as `m3jax.load` takes them; base may be None.
      recipe: to draw from; the default is M3's average.
      evaluator: what is maximised. A `TaskEvaluator`, or a function of parameters,
        budget and key that returns scores by name, more being better.
      test: what is reported of parents, baselines and the winner.
      ood: the same, on data of another distribution.
      draws: how many; a grid takes at most so many.
      seed: 0 <= seed < 2**32; with the same seed everything is the same.
      preset: a published search, in the place of sampler and search: ``m3``,
        ``greedy_soup``, ``model_glue``, ``safety_aware``, ``lfs``, ``dis``, ``rmm``,
        ``adamms``, which asks the evaluator for ``answers``, or ``df_merge``; see
        docs/EXPLORE.md.
      sampler: ``recipe``, the default (its own Beta or Dirichlet, a new seed a draw),
        ``grid``, ``sobol``, ``random``, and optuna's ``tpe``, ``cmaes``, ``gp`` and
        ``nsga2``, which looks at every task by itself.
      search: for the other samplers, what they may change: ``ratios``, the default,
        ``scaling=LOW:HIGH``, ``trim_rate=…``, ``drop_rate=…`` (of all models),
        ``drop_rates=…`` (of each), ``method=ties|slerp``, the numbers of each of which
        count where it is chosen, ``dare.strategy=…``, ``seed`` (a new one a draw).
      groups: so many groups of layers, each with values of its own for all of that.
      weights: of scores, by name, in the objective; 1 where none is given. A score of
        which less is better has a negative weight (a loss task has it by itself).
      budget: of every evaluation, in the evaluator's own unit (examples of each task);
        None: all there is.
      halving: η, 2 or more: evaluate all draws at a small budget, and 1/η of them at
        one η times as large, up to the full one.
      hyperband: η, 2 or more: successive halving several times over, from many draws at
        a budget of 1 to a few at the full one; their numbers follow from budget and η,
        and `draws` is not looked at.
      fraction: of the data that a draw of ``rmm`` is evaluated on, each time another
        part of it; a function of yours gets that budget and a key of its own.
      selector: ``scores``, or ``answers``: the winner is the draw whose answers differ
        least from those at its neighbours in λ, whatever they score, as ``adamms``
        chooses; for draws of two models that differ in λ.
      test_all_draws: evaluate every draw on `test` and `ood`, too, for mean and
        deviation there; nothing is chosen by it.
      at_once: draws that are merged and evaluated at a time, which changes nothing but
        speed; each takes memory for a merged copy, and each device for its own base
        and models. More than one need an evaluator that threads may share, which a
        `TaskEvaluator` is. None: one on each accelerator.
      generation: how many draws ``tpe`` and ``cmaes`` propose before they are told what
        the first of them scored; they do come at once.
      mesh: split models that are paths over so many devices, one draw at a time, as
        ``{"rows": 2, "columns": 4}``; see `m3jax.Execution`.
      output: a folder for trials, summary, page, picture and the winner's recipe.
      resume: go on with what an interrupted exploration has left there.
      overwrite: begin anew there.
      study: what processes share that are at this exploration together: the path of a
        file on a disk that all see, or a database's URL. Each of them does trials of
        its own, and ends with all; see `m3jax.exploration.sharing`. The processes of
        `jax.distributed` share one in `output`, which the first of them writes.
      tokenizer_from: goes into the winner's recipe; see `m3jax.Execution`.
      say: is told what happens.

    Raises:
      RecipeError, SeedError, CheckpointError, TaskError: one line each.
    """
    recipe = recipe or Recipe()
    prng.check_seed(seed)
    recipe.check(num_models=len(models), has_base=base is not None)
    counts = {"draws": draws, "generation": generation, "at_once": at_once}
    for name, value in {**counts, "budget": budget}.items():
        if value is not None and value < 1:
            raise RecipeError(f"{name}={value} needs 1 or more")
    if mesh is not None and at_once not in (None, 1):
        raise RecipeError(f"at_once={at_once} needs to be 1 with a mesh")
    sharding = over_devices(mesh)
    rates = {"halving": halving, "hyperband": hyperband}
    for name, rate in rates.items():
        searches.check_rate(name, rate)
    if fraction is not None and not (preset and 0 < fraction <= 1):
        raise RecipeError(
            f"fraction={fraction} needs preset='rmm', and a number above 0, up to 1"
        )
    full = _full(evaluator, budget, {**rates, "fraction": fraction})
    objective = Objective(dict(weights or {}), losses(evaluator))
    if isinstance(evaluator, TaskEvaluator):
        objective.check([task.name for task in evaluator.tasks])
        for name, other in (("test", test), ("ood", ood)):
            if isinstance(other, TaskEvaluator):
                named = "validation", name
                for note in check_apart(evaluator.tasks, other.tasks, named):
                    say(f"note: {note}")
    if selector not in by_answers.SELECTORS:
        names = " or ".join(by_answers.SELECTORS)
        raise RecipeError(f"selector={selector!r} needs to be {names}")
    tasks = tasks_of(evaluator, objective)
    tensors = functools.partial(tensor_names, models[0])
    if preset is not None:
        given: dict[str, Any] = {"search": search, "groups": groups, **rates}
        given["generation"] = generation if generation > 1 else None
        given["fraction"] = fraction
        given["selector"] = None if selector == "scores" else selector
        registry.check(preset, sampler, given)
        setting = Setting(
            name=preset,
            recipe=recipe,
            has_base=base is not None,
            models=models,
            tensors=tensors(),
            evaluator=evaluator,
            objective=objective,
            tasks=tasks,
            draws=draws,
            seed=seed,
            budget=full,
            groups=groups,
            sampler=sampler,
            generation=generation,
            halving=halving,
            hyperband=hyperband,
            fraction=fraction,
        )
        plan = registry.plan(setting)
        objective = plan.objective
    else:
        sampler, search = sampler or "recipe", search or ("ratios",)
        check_sampler(sampler, generation, rates)
        space = None
        if sampler != "recipe":
            each = WHOLE if groups is None else layer_groups(tensors(), groups)
            space = Space.parse(search, recipe, len(models), each)
        asks, total = make_search(
            sampler,
            recipe,
            space,
            objective,
            draws=draws,
            seed=seed,
            generation=generation,
            budget=full,
            halving=halving,
            hyperband=hyperband,
            tasks=tasks,
        )
        reading = None if space is None else space.reading(recipe)
        plan = Plan(asks, total, objective, reading)
    if selector == "answers":
        by_answers.check(
            sampler=sampler or "recipe",
            search=search or (),
            recipe=recipe,
            num_models=len(models),
            draws=draws,
            halves=bool(halving or hyperband),
        )
        plan = plan._replace(search=by_answers.by_answers(plan.search), answers=True)
    if plan.answers and not answering(evaluator):
        asked = f"selector={selector!r}" if preset in (None, "m3") else f"{preset=}"
        raise RecipeError(
            f"{asked} looks at answers, and the evaluator tells none; choose tasks "
            "that answer, or give it a method `answers`"
        )
    for note in plan.notes:
        say(f"note: {note}")
    fixed = sampler in ("grid", "nsga2") or halving or fraction
    lists = {"validation": evaluator, "test": test, "ood": ood}
    header = {
        "m3jax": m3jax.__version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "base": described(base),
        "models": [described(model) for model in models],
        "recipe": recipe.to_dict(),
        "seed": seed,
        **({} if preset is None else {"preset": preset}),
        "sampler": sampler,
        "search": list(search) if search and sampler != "recipe" else None,
        **({} if groups is None else {"groups": groups}),
        # Otherwise it may go on to more draws than it began with.
        "draws": draws if fixed else None,
        "generation": generation if sampler in ADAPTIVE or preset else None,
        "halving": halving,
        **({} if hyperband is None else {"hyperband": hyperband}),
        **({} if fraction is None else {"fraction": fraction}),
        **({} if selector == "scores" else {"selector": selector}),
        "budget": budget,
        "weights": objective.weights,
        "test_all_draws": test_all_draws,
        "mesh": mesh and dict(mesh),  # sums round by it
        **{name: describe(own) for name, own in lists.items()},
    }
    path = None if output is None else local(fspath(output))
    with contextlib.ExitStack() as stack:
        team = stack.enter_context(joined())
        say = say if team.first else nothing
        if path is not None and team.first:
            claim = claimed(
                path,
                overwrite=overwrite,
                resume=resume,
                what="exploration",
                files=files.FILES,
                first=files.TRIALS,
            )
            stack.enter_context(claim)
        worker = stack.enter_context(shared(study, path, team, say))
        if worker is not None:
            copies = [described(own, anywhere=True) for own in (base, *models)]
            worker.agree({**header, "base": copies[0], "models": copies[1:]})
        if not team.first:
            path = None
        trials, rows = (
            Log(path and path / name, header) for name in (files.TRIALS, files.SCORES)
        )
        run = Run(
            recipe=recipe,
            evaluators={name: own for name, own in lists.items() if own is not None},
            objective=objective,
            seed=seed,
            budget=budget,
            test_all_draws=test_all_draws,
            at_once=at_once,
            trials=trials,
            rows=rows,
            times=path and path / files.TIMES,
            say=say,
            aligned=plan.reading,
            answers=plan.answers,
            merger=plan.merger,
            worker=worker,
        )
        # Nothing here holds on to the pytrees: `run` lets go of what it need not keep.
        trees = [
            load(model, sharding) if is_path(model) else model
            for model in (base, *models)
        ]
        found = run(trees, names_of(models), plan.search, plan.total)
        replay = _replay(found, base, models, tokenizer_from)
        if path is not None:
            replay |= files.write_statistics(found, path)
        found = dataclasses.replace(found, replay=replay)
        if path is not None:
            files.write_outputs(found, path, say)
        return found


def _full(
    evaluator: Evaluator, budget: int | None, rates: Mapping[str, float | None]
) -> int | None:
    """The full budget, as a number where halving, Hyperband or parts need one."""
    name = next((own for own, rate in rates.items() if rate is not None), None)
    if name is None:
        return budget
    if name == "fraction" and not getattr(evaluator, "in_parts", True):
        raise RecipeError(
            "fraction needs tasks in files, or a function: others are evaluated on "
            "their first examples alone"
        )
    if isinstance(evaluator, TaskEvaluator):
        return min(evaluator.full_budget, budget or evaluator.full_budget)
    if budget is None:
        raise RecipeError(f"{name} needs budget, the evaluator's full one")
    return budget


def _replay(
    found: Exploration, base: Any, models: Sequence[Any], tokenizer_from: str | None
) -> dict[str, Any]:
    """What `m3jax merge --config` needs to make the winner again."""
    winner = found.winner
    replay = {
        "recipe": winner.recipe.to_dict(),
        "seed": winner.seed,
        "ratios": winner.ratios,
        "tokenizer_from": tokenizer_from,
    }
    if all(map(is_path, models)):
        replay["base"] = base if base is None else {"path": fspath(base)}
        replay["models"] = [{"path": fspath(model)} for model in models]
    return replay
