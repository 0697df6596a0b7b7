"""Looks at values on their way through: are they finite, are they equal."""

from __future__ import annotations

import numpy as np

from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.engine.inputs import TensorInputs


def has_nonfinite(values: np.ndarray) -> bool:
    """Whether any value is NaN or infinite.

    Two integer reductions over the bits, which run at the speed of memory: infinity
    and NaN have the largest exponent, so as signed integers the positive ones are the
    largest, and as unsigned integers the negative ones.
    """
    if not len(values):
        return False
    size = values.dtype.itemsize
    infinity = int(np.array(np.inf, values.dtype).view(f"u{size}"))
    sign = 1 << (8 * size - 1)
    return bool(
        values.view(f"i{size}").max() >= infinity
        or values.view(f"u{size}").max() >= sign | infinity
    )


def check_finite(
    values: np.ndarray, start: int, tensor: TensorInputs, checkpoint: str
) -> None:
    """Raises CheckpointError naming the first NaN or infinity of an input.

    Args:
      values: elements [start, start + len(values)) of the tensor in `checkpoint`.
    """
    if has_nonfinite(values):
        value, index = _first_nonfinite(values, start, tensor)
        raise CheckpointError(
            f"{checkpoint}: tensor {shown(tensor.name)} holds {value} at {index}; mend "
            "the checkpoint, or pass --allow_nonfinite to merge it anyway"
        )


def check_overflow(values: np.ndarray, start: int, tensor: TensorInputs) -> None:
    """Raises CheckpointError if a merged value is beyond the dtype of `values`."""
    if has_nonfinite(values):
        _, index = _first_nonfinite(values, start, tensor)
        raise CheckpointError(
            f"tensor {shown(tensor.name)}: the merged value at {index} overflows "
            f"{values.dtype.name}; choose a wider dtype, or pass --allow_nonfinite"
        )


def check_equal(
    ours: np.ndarray,
    theirs: np.ndarray,
    start: int,
    tensor: TensorInputs,
    checkpoints: tuple[str, str],
) -> None:
    """Raises CheckpointError if a tensor that is only copied differs between inputs."""
    if ours.tobytes() == theirs.tobytes():
        return
    place = int(np.argmax(ours != theirs))
    raise CheckpointError(
        f"tensor {shown(tensor.name)} ({tensor.sources[0].dtype.code}) is "
        f"{ours[place]} in {checkpoints[0]} and {theirs[place]} in {checkpoints[1]} at "
        f"{_index(start + place, tensor)}; tensors that are not floating point cannot "
        "be merged and must be equal: exclude it to take the base's"
    )


def _first_nonfinite(
    values: np.ndarray, start: int, tensor: TensorInputs
) -> tuple[float, list[int]]:
    place = int(np.argmin(np.isfinite(values.astype(np.float32))))
    return float(values[place]), _index(start + place, tensor)


def _index(position: int, tensor: TensorInputs) -> list[int]:
    return [int(i) for i in np.unravel_index(position, tensor.shape)]
