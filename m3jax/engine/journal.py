"""What a merge has found out and written so far, kept for `--resume`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import jax
import jaxlib
import numpy as np

import m3jax
from m3jax.checkpoints.output.folder import OutputError, OutputFolder
from m3jax.checkpoints.output.part import OutputPart
from m3jax.engine.prepared import Prepared
from m3jax.engine.progress import Progress
from m3jax.methods.step import Info

# Of `fingerprint`.
_INPUTS, _STATE, _FORMAT = "set of inputs", "state of its inputs", "output format"


class Journal:
    """What an interrupted merge had found out and written, and what this one does.

    Nothing is written before there is something worth keeping.
    """

    def __init__(
        self,
        prepared: Prepared,
        folder: OutputFolder | OutputPart,
        progress: Progress,
    ):
        self._folder = folder
        self._checked = not prepared.execution.allow_nonfinite
        self._start = {"fingerprint": fingerprint(prepared)}
        entries = folder.journalled
        self._entries = self._of_this_merge(entries)
        self._begun = False
        if self._start in entries:
            folder.clear(keep={shard.name for shard in prepared.shards})
        elif entries:
            self._let_go(entries, progress, overwrite=prepared.execution.overwrite)

    def _let_go(
        self, entries: list[dict[str, Any]], progress: Progress, *, overwrite: bool
    ) -> None:
        """Removes what another merge has left.

        Raises:
          OutputError: it may be hours of work that somebody can still go on from, and
            nobody has said that it may go.
        """
        ours = self._start["fingerprint"]
        theirs = [own["fingerprint"] for own in entries if "fingerprint" in own]
        found = theirs[0] if theirs and isinstance(theirs[0], dict) else {}
        changed = [name for name in ours if found.get(name) != ours[name]]
        if _INPUTS in changed:
            changed.remove(_STATE)
        if len(changed) > 1:  # it follows from the others
            changed = [name for name in changed if name != _FORMAT]
        line = f"the interrupted merge had another {' and another '.join(changed)}"
        if not (overwrite or "version" in changed or _STATE in changed):
            raise OutputError(
                f"{self._folder.final}: {line}; --overwrite in place of --resume "
                "starts from the beginning"
            )
        progress.note(f"{line}; starting from the beginning")
        self._folder.clear()

    def statistics(self, name: str) -> Info | None:
        """What a reading pass had found out, or None."""
        for entry in self._entries:
            if entry.get("statistics") == name:
                return {
                    key: np.frombuffer(bytes.fromhex(text), dtype).reshape(shape)
                    for key, (dtype, shape, text) in entry["values"].items()
                }
        return None

    def keep_statistics(self, name: str, info: Info) -> Info:
        """Notes what a reading pass has found out, and returns it."""
        values = {
            key: (value.dtype.str, list(value.shape), value.tobytes().hex())
            for key, value in info.items()
        }
        self._append({"statistics": name, "values": values})
        return info

    def tensors(self) -> dict[str, dict[str, Any]]:
        """The entries of the tensors that were completely written, by name.

        Where non-finite values are refused, only those that were looked through.
        """
        return {
            entry["tensor"]: entry
            for entry in self._entries
            if "tensor" in entry and (entry["checked"] or not self._checked)
        }

    def keep_tensors(
        self, done: Sequence[tuple[str, dict[str, str], list[str]]]
    ) -> None:
        """Notes that tensors are completely written, with what they were made of.

        Args:
          done: the name of each, its checksums by part, and those of its inputs.
        """
        self._append(
            *(
                {
                    "tensor": name,
                    "checksums": checksums,
                    "inputs": inputs,
                    "checked": self._checked,
                }
                for name, checksums, inputs in done
            )
        )

    def _of_this_merge(self, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The entries that stand behind this merge's fingerprint, of any process."""
        found, ours = [], False
        for entry in entries:
            if "fingerprint" in entry:
                ours = entry == self._start
            elif ours:
                found.append(entry)
        return found

    def _append(self, *entries: dict[str, Any]) -> None:
        if entries:
            self._folder.journal(*([] if self._begun else [self._start]), *entries)
            self._begun = True


def fingerprint(prepared: Prepared) -> dict[str, str]:
    """Digests of all that decides the output's tensors; `--resume` compares them.

    Inputs count by their path, size and time of change (or their tag in a store):
    reading them to the end would take as long as merging them. How the merge is run
    does not count, but for the kind of device, which may round differently.
    """
    files = [file for own in prepared.checkpoints for file in own.files]
    facts: dict[str, Any] = {
        "version": [
            m3jax.__version__,
            [jax.__version__, jaxlib.__version__, np.__version__],
            sorted({device.device_kind for device in prepared.devices}),
        ],
        "recipe": [prepared.recipe.to_dict(), prepared.base is None, prepared.rows],
        "seed": prepared.seed,
        _INPUTS: [str(file.path.resolve()) for file in files],
        _STATE: [[file.size, file.version] for file in files],
        _FORMAT: [shard.header.hex() for shard in prepared.shards],
    }
    return {
        name: hashlib.sha256(json.dumps(own).encode()).hexdigest()
        for name, own in facts.items()
    }
