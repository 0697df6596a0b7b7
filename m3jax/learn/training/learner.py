"""Learns the coefficients of a merge: the whole of it, from top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import jax
import numpy as np

import m3jax
from m3jax import prng
from m3jax.engine.sharding_rules import over_devices
from m3jax.evaluation.evaluator import TaskEvaluator, fingerprint
from m3jax.evaluation.tasks.apart import check_apart
from m3jax.evaluation.tasks.task import Task
from m3jax.learn.coefficients import replay as replays
from m3jax.learn.gradient import tensors as stores
from m3jax.learn.gradient.pullback import Merge, learnable
from m3jax.learn.report import outputs
from m3jax.learn.report.result import Comparison, Learning, compared
from m3jax.learn.training import objectives
from m3jax.learn.training.config import Config
from m3jax.learn.training.data import TaskBatches, by_task, taught
from m3jax.learn.training.loop import Apply, Descent, Progress, nothing, run
from m3jax.learn.training.sources import Texts, experts_of, read_tasks
from m3jax.learn.training.state import State
from m3jax.learn.training.texts import Speaker
from m3jax.methods.linear import TaskArithmetic
from m3jax.recipe import Recipe, RecipeError
from m3jax.runs.folder import claimed
from m3jax.runs.inputs import described, is_path, local, names_of

Say = Callable[[str], None]
Specs = Sequence[str | Path | Task]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given:
    """What a run is given; see `learn`."""

    base: Any
    models: Sequence[Any]
    config: Config
    tasks: Sequence[Task] = ()
    validation: Sequence[Task] = ()
    test: Sequence[Task] = ()
    teachers: Sequence[str] = ()
    apply: Apply | None = None
    batches: Any = None
    validation_batches: Any = None
    seed: int = 0
    mesh: Mapping[str, int] | None = None
    tokenizer_from: str | None = None

    @property
    def paths(self) -> list[Any]:
        """Base and models."""
        return [own for own in (self.base, *self.models) if own is not None]

    def objective(self) -> objectives.Weighted:
        names = ("temperature", "top_k", "standardize")
        options = {name: getattr(self.config, name) for name in names}
        return objectives.make(self.config.objective, options)


def learn(
    base: Any,
    models: Sequence[Any],
    config: Config | None = None,
    *,
    tasks: Specs = (),
    validation: Specs = (),
    test: Specs = (),
    teachers: Sequence[str] = (),
    apply: Apply | None = None,
    batches: Any = None,
    validation_batches: Any = None,
    seed: int = 0,
    streamed: bool = False,
    mesh: Mapping[str, int] | None = None,
    output: str | PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    tokenizer_from: str | None = None,
    say: Say = nothing,
    progress: Progress = nothing,
) -> Learning:
    """Learns coefficients of a merge by gradient descent on an objective.

    A step merges, does one backward pass of the merged model for each task, and pulls
    ∂L/∂θ back to the coefficients tensor by tensor: beside base and models, memory
    holds one model and its gradient; `streamed`, base and models stay in their files.

        config = Config(space=Space(granularity="tensor"), inputs="continuation",
                        objective={"kl": 1.0})
        found = m3jax.learn("base", ["maths", "code"], config, tasks=["train.json"])
        merged = m3jax.merge_params(base, models, found.recipe, found.seed,
                                    statistics=found.statistics)

    With a function of one's own, any pytrees can be learned from any batches:

        found = m3jax.learn(base, [a, b], config, apply=cnn, batches=[batch, ...])

    Args:
      base, models: pytrees, or paths as `m3jax.load` takes them; base may be None.
      config: what to learn, and how.
      tasks: JSON files of tasks (or `Task`s) to learn from, read by the decoder of the
        base's config.json.
      validation: tasks whose loss decides which step is kept, and when to stop.
      test: tasks whose scores are reported of the start and of what was learned.
      teachers: checkpoints to learn from instead of the models, of any architecture of
        `m3jax evaluate` and with their own tokenizers, for ``uld``.
      apply: (params, batch) -> logits, instead of tasks; jitted.
      batches: a sequence of batches, or {task: sequence}; a step takes the next of each
        task. Batches are pytrees of arrays; dicts, where the objective needs a teacher.
      validation_batches: likewise, instead of `validation`.
      seed: of masks and of the order of examples, 0 <= seed < 2**32; with the same seed
        a machine finds the same bytes.
      streamed: read base and models from their files in every step.
      mesh: split everything over so many devices, as ``{"rows": 2, "columns": 4}``;
        batches are split over all of them where they divide.
      output: a folder for checkpoints of the run, recipe, summary and pictures.
      resume: go on with what an interrupted run has left there.
      overwrite: begin anew there.
      tokenizer_from: goes into the recipe; see `m3jax.Execution`.
      say: is told what happens.
      progress: is told of every step; see `loop.Progress`.

    Raises:
      RecipeError, SeedError, CheckpointError, TaskError: one line each.
      ValueError: the arguments do not fit each other.
    """
    given = Given(
        base=base,
        models=models,
        config=config or Config(),
        tasks=read_tasks(tasks),
        validation=read_tasks(validation),
        test=read_tasks(test),
        teachers=[fspath(own) for own in teachers],
        apply=apply,
        batches=batches,
        validation_batches=validation_batches,
        seed=prng.check_seed(seed),
        mesh=mesh,
        tokenizer_from=tokenizer_from,
    )
    recipe = checked(given, streamed)
    for note in _notes(given):
        say(f"note: {note}")
    place = over_devices(mesh)
    with contextlib.ExitStack() as stack:
        path = None if output is None else local(fspath(output))
        if path is not None:
            stack.enter_context(
                claimed(
                    path,
                    overwrite=overwrite,
                    resume=resume,
                    what="run of learning",
                    files=outputs.FILES,
                    first=outputs.STATE,
                )
            )
        store = stack.enter_context(_tensors(given, recipe, streamed, place))
        objective = given.objective()
        student = None if apply is not None else speaker(given)
        train, held = _data(given, objective, student, place)
        descent = Descent(
            merge=Merge(store, recipe, seed, given.config.dtype),
            objective=objective,
            apply=apply or student.apply,  # type: ignore[union-attr]
            config=given.config,
            seed=seed,
            tasks=train,
            validation=held,
            place=_batch_place(mesh),
        )
        state = run(
            descent,
            path=path and path / outputs.STATE,
            header=_header(given),
            resume=resume,
            progress=progress,
        )
        replay, found = _replayed(descent, recipe, state)
        learning = Learning(
            recipe=replay.recipe,
            seed=seed,
            statistics=replay.statistics,
            coefficients=found,
            losses=state.losses,
            looks=state.looks,
            step=state.best_look[0] if state.best_look else state.step,
            comparisons=_tested(given, descent, state, student),
        )
        learning = dataclasses.replace(learning, replay=_replay(given, learning, path))
        if path is not None:
            outputs.write_outputs(learning, path, say)
        return learning


def checked(given: Given, streamed: bool) -> Recipe:
    """The recipe that is learned.

    Raises:
      ValueError, RecipeError: what is given does not fit.
    """
    base, models = given.base, given.models
    paths = all(map(is_path, given.paths))
    if streamed and not paths:
        raise ValueError("streamed=True needs base and models as paths")
    if (given.apply is None) != (given.batches is None):
        raise ValueError("apply and batches need each other")
    if given.apply is None and not given.tasks:
        raise ValueError("nothing to learn from: give tasks, or apply and batches")
    if given.apply is not None and (given.tasks or given.test):
        raise ValueError("give tasks, or apply and batches, not both")
    if given.apply is None and not paths:
        raise ValueError(
            "tasks need base and models as paths, whose config.json and tokenizer say "
            "how to read them; with pytrees give apply and batches"
        )
    if given.apply is not None and given.config.inputs != "prompt":
        raise ValueError(
            f"inputs={given.config.inputs} is of tasks; batches are as they are"
        )
    recipe = learnable(given.config.recipe)
    replays.check(given.config.space, recipe)
    recipe.check(num_models=len(models), has_base=base is not None)
    if base is None and "weighted_overlap" in given.config.space.regularisers:
        raise RecipeError(
            "space.regularisers: weighted_overlap is of task vectors, and needs a base"
        )
    return recipe


def _notes(given: Given) -> Iterator[str]:
    lists = {"training": given.tasks, "validation": given.validation}
    lists["test"] = given.test
    for one, other in itertools.combinations(lists, 2):
        yield from check_apart(lists[one], lists[other], (one, other))


def reading(config: Config, recipe: Recipe) -> Recipe:
    """A recipe that reads what is read: task vectors, too, if a regulariser does."""
    if "weighted_overlap" not in config.space.regularisers:
        return recipe
    return dataclasses.replace(recipe, method=TaskArithmetic())


@contextlib.contextmanager
def _tensors(
    given: Given, recipe: Recipe, streamed: bool, place: Any
) -> Iterator[stores.Tensors]:
    recipe = reading(given.config, recipe)
    if streamed:
        with stores.of_files(given.base, given.models, recipe, place) as found:
            yield found
        return
    every = (given.base, *given.models)
    trees = [m3jax.load(m, place) if is_path(m) else m for m in every]
    yield stores.of_trees(trees[0], trees[1:], recipe)


def speaker(given: Given) -> Speaker:
    """How the models read; the tokenizer is that of one of them."""
    from m3jax.models.parameters import common_config
    from m3jax.models.tokenizer import Tokenizer

    names, owner = list(map(fspath, given.paths)), given.tokenizer_from
    config, folders = common_config(names)
    chosen = names[0] if owner in (None, "base") else owner
    if chosen not in folders:
        raise ValueError(f"tokenizer_from={owner} needs base or one of {names[1:]}")
    return Speaker(config, Tokenizer(folders[chosen]))


def _data(
    given: Given, objective: objectives.Weighted, student: Speaker | None, place: Any
) -> tuple[list[TaskBatches], list[TaskBatches]]:
    """Batches to learn from, and those of validation."""
    if student is None:
        return _own_batches(given, objective, place)

    def teacher(k: int) -> tuple[Any, Speaker]:
        if not given.teachers:
            return m3jax.load(given.models[k], place), student
        from m3jax.models.parameters import load_model
        from m3jax.models.tokenizer import Tokenizer

        loaded = load_model(given.teachers[k], place)
        return loaded.parameters, Speaker(loaded.config, Tokenizer(loaded.folder))

    names = names_of(given.teachers or given.models)
    lists: Any = [given.tasks, given.validation]
    texts = Texts(given.config, objective, student, given.seed)
    train, held = texts.batches(lists, names, teacher, bool(given.teachers))
    return train, held


def _own_batches(
    given: Given, objective: objectives.Weighted, place: Any
) -> tuple[list[TaskBatches], list[TaskBatches]]:
    models, config = given.models, given.config
    train, held = (
        [] if own is None else by_task(own, config.task_weights)
        for own in (given.batches, given.validation_batches)
    )
    if not objective.needs_teacher:
        return train, held
    apply: Any = given.apply
    taught_by = jax.jit(lambda params, batch: objective.teach(apply(params, batch)))
    experts = experts_of(config.experts, [t.name for t in train], names_of(models))
    for name, k in experts.items():
        params = m3jax.load(models[k], place) if is_path(models[k]) else models[k]
        of = {name: lambda batch, own=params: taught_by(own, batch)}
        train, held = taught(train, of), taught(held, of)
    return train, held


def _batch_place(mesh: Mapping[str, int] | None) -> Callable[[Any], Any]:
    """Splits batches over all devices, along their first axis where it divides."""
    if mesh is None:
        return lambda batch: batch
    from jax.sharding import NamedSharding, PartitionSpec

    from m3jax.engine.sharding_rules import make_mesh

    devices = jax.local_devices()[: int(np.prod(list(mesh.values())))]
    over = make_mesh(mesh, devices)

    def place(array: Any) -> Any:
        divides = np.ndim(array) and np.shape(array)[0] % over.size == 0
        spec = PartitionSpec(over.axis_names) if divides else PartitionSpec()
        return jax.device_put(array, NamedSharding(over, spec))

    return lambda batch: jax.tree.map(place, batch)


def _header(given: Given) -> dict[str, Any]:
    """All that the result depends on; the same when a run is resumed."""
    lists = {"tasks": given.tasks, "validation": given.validation}
    words = given.config.to_dict()
    words.pop("save_every")
    return {
        "m3jax": m3jax.__version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "base": described(given.base),
        "models": [described(model) for model in given.models],
        "teachers": [described(own) for own in given.teachers],
        "config": words,
        "seed": given.seed,
        "mesh": given.mesh and dict(given.mesh),  # sums round by it
        **{name: [fingerprint(task) for task in own] for name, own in lists.items()},
    }


def _replayed(
    descent: Descent, recipe: Any, state: State
) -> tuple[replays.Replay, dict[str, np.ndarray]]:
    coefficients = descent.coefficients(state.best)
    found = {name: np.asarray(own, np.float32) for name, own in coefficients.items()}
    return replays.replay(recipe, descent.config.space, found), found


def _tested(
    given: Given, descent: Descent, state: State, student: Speaker | None
) -> tuple[Comparison, ...]:
    if not given.test or student is None:
        return ()
    tasks: Any = given.test
    evaluator = TaskEvaluator(tasks, student.config, student.tokenizer)
    key = jax.random.key(given.seed)
    results = [
        evaluator.evaluate(descent.rounded(raw), None, key)
        for raw in (descent.start().raw, state.best)
    ]
    return compared(results[0], results[1], given.seed)


def _replay(given: Given, found: Learning, output: Path | None) -> dict[str, Any]:
    """What `m3jax merge --config` needs to make the learned model."""
    replay: dict[str, Any] = {
        "recipe": found.recipe.to_dict(),
        "seed": found.seed,
        "tokenizer_from": given.tokenizer_from,
    }
    if all(map(is_path, given.models)):
        base = given.base
        replay["base"] = None if base is None else {"path": fspath(base)}
        replay["models"] = [{"path": fspath(model)} for model in given.models]
    if output is not None:
        replay["statistics"] = [
            {"path": str(output / outputs.COEFFICIENTS.format(k))}
            for k in range(len(found.statistics))
        ]
    return replay
