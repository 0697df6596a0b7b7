"""Which tensors a model of a config has; reading a checkpoint as a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from m3jax.checkpoints.errors import CheckpointError, few, shown
from m3jax.checkpoints.formats import tree
from m3jax.models.config import Config
from m3jax.models.decoder import ARCHITECTURES, parameter_shapes, read_config
from m3jax.recipe.values import layer_of, renumbered

# The parameters' own shapes and names say these.
_MAY_DIFFER = ("vocab_size", "tie_word_embeddings", "max_position_embeddings")


@dataclasses.dataclass(frozen=True)
class Model:
    """A checkpoint that can be run.

    Attributes:
      parameters: nested dict of arrays, as `m3jax.load` gives it.
      config: of the decoder.
      folder: that holds the tokenizer and the other files.
    """

    parameters: dict[str, Any]
    config: Config
    folder: Path


def load_model(name: str, sharding: Any = None) -> Model:
    """Loads a checkpoint's parameters and config, and checks that they fit.

    Args:
      name: a folder, a safetensors file or a Hugging Face id.
      sharding: where the arrays go, as for `m3jax.load`.

    Raises:
      CheckpointError: it cannot be read, or is no model that can be run.
    """
    import m3jax

    config, folder = read_model_config(name)
    return Model(m3jax.load(name, sharding), config, folder)


def read_model_config(name: str) -> tuple[Config, Path]:
    """The config and the folder of a checkpoint that can be run; reads no tensor.

    Args:
      name: a folder, a safetensors file or a Hugging Face id.

    Raises:
      CheckpointError: it cannot be read, or its tensors are not what the config says.
    """
    from m3jax.checkpoints.folder import open_checkpoint

    with open_checkpoint(name) as checkpoint:
        folder, fields = checkpoint.folder, checkpoint.config
        tensors = checkpoint.tensors
    if not isinstance(folder, Path):
        raise CheckpointError(f"{name}: is in a store; copy it here to run the model")
    if fields is None:
        raise CheckpointError(f"{name}: has no config.json; the model needs one to run")
    quantised = fields.get("quantization_config")
    if isinstance(quantised, dict) and quantised.get("quant_method") == "fp8":
        fields = {**fields, "quantization_config": None}  # dequantised as it is read
    config = read_config(fields, f"{folder / 'config.json'}")
    check_parameters(tensors, config, name)
    return config, folder


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


def padded(parameters: Mapping[str, Any], config: Config) -> Mapping[str, Any]:
    """The parameters with as many layers as the config has.

    Those that they lack have weights of zero, and add nothing to the residual stream:
    models of several depths run as one program.
    """
    leaves, _ = tree.flatten(parameters)
    layers = {name: layer_of(name) for name in leaves}
    count = max((n for n in layers.values() if n is not None), default=-1) + 1
    if count >= config.num_layers:
        return parameters
    for name in [name for name, layer in layers.items() if layer == 0]:
        own = leaves[name]
        if jnp.issubdtype(own.dtype, jnp.floating):
            own = own - own  # zeros that lie where it does
        for i in range(count, config.num_layers):
            leaves[renumbered(name, i)] = own
    return tree.nest(leaves)


def check_parameters(
    parameters: Mapping[str, Any], config: Config, name: str = "parameters"
) -> None:
    """Raises CheckpointError if names or shapes are not those of the config.

    A tensor that the config does not ask for is refused as well: the model that it
    belongs to computes something else.
    """
    leaves, _ = tree.flatten(parameters)
    architecture = ARCHITECTURES[config.family]
    needed, prefix = parameter_shapes(config), architecture.prefix
    if not any(tensor.startswith(prefix) for tensor in leaves):
        needed = {tensor.removeprefix(prefix): own for tensor, own in needed.items()}
    head = "lm_head.weight"
    if config.tie_word_embeddings and head in leaves:
        needed[head] = (config.vocab_size, config.hidden_size)
    flaws = [f"lacks {shown(tensor)}" for tensor in needed if tensor not in leaves]
    for tensor, leaf in leaves.items():
        if tensor not in needed and not architecture.buffers.fullmatch(tensor):
            flaws.append(f"has {shown(tensor)}, which {config.family} does not know")
        elif tensor in needed and leaf.shape != needed[tensor]:
            found, wanted = list(leaf.shape), list(needed[tensor])
            flaws.append(f"{shown(tensor)} has shape {found}, needs {wanted}")
    if flaws:
        raise CheckpointError(
            f"{name}: is not what its config.json says: {few(flaws, 4)}"
        )
