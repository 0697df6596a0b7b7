"""Where a run stands; written to one file, from which it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.places import durable


class State(NamedTuple):
    """Where a run stands after `step` steps.

    Attributes:
      step: done.
      raw: numbers by group, before the constraint.
      optimizer: Optax's own.
      best: the raw numbers that were best on validation.
      losses: of each step, before it.
      looks: (step, loss on validation).
    """

    step: int
    raw: Any
    optimizer: Any
    best: Any
    losses: tuple[float, ...] = ()
    looks: tuple[tuple[int, float], ...] = ()

    @property
    def parts(self) -> dict[str, Any]:
        """What of it is pytrees of arrays."""
        return {"raw": self.raw, "optimizer": self.optimizer, "best": self.best}

    @property
    def best_look(self) -> tuple[int, float] | None:
        """The look with the least loss, the first of those; None without one."""
        return min(self.looks, key=lambda look: look[1]) if self.looks else None


def save(state: State, header: dict[str, Any], path: Path) -> None:
    """Writes a state that is there completely or not at all."""
    from flax import serialization

    arrays = {
        name: serialization.to_state_dict(jax.device_get(own))
        for name, own in state.parts.items()
    }
    words = {
        "header": header,
        "step": state.step,
        "losses": state.losses,
        "looks": state.looks,
    }
    content = serialization.msgpack_serialize(
        {"words": json.dumps(words), "arrays": arrays}
    )
    with durable.appearing(path) as unfinished:
        unfinished.write_bytes(content)


def load(like: State, header: dict[str, Any], path: Path) -> State:
    """The state of an interrupted run.

    Args:
      like: the state of step 0, for structure, shapes and dtypes.
      header: what it has to belong to.

    Raises:
      CheckpointError: it belongs to something else, or is none; one line.
    """
    from flax import serialization

    from m3jax.runs.log import compare

    try:
        found = serialization.msgpack_restore(path.read_bytes())
        words, arrays = json.loads(found["words"]), found["arrays"]
        compare(path, words["header"], json.loads(json.dumps(header)))
        parts = {
            name: serialization.from_state_dict(own, arrays[name])
            for name, own in like.parts.items()
        }
        fits = jax.tree.map(lambda a, b: np.shape(a) == np.shape(b), parts, like.parts)
    except CheckpointError:
        raise
    except Exception as error:  # msgpack and Flax raise a dozen unrelated types
        raise CheckpointError(
            f"{path}: is not as m3jax wrote it ({type(error).__name__}); begin anew "
            "with --overwrite"
        ) from None
    if not jax.tree.all(fits):
        raise CheckpointError(f"{path}: has other shapes; begin anew with --overwrite")
    placed = jax.tree.map(
        lambda own, old: (
            jax.device_put(own, old.sharding) if isinstance(old, jax.Array) else own
        ),
        parts,
        like.parts,
    )
    return State(
        step=words["step"],
        losses=tuple(words["losses"]),
        looks=tuple((step, value) for step, value in words["looks"]),
        **placed,
    )
