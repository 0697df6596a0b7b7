"""Which tensors of which checkpoints make which tensor of the output."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.folder import Checkpoint
from m3jax.checkpoints.formats.dtypes import FLOAT64, Dtype
from m3jax.checkpoints.source import Source


@dataclasses.dataclass(frozen=True)
class Origin:
    """A tensor of a checkpoint, of which one of the output is made.

    Attributes:
      owner: the checkpoint.
      name: of the tensor there.
      source: reads it.
    """

    owner: Checkpoint
    name: str
    source: Source


@dataclasses.dataclass(frozen=True)
class Part:
    """A tensor of one part of the output.

    Attributes:
      dtype, shape: as it is written.
      packed: it is made as bools, and written as `numpy.packbits` of them.
    """

    dtype: Dtype
    shape: tuple[int, ...]
    packed: bool = False

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return (-(-math.prod(self.shape) // 8),) if self.packed else self.shape


@dataclasses.dataclass(frozen=True)
class TensorInputs:
    """One tensor of the output and what it is made of.

    Attributes:
      name: in the output.
      base: its origin in the base, None where nothing needs it.
      models: its origins in the models; empty where it is copied unseen.
      merged: False for a tensor that is copied from the first origin.
      dtype: of the output.
      parts: what is made of it, by part of the output; "" is the model itself.
      beside: what comes beside each model, by name; none where no checkpoint has it.
      file: of the output that holds it, "" where the model does: "head-0".
    """

    name: str
    base: Origin | None
    models: tuple[Origin, ...]
    merged: bool
    dtype: Dtype
    parts: Mapping[str, Part]
    beside: Mapping[str, tuple[Origin, ...]] = dataclasses.field(default_factory=dict)
    file: str = ""

    @functools.cached_property
    def origins(self) -> tuple[Origin, ...]:
        """All that it is made of: base, models, and what comes beside them."""
        base = () if self.base is None else (self.base,)
        return (*base, *self.models, *(o for own in self.beside.values() for o in own))

    @functools.cached_property
    def sources(self) -> tuple[Source, ...]:
        return tuple(origin.source for origin in self.origins)

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        return self.sources[0].shape

    @functools.cached_property
    def wide(self) -> bool:
        """Whether it is merged in float64."""
        return self.merged and self.models[0].source.dtype == FLOAT64

    @functools.cached_property
    def kernel_dtypes(self) -> tuple[tuple[str, str], ...]:
        """What the kernel rounds each part to; wider ones are made on the host."""
        narrow = self.dtype == FLOAT64 and not self.wide
        return tuple(
            (
                part,
                "bool"
                if own.packed
                else "float32"
                if narrow and own.dtype == FLOAT64
                else own.dtype.numpy.name,
            )
            for part, own in self.parts.items()
        )

    @functools.cached_property
    def signature(self) -> tuple[Any, ...]:
        """What tensors must share to stand in one chunk: what a kernel sees."""
        if not self.merged:
            return "copy", self.sources[0].dtype.code
        base = self.base.source.dtype.code if self.base is not None else "-"
        code = self.models[0].source.dtype.code
        beside = tuple(sorted(self.beside))
        return "F64" if self.wide else "F32", base, code, beside, self.kernel_dtypes

    @functools.cached_property
    def written_bytes(self) -> int:
        return sum(
            math.prod(own.stored_shape) * own.dtype.itemsize
            for own in self.parts.values()
        )


@dataclasses.dataclass(frozen=True)
class MergeInputs:
    """All tensors of the output, in order of their names.

    Attributes:
      tensors: what each tensor is made of.
      config: changes to config.json that the merge makes necessary; a value of
        None removes the field.
      notes: what the user should know, one line each.
    """

    tensors: tuple[TensorInputs, ...]
    config: dict[str, Any]
    notes: tuple[str, ...]


class MismatchError(CheckpointError):
    """The checkpoints do not fit each other; `mismatches` has a line for each."""

    def __init__(self, mismatches: list[str], hint: str = ""):
        self.mismatches = mismatches
        self.hint = hint
        more = len(mismatches) - 3
        tail = f"; and {more} more (--dry_run lists them)" if more > 0 else ""
        way_out = f"; {hint}" if hint else ""
        super().__init__("; ".join(mismatches[:3]) + tail + way_out)
