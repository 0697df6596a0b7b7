"""What config.json says of a model of the Llama family."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

from m3jax.models.config import Config, Fields
from m3jax.models.rope import Rope

# Read in the forms of all releases of transformers; any other value is another model.
_FIXED = {
    "hidden_act": "silu",
    "is_encoder_decoder": False,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "tie_encoder_decoder": False,
}
_ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(Config):
    """The shape of a decoder of the Llama family, and its constants.

    Attributes:
      family: ``llama``, ``mistral``, ``qwen2`` or ``qwen3``.
      intermediate_size: width of the feed-forward layers.
      rms_norm_eps: added to the mean square.
      rope: rotary position embeddings.
      windows: for each layer, how many tokens it sees, its own included; None: all.
      qkv_bias, output_bias, mlp_bias: which linear layers have one.
      qk_norm: queries and keys are normalised, head by head.
    """

    intermediate_size: int
    rms_norm_eps: float
    rope: Rope
    windows: tuple[int | None, ...]
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    def of_layers(self, layers: Sequence[int]) -> Self:
        """See `Config`."""
        windows = tuple(self.windows[layer] for layer in layers)
        return dataclasses.replace(super().of_layers(layers), windows=windows)


def read_config(fields: Fields, family: str) -> LlamaConfig:
    """Reads the content of a config.json.

    Raises:
      CheckpointError: an attribute is missing, wrong or unknown; it is named.
    """
    fields.fixed(_FIXED)
    heads = fields.count("num_attention_heads")
    hidden = fields.count("hidden_size")
    # What an absent attribute means differs between the families.
    default = {"num_key_value_heads": heads} if family == "llama" else {}
    if family != "qwen3":
        default["head_dim"] = hidden // heads
    attention_bias = family != "mistral" and fields.flag("attention_bias")
    if attention_bias and family == "qwen2":
        fields.refuse("attention_bias", True, "qwen2 has biases of its own kind")
    windows = _windows(fields, family)
    config = LlamaConfig(
        family=family,
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.count("intermediate_size"),
        num_layers=len(windows),
        num_attention_heads=heads,
        num_key_value_heads=fields.count(
            "num_key_value_heads", default.get("num_key_value_heads"), null=heads
        ),
        head_dim=fields.count(
            "head_dim", default.get("head_dim"), null=hidden // heads
        ),
        max_position_embeddings=fields.count("max_position_embeddings"),
        rms_norm_eps=fields.positive("rms_norm_eps", 1e-6),
        rope=_rope(fields),
        windows=windows,
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=family == "qwen2" or attention_bias,
        output_bias=attention_bias,
        mlp_bias=family == "llama" and fields.flag("mlp_bias"),
        qk_norm=family == "qwen3",
    )
    fields.end()
    if heads % config.num_key_value_heads:
        fields.refuse(
            "num_key_value_heads",
            config.num_key_value_heads,
            f"needs to divide num_attention_heads, {heads}",
        )
    if config.head_dim % 2:
        fields.refuse("head_dim", config.head_dim, "needs to be even")
    return config


def _windows(fields: Fields, family: str) -> tuple[int | None, ...]:
    """The sliding window of each layer."""
    layers = fields.layers("num_hidden_layers")
    if family == "llama":
        return (None,) * layers
    if family == "mistral":
        if fields.take("sliding_window", 0) is None:
            return (None,) * layers
        return (fields.count("sliding_window"),) * layers
    used = fields.flag("use_sliding_window")
    first = fields.take("max_window_layers", 28)
    if isinstance(first, bool) or not isinstance(first, int):  # 0 slides them all
        fields.refuse("max_window_layers", first, "needs an integer")
    window = fields.take("sliding_window", 4096)
    types = fields.take("layer_types")
    if types is None:
        kinds = ("full_attention", "sliding_attention")
        types = [
            kinds[used and window is not None and i >= first] for i in range(layers)
        ]
    if not isinstance(types, list) or len(types) != layers:
        fields.refuse("layer_types", types, f"needs one for each of {layers} layers")
    windows: dict[str, int | None] = {"full_attention": None}
    if used and window is not None:
        windows["sliding_attention"] = fields.count("sliding_window")
    for kind in types:
        if kind not in list(windows):  # it may be anything, also what has no hash
            known = ", ".join(windows)
            fields.refuse("layer_types", kind, f"each needs to be {known}")
    return tuple(windows[kind] for kind in types)


def _rope(fields: Fields) -> Rope:
    """From `rope_parameters`, or from `rope_theta` and `rope_scaling` of old."""
    theta = fields.positive("rope_theta", 10000.0)
    length = fields.count("max_position_embeddings")
    given: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        given |= fields.nested(name)
    rope = Fields(given, fields.name, "rope_parameters.")
    kind = rope.choice("rope_type", _ROPE_FIELDS, rope.take("type", "default"))
    if rope.take("partial_rotary_factor", 1.0) != 1.0:
        rope.refuse(
            "partial_rotary_factor",
            given["partial_rotary_factor"],
            "only 1.0 is supported",
        )
    numbers = {field: rope.positive(field) for field in _ROPE_FIELDS[kind]}
    original = rope.count("original_max_position_embeddings", length)
    if kind != "llama3":
        original = Rope.original_length  # given or not, it has no effect
    made = Rope(
        theta=rope.positive("rope_theta", theta),
        scaling=kind,
        factor=numbers.get("factor", 1.0),
        low_frequency_factor=numbers.get("low_freq_factor", 1.0),
        high_frequency_factor=numbers.get("high_freq_factor", 4.0),
        original_length=original,
    )
    rope.end()
    if made.high_frequency_factor <= made.low_frequency_factor:
        rope.refuse(
            "high_freq_factor",
            made.high_frequency_factor,
            f"needs to be above low_freq_factor, {made.low_frequency_factor}",
        )
    return made
