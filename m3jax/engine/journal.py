"""What a merge has found out and written so far, kept for `--resume`."""

from __future__ import annotations

from typing import Any

import numpy as np

from m3jax.checkpoints.output import OutputFolder
from m3jax.engine.prepare import Prepared
from m3jax.engine.progress import Progress
from m3jax.methods.method import Info


class Journal:
    """What an interrupted merge had found out and written, and what this one does."""

    def __init__(self, prepared: Prepared, folder: OutputFolder, progress: Progress):
        self._folder = folder
        start = {"fingerprint": prepared.fingerprint()}
        entries = folder.journalled
        self.resumed = bool(entries) and entries[0] == start
        if entries and not self.resumed:
            progress.note(
                "the interrupted merge had another recipe, other inputs or another "
                "version; starting from the beginning"
            )
        self._entries = entries[1:] if self.resumed else []
        if not self.resumed:
            folder.clear()
            folder.journal(start)

    def statistics(self, name: str) -> Info | None:
        for entry in self._entries:
            if entry.get("statistics") == name:
                return {
                    key: np.frombuffer(bytes.fromhex(text), dtype).reshape(shape)
                    for key, (dtype, shape, text) in entry["values"].items()
                }
        return None

    def keep_statistics(self, name: str, info: Info) -> Info:
        values = {
            key: (value.dtype.str, list(value.shape), value.tobytes().hex())
            for key, value in info.items()
        }
        self._folder.journal({"statistics": name, "values": values})
        return info

    def tensors(self) -> dict[str, dict[str, Any]]:
        return {e["tensor"]: e for e in self._entries if "tensor" in e}

    def keep_tensor(self, name: str, checksum: str, inputs: list[str]) -> None:
        self._folder.journal({"tensor": name, "checksum": checksum, "inputs": inputs})
