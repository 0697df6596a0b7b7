"""Scores by a program of the user's, which gets each merge as a checkpoint folder."""

from __future__ import annotations

import copy
import json
import math
import shlex
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from m3jax.checkpoints.errors import shown
from m3jax.checkpoints.folder import open_checkpoint
from m3jax.checkpoints.side_files import CONFIG, as_json, changed
from m3jax.engine import layer_config
from m3jax.engine.save import save
from m3jax.engine.slices import Stack
from m3jax.evaluation.tasks.task import TaskError
from m3jax.models.layers import Parameters

_PLACES = ("{checkpoint}", "{budget}", "{seed}")
_SHOWN = 300  # characters of a program's complaint


class CommandEvaluator:
    """Writes the parameters to a folder, runs a command on it, and reads its scores.

    The command's last line on standard output has to be a JSON object of numbers by
    name, more being better. It is run without a shell.

        CommandEvaluator("python score.py {checkpoint}", like="base")
    """

    def __init__(
        self,
        command: str,
        like: str,
        *,
        folder: str | Path | None = None,
        timeout: float | None = None,
    ):
        """
        Args:
          command: with ``{checkpoint}`` for the folder, and ``{budget}`` (empty where
            there is none) and ``{seed}`` where it wants them.
          like: the checkpoint whose config and tokenizer go along.
          folder: in which the checkpoints lie while they are scored; None: that of
            temporary files.
          timeout: seconds that the command may take.

        Raises:
          TaskError: the command does not name the checkpoint, or is no command.
        """
        try:
            self._words = shlex.split(command)
        except ValueError as error:
            raise TaskError(f"evaluator_command={command!r}: {error}") from None
        if not any(_PLACES[0] in word for word in self._words):
            raise TaskError(
                f"evaluator_command={command!r} needs {{checkpoint}} in the place of "
                "the folder, as in 'python score.py {checkpoint}'"
            )
        self._command, self._like = command, like
        self._folder, self._timeout = folder, timeout
        self._layers: tuple[int, ...] | None = None

    def __call__(
        self, parameters: Parameters, budget: int | None, key: jax.Array
    ) -> Mapping[str, float]:
        """See `Evaluator`."""
        seed = int(jax.random.key_data(key)[-1])
        with tempfile.TemporaryDirectory(prefix="m3jax-", dir=self._folder) as folder:
            checkpoint = Path(folder) / "merged"
            save(parameters, checkpoint, like=self._like)
            if self._layers is not None:
                self._write_config(checkpoint, self._layers)
            given = (str(checkpoint), "" if budget is None else str(budget), str(seed))
            return self._scores(self._run(given))

    def of_layers(self, layers: Sequence[int]) -> CommandEvaluator:
        """That of models whose layers are these of `like`, in this order."""
        made = copy.copy(self)
        made._layers = tuple(layers)
        return made

    def _write_config(self, checkpoint: Path, layers: Sequence[int]) -> None:
        changes: dict[str, Any] = {}
        with open_checkpoint(self._like) as like:
            stack = Stack("", tuple((like, layer) for layer in layers))
            layer_config.follow(like, [stack], changes, [])
        if changes:
            path = checkpoint / CONFIG
            path.write_bytes(as_json(changed(json.loads(path.read_bytes()), changes)))

    def fingerprint(self) -> str:
        """What a resumed exploration has to have in common with the first one."""
        return f"command {self._command}"

    def _run(self, given: tuple[str, ...]) -> str:
        words = self._words
        for place, value in zip(_PLACES, given, strict=True):
            words = [word.replace(place, value) for word in words]
        try:
            ran = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=self._timeout,
            )
        except subprocess.TimeoutExpired:
            raise TaskError(
                f"evaluator_command: {self._command!r} took more than {self._timeout} s"
            ) from None
        except OSError as error:
            raise TaskError(
                f"evaluator_command: {words[0]}: {error.strerror}; give a program that "
                "is on PATH"
            ) from None
        if ran.returncode:
            said = (ran.stderr.strip() or ran.stdout.strip()).splitlines()
            reason = shown(said[-1][:_SHOWN]) if said else "nothing"
            raise TaskError(
                f"evaluator_command: {self._command!r} ended with {ran.returncode}, "
                f"saying {reason}"
            )
        return ran.stdout

    def _scores(self, output: str) -> dict[str, float]:
        lines = output.strip().splitlines()
        last = lines[-1] if lines else ""
        try:
            found: Any = json.loads(last)
        except (ValueError, RecursionError):
            found = None
        numbers = isinstance(found, dict) and all(
            isinstance(own, (int, float)) and not isinstance(own, bool)
            for own in found.values()
        )
        if not found or not numbers:
            raise TaskError(
                f"evaluator_command: {self._command!r} printed {shown(last[:_SHOWN])} "
                'last; needs a JSON object of numbers, as {"score": 0.5}'
            )
        return {str(name): _finite(own) for name, own in found.items()}


def _finite(value: float) -> float:
    return float(value) if abs(value) < math.inf else math.nan
