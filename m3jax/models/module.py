"""A checkpoint as a Flax NNX module."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

try:
    from flax import nnx
except ImportError as error:
    raise ImportError(
        "m3jax.Decoder needs flax; install it with: pip install 'm3jax[flax]'"
    ) from error

from m3jax.models.config import Config
from m3jax.models.decoder import forward
from m3jax.models.layers import Parameters
from m3jax.models.parameters import check_parameters, load_model


class Decoder(nnx.Module):
    """A decoder whose state is the checkpoint's own pytree: no renaming, no copy.

    A thin shell around `decoder.forward`, for `nnx.grad`, `nnx.jit`, `nnx.Optimizer`:

        model = m3jax.Decoder.load("merged")  # or Decoder(merged_pytree, config)
        logits = model(tokens)
        model.model.norm.weight  # an nnx.Param
        m3jax.save(model.parameters, "again")

    Attributes:
      config: of the decoder.
    """

    def __init__(self, parameters: Parameters, config: Config):
        """Takes the arrays of a pytree as `m3jax.load` and `merge_params` give it.

        Args:
          parameters: nested dict; each of its dicts becomes an `nnx.Dict`, each leaf an
            `nnx.Param` that holds the same array. What is not floating-point, such as
            the masks of some GPT-2 checkpoints, is a plain `nnx.Variable`.
          config: of the decoder.

        Raises:
          CheckpointError: names or shapes are not those of the config.
        """
        check_parameters(parameters, config)
        self.config = config
        for name, part in parameters.items():
            setattr(self, name, _variables(part))

    @classmethod
    def load(cls, name: str) -> Decoder:
        """Loads a checkpoint: a folder, a safetensors file or a Hugging Face id.

        Raises:
          CheckpointError: it cannot be read, or is no model that can be run.
        """
        model = load_model(name)
        return cls(model.parameters, model.config)

    @property
    def parameters(self) -> dict[str, Any]:
        """The nested dict of arrays, under the checkpoint's names."""
        return nnx.to_pure_dict(nnx.state(self))

    def __call__(
        self, tokens: jax.Array, valid: jax.Array | None = None, *, dtype: Any = None
    ) -> jax.Array:
        """Logits (B, T, V), float32; see `decoder.forward`."""
        return forward(
            self.parameters, tokens, config=self.config, valid=valid, dtype=dtype
        )


def _variables(part: Any) -> Any:
    if isinstance(part, dict):
        return nnx.Dict({name: _variables(own) for name, own in part.items()})
    floating = jnp.issubdtype(part.dtype, jnp.floating)
    return nnx.Param(part) if floating else nnx.Variable(part)
