"""How a merge is run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax

from m3jax.engine.pipeline import available_cores

FORMATS = ("safetensors", "orbax")  # of outputs
EXECUTORS = ("streamed", "sharded")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """How a merge is run; nothing here changes a byte of the result.

    Attributes:
      threads: that read, compute and write; None: one more than cores, 2 to 4.
      chunk_size: elements of a tensor that are worked on at a time; None: chosen.
      devices: to compute on; None: all local devices of the default backend.
      overwrite: replace a previous m3jax output.
      resume: continue an interrupted merge.
      allow_nonfinite: merge NaN and infinity instead of refusing them.
      fsync: wait until the disk has the output before it gets its name.
      tokenizer_from: the model whose tokenizer goes along; None: the base's.
      output_format: ``safetensors`` or ``orbax``; None: ``orbax`` if the base (the
        first model without one) is an Orbax checkpoint.
      strict: refuse models that differ from the first in more than their weights, such
        as in their rope, their end token or where they come from.
      executor: ``streamed``, or ``sharded``: in the memory of all devices.
      mesh: sizes of ``rows`` and ``columns`` of the devices of the sharded executor,
        by which it splits tensors; None: all are rows.
    """

    threads: int | None = None
    chunk_size: int | None = None
    devices: Sequence[jax.Device] | None = None
    overwrite: bool = False
    resume: bool = False
    allow_nonfinite: bool = False
    fsync: bool = True
    tokenizer_from: str | None = None
    output_format: str | None = None
    strict: bool = False
    executor: str = "streamed"
    mesh: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        if self.executor not in EXECUTORS:
            raise ValueError(
                f"executor={self.executor!r} needs {' or '.join(EXECUTORS)}"
            )
        if self.executor == "sharded" and self.chunk_size is not None:
            raise ValueError("chunk_size is of the streamed executor alone")
        if self.executor == "streamed" and self.mesh is not None:
            raise ValueError("mesh is of the sharded executor alone")
        if self.output_format not in (None, *FORMATS):
            raise ValueError(
                f"output_format={self.output_format!r} needs {' or '.join(FORMATS)}"
            )
        if self.threads is not None and not 1 <= self.threads <= 256:
            raise ValueError(f"threads={self.threads} needs 1 to 256")

    @property
    def num_threads(self) -> int:
        # One more than cores: one of them may be waiting for what it reads.
        return self.threads or min(4, available_cores() + 1)
