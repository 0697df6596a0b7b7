"""Whether models, and what they are merged into, can be run by one config."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from m3jax.checkpoints.errors import CheckpointError
from m3jax.models.config import Config
from m3jax.models.parameters import read_model_config

# The parameters' own shapes and names say these.
_MAY_DIFFER = ("vocab_size", "tie_word_embeddings", "max_position_embeddings")


def common_config(names: Sequence[str]) -> tuple[Config, dict[str, Path]]:
    """The config of the first checkpoint, which has to be that of all.

    Returns:
      It, and the folder of each checkpoint.

    Raises:
      CheckpointError: a checkpoint cannot be run, or computes something else than
        the first; the attribute is named.
    """
    found = {name: read_model_config(name) for name in names}
    first = found[names[0]][0]
    for name, (config, _) in found.items():
        for field in dataclasses.fields(first):  # `family` first: it has the others
            own, wanted = getattr(config, field.name), getattr(first, field.name)
            if own != wanted and field.name not in _MAY_DIFFER:
                raise CheckpointError(
                    f"{name}: its config.json says {field.name} = {own}, that of "
                    f"{names[0]} {wanted}; a merge of the two can only be run as one "
                    "of them: make the two files agree"
                )
    return first, {name: folder for name, (_, folder) in found.items()}
