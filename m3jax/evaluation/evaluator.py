"""Scores parameters in memory at tasks."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from m3jax import prng
from m3jax.evaluation.results import Result, answers_of
from m3jax.evaluation.running import continuations, log_likelihoods, up_to_depth
from m3jax.evaluation.tasks import answers, programs
from m3jax.evaluation.tasks.examples import Example, load_examples
from m3jax.evaluation.tasks.requests import Prepared, prepare
from m3jax.evaluation.tasks.task import Task, TaskError, load_tasks
from m3jax.models.config import Config
from m3jax.models.generation import Sampling
from m3jax.models.layers import Parameters
from m3jax.models.parameters import padded, read_model_config
from m3jax.models.tokenizer import Tokenizer


class Evaluator(Protocol):
    """Any function that scores parameters; `TaskEvaluator` is one."""

    def __call__(
        self, parameters: Parameters, budget: int | None, key: jax.Array
    ) -> Mapping[str, float]:
        """Scores parameters.

        Args:
          parameters: nested dict of arrays, as `m3jax.load` and `merge_params` give it.
          budget: how much to spend, in the evaluator's own unit; None: all there is.
          key: of `jax.random`, for whatever is drawn.

        Returns:
          A score for each name; the names are always the same.
        """
        ...


class Together:
    """Several evaluators as one, which has the scores of all."""

    in_parts = False

    def __init__(self, evaluators: Sequence[Evaluator]):
        self._evaluators = tuple(evaluators)

    def __call__(
        self, parameters: Parameters, budget: int | None, key: jax.Array
    ) -> Mapping[str, float]:
        """See `Evaluator`."""
        return self.answered(parameters, budget, key)[0]

    def answered(
        self, parameters: Parameters, budget: int | None, key: jax.Array
    ) -> tuple[dict[str, float], dict[str, list[str]]]:
        """The scores, and the answers of the tasks that have some."""
        found: dict[str, float] = {}
        answers: dict[str, list[str]] = {}
        for evaluator in self._evaluators:
            if hasattr(evaluator, "answered"):
                scores, told = evaluator.answered(parameters, budget, key)
            else:
                scores, told = evaluator(parameters, budget, key), {}
            for name, score in scores.items():
                if name in found:
                    raise TaskError(f"two tasks are named {name!r}; leave one out")
                found[name] = score
            answers |= told
        return found, answers

    @property
    def losses(self) -> frozenset[str]:
        """The tasks of which less is better."""
        none: frozenset[str] = frozenset()
        return none.union(*(getattr(own, "losses", none) for own in self._evaluators))

    def of_layers(self, layers: Sequence[int]) -> Together:
        """As that of `TaskEvaluator`."""
        return Together(
            [
                own.of_layers(layers) if hasattr(own, "of_layers") else own
                for own in self._evaluators
            ]
        )

    def fingerprint(self) -> list[Any]:
        """What a resumed exploration has to have in common with the first one."""
        return [
            own.fingerprint() if hasattr(own, "fingerprint") else type(own).__name__
            for own in self._evaluators
        ]


class TaskEvaluator:
    """Scores parameters at tasks. Reads and tokenises once, compiles once per shape.

    A score is a function of the parameters, the task and the key: the batches that
    an example comes in, and the other tasks, change nothing but rounding.

    Attributes:
      tasks: in the order of the results.
      config, tokenizer: of the model.
      tokens_per_batch: padding included.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        config: Config,
        tokenizer: Tokenizer,
        *,
        tokens_per_batch: int = 4096,
        dtype: Any = None,
        allow_code_execution: bool = False,
    ):
        """Reads the tasks' data.

        Args:
          tasks: with different names.
          config: of the model.
          tokenizer: of the model.
          tokens_per_batch: padding included; more is faster and takes more memory.
          dtype: of the matrix products; None: the parameters' own.
          allow_code_execution: run programs that the model writes, for `code` tasks.

        Raises:
          TaskError: a task cannot be used.
        """
        names = [task.name for task in tasks]
        for name in names:
            if names.count(name) > 1:
                raise TaskError(f"two tasks are named {name!r}; rename one of them")
        for task in tasks:
            if task.kind == "code" and not allow_code_execution:
                raise TaskError(
                    f"task {task.name!r} runs programs that the model writes, on this "
                    "machine; allow it with --allow_code_execution "
                    "(allow_code_execution=True)"
                )
        self.tasks = tuple(tasks)
        self._examples = [load_examples(task) for task in tasks]
        self.config, self.tokenizer = config, tokenizer
        self.tokens_per_batch = tokens_per_batch
        self._options: dict[str, Any] = {
            "config": config,
            "tokens_per_batch": tokens_per_batch,
            "dtype": dtype,
        }
        self._prepare = functools.cache(self._prepared)

    @property
    def losses(self) -> frozenset[str]:
        """The tasks of which less is better."""
        return frozenset(t.name for t in self.tasks if not t.higher_is_better)

    @classmethod
    def of_checkpoint(
        cls, name: str, specs: Sequence[str | Path], **options: Any
    ) -> TaskEvaluator:
        """An evaluator for a checkpoint's config and tokenizer.

            evaluator = m3jax.TaskEvaluator.of_checkpoint("base", ["maths.json"])
            evaluator(m3jax.load("base"), None, jax.random.key(0))

        Args:
          name: a folder or a Hugging Face id.
          specs: JSON files of tasks.
          options: as for the constructor.

        Raises:
          CheckpointError, TaskError: the checkpoint or a task cannot be used.
        """
        config, folder = read_model_config(name)
        tasks = [task for path in specs for task in load_tasks(path)]
        return cls(tasks, config, Tokenizer(folder), **options)

    @property
    def full_budget(self) -> int:
        """Examples of the largest task: the least budget that is all there is."""
        return max(map(len, self._examples))

    def fingerprint(self) -> dict[str, Any]:
        """All that the scores depend on beside parameters, budget and key."""
        tasks = {
            task.name: fingerprint(task, examples)
            for task, examples in zip(self.tasks, self._examples, strict=True)
        }
        options = {name: self._options[name] for name in ("dtype", "tokens_per_batch")}
        if options["dtype"] is not None:
            options["dtype"] = np.dtype(options["dtype"]).name
        return {"tasks": tasks, **options}

    def __call__(
        self, parameters: Parameters, budget: int | None, key: jax.Array
    ) -> dict[str, float]:
        """The mean score of each task over its first `budget` examples."""
        return self.answered(parameters, budget, key)[0]

    def answered(
        self, parameters: Parameters, budget: int | None, key: jax.Array
    ) -> tuple[dict[str, float], dict[str, list[str]]]:
        """The scores, and the answers of the tasks that have some."""
        found = self.evaluate(parameters, budget, key)
        return {result.task: result.mean for result in found}, answers_of(found)

    def evaluate(
        self,
        parameters: Parameters,
        budget: int | None = None,
        key: jax.Array | None = None,
        part: int = 0,
    ) -> list[Result]:
        """The results of all tasks, in their order; see `results`."""
        return list(self.results(parameters, budget, key, part))

    def of_layers(self, layers: Sequence[int]) -> TaskEvaluator:
        """That of models whose layers are these of this one's, in this order.

        Models of about as many layers share compilations: see `padded`.
        """
        made = copy.copy(self)
        config = self._options["config"].of_layers(up_to_depth(layers))
        made._options = {**self._options, "config": config}
        return made

    def results(
        self,
        parameters: Parameters,
        budget: int | None = None,
        key: jax.Array | None = None,
        part: int = 0,
    ) -> Iterator[Result]:
        """Yields the result of each task when it has been run.

        Args:
          parameters: nested dict of arrays.
          budget: only the first examples of each task; None: all.
          key: for sampling; the default is ``jax.random.key(0)``.
          part: not the first `budget` examples but those behind so many times as many,
            beginning anew at the end.
        """
        if budget is not None and budget < 1:
            raise ValueError(f"budget={budget} needs 1 example or more")
        key = jax.random.key(0) if key is None else key
        parameters = padded(parameters, self._options["config"])
        for place, task in enumerate(self.tasks):
            count = len(self._examples[place])
            first = part * (budget or 0)
            members = [(first + i) % count for i in range(count)][:budget]
            examples = [self._examples[place][i] for i in members]
            prepared = [self._prepare(place, i) for i in members]
            found: Iterable[dict[str, Any]]
            if task.kind in ("loss", "choice"):
                found = self._score(parameters, task, examples, prepared)
            else:
                found = self._generate(parameters, task, examples, prepared, key)
            records = (
                {"index": example.index, "prompt": example.prompt, **own}
                for example, own in zip(examples, found, strict=True)
            )
            truncated = sum(item.truncated for item in prepared)
            yield Result(task.name, task.metric, tuple(records), truncated)

    def _prepared(self, place: int, example: int) -> Prepared:
        own = self._examples[place][example]
        length = self.config.max_position_embeddings
        return prepare(own, self.tasks[place], self.tokenizer, length)

    def _score(
        self,
        parameters: Parameters,
        task: Task,
        examples: Sequence[Example],
        prepared: Sequence[Prepared],
    ) -> Iterable[dict[str, Any]]:
        """Scores completions or choices; what is found of each example."""
        contexts = [context for item in prepared for context in item.contexts]
        completions = [part for item in prepared for part in item.completions]
        scored = log_likelihoods(parameters, contexts, completions, **self._options)
        scores = iter(scored)
        for example, item in zip(examples, prepared, strict=True):
            sums = [next(scores).log_likelihood for _ in item.completions]
            if task.kind == "loss":
                tokens = len(item.completions[0])
                yield {
                    "completion": example.completion,
                    "log_likelihood": sums[0],
                    "tokens": tokens,
                    "score": -sums[0] / tokens,
                }
                continue
            normal = [s / n for s, n in zip(sums, item.lengths, strict=True)]
            # A model that gives NaN has chosen nothing.
            chosen = None if any(map(math.isnan, normal)) else int(np.argmax(normal))
            yield {
                "choices": example.choices,
                "log_likelihoods": sums,
                "normalised": normal,
                "chosen": chosen,
                "correct": example.correct,
                "score": float(chosen == example.correct),
            }

    def _generate(
        self,
        parameters: Parameters,
        task: Task,
        examples: Sequence[Example],
        prepared: Sequence[Prepared],
        key: jax.Array,
    ) -> list[dict[str, Any]]:
        """What the model writes behind each prompt, up to a stop text, and its mark."""
        for word in prng.name_words([task.name])[0]:
            key = jax.random.fold_in(key, word)
        written = continuations(
            parameters,
            [item.contexts[0] for item in prepared],
            max_new_tokens=task.max_new_tokens,
            stop_tokens=self.tokenizer.stop_tokens,
            sampling=Sampling(task.temperature, task.top_k, task.top_p),
            key=key,
            **self._options,
        )
        texts = map(self.tokenizer.decode, written)
        outputs = [answers.until_stop(text, task.stop) for text in texts]
        if task.kind != "code":
            return list(map(functools.partial(_compare, task), examples, outputs))
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            return list(pool.map(functools.partial(_run, task), examples, outputs))


def fingerprint(task: Task, examples: Sequence[Example] | None = None) -> str:
    """Tells a task and its data from others, wherever the data stand."""
    examples = load_examples(task) if examples is None else examples
    fields = {**dataclasses.asdict(task), "data": None}
    content = [fields, [dataclasses.asdict(example) for example in examples]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _compare(task: Task, example: Example, output: str) -> dict[str, Any]:
    """Marks an answer by the example's."""
    answer = answers.found(output, task)
    right = answers.is_right(answer, task, example)
    return {
        "output": output,
        "found": answer,
        "answer": example.answer,
        "score": float(right),
    }


def _run(task: Task, example: Example, output: str) -> dict[str, Any]:
    """Marks a program by running it with the example's tests."""
    program = "\n\n".join((example.setup, answers.code(output), example.tests))
    passed, why = programs.passes(
        program, seconds=task.seconds, megabytes=task.megabytes
    )
    return {"output": output, "problem": why, "score": float(passed)}
