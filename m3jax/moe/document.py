"""What a mixture is made of: the keys of mergekit's MoE YAML.

base_model: BASE                     attention, norms, embedding and head
gate_mode: hidden                    hidden_avg | cheap_embed | random | uniform_random
experts:
  - source_model: MATHS              its feed-forward layers
    positive_prompts: [prove that]   what its gates are made of
    negative_prompts: [a poem]
    noise_scale: 0.01                deviation of normal noise on its weights
    residual_scale: 0.5              multiplies what the expert adds, noise and all
  - source_model: BASE+ADAPTER
shared_experts: [...]                every token goes through; qwen2_moe, deepseek
experts_per_token: 2
architecture: mixtral                qwen2_moe | qwen3_moe | deepseek; by the base
dtype: bfloat16
m3jax: {seed: 3}                     of random gates
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from m3jax.recipe import RecipeError
from m3jax.recipe.mergekit import model_name
from m3jax.recipe.mergekit_values import check_keys, mapping

GATES = ("hidden", "hidden_avg", "cheap_embed", "random", "uniform_random")
ARCHITECTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek")
_MERGEKITS = {  # its names for them, of which it takes any beginning
    "mixtral": "mixtral",
    "deepseek moe": "deepseek",
    "qwen moe": "qwen2_moe",
    "qwen3 moe": "qwen3_moe",
}
_KEYS = (
    *("architecture", "base_model", "dtype", "experts", "experts_per_token"),
    *("gate_mode", "m3jax", "shared_experts"),
)
_OF_EXPERT = (
    *("negative_prompts", "noise_scale", "positive_prompts", "residual_scale"),
    "source_model",
)


@dataclasses.dataclass(frozen=True)
class Expert:
    """One expert.

    Attributes:
      source: the model whose feed-forward layers it is.
      positive, negative: prompts that its gates are made of.
      scale: of its last projection.
      noise: deviation of the noise on its weights, before they are scaled.
    """

    source: str
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    scale: float = 1.0
    noise: float = 0.0


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A mixture of experts, as it is asked for.

    Attributes:
      base: the model of all that is no expert.
      experts: those that gates choose from.
      shared: those that every token goes through.
      gates: a name of `GATES`.
      per_token: how many experts a token goes through.
      architecture: of the result; None: by the base's family.
      dtype: of the output; None: the widest of the inputs'.
      seed: the document's; None where it has none.
    """

    base: str
    experts: tuple[Expert, ...]
    shared: tuple[Expert, ...] = ()
    gates: str = "hidden"
    per_token: int = 2
    architecture: str | None = None
    dtype: str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.per_token <= len(self.experts):
            raise RecipeError(
                f"experts_per_token={self.per_token} needs 1 to the number of experts, "
                f"{len(self.experts)}"
            )
        if self.gates.startswith(("random", "uniform")):
            return
        for i, expert in enumerate(self.experts):
            if not expert.positive:
                raise RecipeError(
                    f"experts[{i}].positive_prompts is missing: gate_mode="
                    f"{self.gates} makes gates of prompts (random needs none)"
                )

    def to_dict(self) -> dict[str, Any]:
        """The keys of the YAML, as `parse` takes them."""
        own = {
            "architecture": self.architecture,
            "base_model": self.base,
            "dtype": self.dtype,
            "experts": [_expert_keys(expert) for expert in self.experts],
            "experts_per_token": self.per_token,
            "gate_mode": self.gates,
            "shared_experts": [_expert_keys(expert) for expert in self.shared],
        }
        return {key: value for key, value in own.items() if value}


def loaded(text: str) -> dict[str, Any] | None:
    """The document of a YAML file that asks for a mixture, by its key `experts`; None
    for any other text."""
    import yaml

    try:
        documents = list(yaml.safe_load_all(text))
    except (yaml.YAMLError, RecursionError, ValueError):
        return None  # mergekit's reader says what is wrong
    one = documents[0] if len(documents) == 1 else None
    return one if isinstance(one, dict) and "experts" in one else None


def parse(document: Mapping[str, Any]) -> Mixture:
    """The mixture that a document asks for.

    Raises:
      RecipeError: one line that names the key.
    """
    check_keys("", document, _KEYS)
    ours = mapping(document.get("m3jax"), "m3jax")
    check_keys("m3jax.", ours, ("seed",))
    per_token = document.get("experts_per_token", 2)
    if type(per_token) is not int:
        raise RecipeError(f"experts_per_token={per_token!r} needs an integer")
    dtype = document.get("dtype")
    return Mixture(
        base=_model(document.get("base_model"), "base_model"),
        experts=_experts(document.get("experts"), "experts"),
        shared=_experts(document.get("shared_experts") or [], "shared_experts"),
        gates=_word(document.get("gate_mode", "hidden"), "gate_mode", GATES),
        per_token=per_token,
        architecture=_architecture(document.get("architecture")),
        dtype=dtype and _text(dtype, "dtype").removeprefix("torch."),
        seed=ours.get("seed"),
    )


def _expert_keys(expert: Expert) -> dict[str, Any]:
    own = {
        "source_model": expert.source,
        "positive_prompts": list(expert.positive),
        "negative_prompts": list(expert.negative),
    }
    numbers = {
        "residual_scale": (expert.scale, 1.0),
        "noise_scale": (expert.noise, 0.0),
    }
    scaled = {key: value for key, (value, plain) in numbers.items() if value != plain}
    return {key: value for key, value in own.items() if value} | scaled


def _experts(entries: Any, key: str) -> tuple[Expert, ...]:
    if not isinstance(entries, list) or (not entries and key == "experts"):
        raise RecipeError(f"{key} needs a list of `source_model: NAME`")
    return tuple(_expert(own, f"{key}[{i}]") for i, own in enumerate(entries))


def _expert(entry: Any, key: str) -> Expert:
    entry = mapping(entry, key)
    check_keys(f"{key}.", entry, _OF_EXPERT)
    return Expert(
        _model(entry.get("source_model"), f"{key}.source_model"),
        _prompts(entry.get("positive_prompts"), f"{key}.positive_prompts"),
        _prompts(entry.get("negative_prompts"), f"{key}.negative_prompts"),
        _number(entry.get("residual_scale"), f"{key}.residual_scale", 1.0),
        _number(entry.get("noise_scale"), f"{key}.noise_scale", 0.0),
    )


def _number(value: Any, key: str, default: float) -> float:
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RecipeError(f"{key}={value!r} needs a number")
    return float(value)


def _model(value: Any, key: str) -> str:
    if isinstance(value, dict):
        value = model_name(value, key)
    return _text(value, key)


def _architecture(given: Any) -> str | None:
    """By our name, or by the beginning of mergekit's; None: by the base's family."""
    if given is None or given in ARCHITECTURES:
        return given
    start = str(given).lower()
    meant = [own for name, own in _MERGEKITS.items() if name.startswith(start)]
    if not meant:
        return _word(given, "architecture", ARCHITECTURES)
    return meant[0] if len(meant) == 1 else None


def _prompts(value: Any, key: str) -> tuple[str, ...]:
    value = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(own, str) for own in value):
        raise RecipeError(f"{key}={value!r} needs a list of texts")
    return tuple(value)


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value:
        raise RecipeError(f"{key}={value!r} needs a name")
    return value


def _word(value: Any, key: str, known: Sequence[str]) -> str:
    if value not in known:
        raise RecipeError(f"{key}={value!r} needs one of {', '.join(known)}")
    return str(value)
