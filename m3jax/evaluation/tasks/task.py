"""Tasks: a JSONL file and a short spec of what to ask and how to mark the answer.

    {"name": "gsm8k", "kind": "numeric", "data": "gsm8k_test.jsonl",
     "prompt": "Question: {question}\\nAnswer:", "answer": "{answer}",
     "stop": ["\\nQuestion:"], "max_new_tokens": 320}

``{question}`` is the field of that name of a line of the data; other braces mean
themselves. A list of strings in a text is joined by line ends.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.places.files import read_small

_MAX_SPEC = 16_000_000  # bytes; a prompt of many examples takes a thousandth of it

# The fields of a spec that a kind of task needs, and those that it may have.
_GENERATED = (
    "max_new_tokens",
    "stop",
    "temperature",
    "top_k",
    "top_p",
)
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "loss": (("completion",), ("delimiter",)),
    "choice": (("choices", "answer"), ("delimiter", "normalise")),
    "exact_match": (("answer",), (*_GENERATED, "ignore_case")),
    "regex": (("pattern",), (*_GENERATED, "answer", "ignore_case")),
    "numeric": (("answer",), _GENERATED),
    "code": (("tests",), (*_GENERATED, "setup", "seconds", "megabytes")),
}
NORMALISATIONS = ("bytes", "tokens", "none")
_ALWAYS = ("name", "kind", "data", "prompt")
_ANYWHERE = ("chat", "system", "add_special_tokens")


class TaskError(ValueError):
    """A task cannot be used; one line that names the file and the field or line."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What to ask and how to mark the answer.

    Attributes:
      name: in results.
      kind: one of KINDS.
        loss         mean cross-entropy of the tokens of `completion`, in nats
        choice       is the likeliest of `choices` the `answer`
        exact_match  is what the model writes, stripped of space, the `answer`
        regex        does `pattern` occur in it; its first group is the `answer`
        numeric      is its number the `answer`'s: behind "####", or the last one
        code         does it pass `tests`, run by Python
      data: a JSONL file, an object a line.
      prompt: template.
      completion: template, for loss.
      choices: templates, or "{field}" of a list.
      answer: template; for choice the index of the right one, its letter or its text.
      delimiter: between the prompt and a completion or choice.
      normalise: by what the log-likelihood of a choice is divided: its length in UTF-8
        ``bytes`` (delimiter not counted) or in ``tokens``, or by ``none``.
      chat: put the prompt through the tokenizer's chat template, as the user's turn.
      system: the system message of the chat.
      add_special_tokens: begin as the tokenizer begins texts; a chat never does.
      max_new_tokens: that the model may write.
      stop: texts; what the model writes ends before the first of them.
      temperature, top_k, top_p: of sampling; temperature 0 is greedy.
      ignore_case: of the answer.
      pattern: regular expression, searched for in what the model writes.
      tests: Python statements that raise if the code is wrong, a template.
      setup: Python statements that go before the code, a template.
      seconds, megabytes: that a program may take.
    """

    name: str
    kind: str
    data: Path
    prompt: str
    completion: str | None = None
    choices: str | tuple[str, ...] | None = None
    answer: str | None = None
    delimiter: str = ""
    normalise: str = "bytes"
    chat: bool = False
    system: str | None = None
    add_special_tokens: bool = True
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    ignore_case: bool = False
    pattern: str | None = None
    tests: str | None = None
    setup: str = ""
    seconds: float = 10.0
    megabytes: int = 1024

    @property
    def metric(self) -> str:
        return "loss" if self.kind == "loss" else "accuracy"

    @property
    def higher_is_better(self) -> bool:
        return self.kind != "loss"

    @classmethod
    def from_dict(cls, spec: Mapping[str, Any], folder: Path, where: str) -> Task:
        """Reads and checks a spec.

        Args:
          spec: its fields.
          folder: that `data` is relative to.
          where: its name in errors.

        Raises:
          TaskError: a field is missing, unknown, or of the wrong type; it is named.
        """
        kind = spec.get("kind")
        if kind not in KINDS:
            raise TaskError(
                f"{where}: kind={shown(kind)} needs to be one of {', '.join(KINDS)}"
            )
        needed, optional = KINDS[kind]
        lacking = [name for name in (*_ALWAYS, *needed) if name not in spec]
        if lacking:
            raise TaskError(f"{where}: a {kind} task needs {', '.join(lacking)}")
        known = (*_ALWAYS, *needed, *optional, *_ANYWHERE)
        for name in spec:
            if name not in known:
                raise TaskError(
                    f"{where}: a {kind} task has no field {shown(name)}; "
                    f"known: {', '.join(known)}"
                )
        fields = {
            name: _checked(name, value, f"{where}: {name}")
            for name, value in spec.items()
        }
        task = cls(**{**fields, "data": folder / fields["data"]})
        if task.system is not None and not task.chat:
            raise TaskError(f"{where}: system needs chat: true")
        return task


def load_tasks(path: str | Path) -> list[Task]:
    """The tasks of a JSON file: a spec, a list of specs, or an object of `tasks`.

    Raises:
      TaskError: the file cannot be used.
    """
    path = Path(path)
    try:
        found = json.loads(read_small(path, _MAX_SPEC))
    except OSError as error:
        raise TaskError(f"{path}: {error.strerror}; give a task's JSON file") from None
    except CheckpointError as error:  # a FIFO, say
        raise TaskError(f"{error}; give a task's JSON file") from None
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{path}: not valid JSON ({error})") from None
    if isinstance(found, dict) and "tasks" in found:
        found = found["tasks"]
    specs = found if isinstance(found, list) else [found]
    tasks = []
    for spec in specs:
        if not isinstance(spec, dict):
            raise TaskError(f"{path}: needs an object for each task, has {shown(spec)}")
        where = f"{path}: task {shown(spec['name'])}" if "name" in spec else str(path)
        tasks.append(Task.from_dict(spec, path.parent, where))
    return tasks


def _checked(name: str, value: Any, where: str) -> Any:
    """A field of a spec, if it is of the right type and in range."""
    if name in ("chat", "add_special_tokens", "ignore_case"):
        return _need(value, isinstance(value, bool), where, "true or false")
    if name in ("stop", "choices") and isinstance(value, list):
        fine = all(isinstance(part, str) and part for part in value)
        return tuple(_need(value, fine, where, "texts that are not empty"))
    if name == "stop":
        return (_need(value, isinstance(value, str) and value, where, "texts"),)
    if name in ("max_new_tokens", "top_k", "megabytes"):
        fine = isinstance(value, int) and not isinstance(value, bool) and value > 0
        return _need(value, fine, where, "a positive integer")
    if name in ("temperature", "top_p", "seconds"):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        low = 0 if name == "temperature" else 1e-9
        high = 1.0 if name == "top_p" else 1e9
        return _need(value, number and low <= value <= high, where, "a number in range")
    _need(value, isinstance(value, str), where, "a text")
    if name == "normalise":
        known = value in NORMALISATIONS
        return _need(value, known, where, f"one of {', '.join(NORMALISATIONS)}")
    if name == "pattern":
        try:
            re.compile(value)
        except re.error as error:
            raise TaskError(
                f"{where}={shown(value)}: no regular expression ({error})"
            ) from None
    return value


def _need(value: Any, fine: Any, where: str, what: str) -> Any:
    if not fine:
        raise TaskError(f"{where}={shown(value)} needs {what}")
    return value
