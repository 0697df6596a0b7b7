"""What config.json says of a model of the Llama family.

Every attribute is read, or known not to change what the model computes, or refused by
name: an attribute that is passed over in silence is a wrong result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.models.rope import Rope

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

# They are about training, generation, saving or other libraries.
_WITHOUT_EFFECT = """
    _attn_implementation_autoset _commit_hash _name_or_path add_cross_attention
    architectures attention_dropout auto_map bad_words_ids begin_suppress_tokens
    bos_token_id chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id id2label initializer_range
    is_decoder is_llama_config label2id length_penalty max_length max_sequence_length
    min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_scores pad_token_id prefix
    pretraining_tp problem_type pruned_heads remove_invalid_values repetition_penalty
    return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p
    torch_dtype torchscript transformers.js_config transformers_version typical_p
    unsloth_fixed unsloth_version use_bfloat16 use_cache
"""
# Read in the forms of all releases of transformers; any other value is another model.
_FIXED = {
    "hidden_act": "silu",
    "is_encoder_decoder": False,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "tie_encoder_decoder": False,
}
_MAX_LAYERS = 10_000  # the deepest models have some hundred
_ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of a decoder and its constants; hashable, a static argument of jit.

    Attributes:
      family: ``llama``, ``mistral``, ``qwen2`` or ``qwen3``.
      vocab_size: rows of the embedding.
      hidden_size: width of the residual stream.
      intermediate_size: width of the feed-forward layers.
      num_attention_heads, num_key_value_heads: heads of the queries, and those of keys
        and values, each of which serves an equal group of the former.
      head_dim: channels of a head.
      max_position_embeddings: tokens that the model was made for.
      rms_norm_eps: added to the mean square.
      rope: rotary position embeddings.
      windows: for each layer, how many tokens it sees, its own included; None: all.
      tie_word_embeddings: the head is the embedding where there is no ``lm_head``.
      qkv_bias, output_bias, mlp_bias: which linear layers have one.
      qk_norm: queries and keys are normalised, head by head.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope
    windows: tuple[int | None, ...]
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @property
    def num_layers(self) -> int:
        return len(self.windows)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], name: str = "config.json") -> Config:
        """Reads the content of a config.json.

        Args:
          config: the content.
          name: of the file, for errors.

        Raises:
          CheckpointError: an attribute is missing, wrong or unknown; it is named.
        """
        fields = _Fields(config, name)
        family = fields.take("model_type")
        if family not in FAMILIES:
            fields.refuse("model_type", family, f"is needed as {_one_of(FAMILIES)}")
        for attribute, value in _FIXED.items():
            found = fields.take(attribute, value)
            if found != value:
                fields.refuse(attribute, found, f"only {value!r} is supported")
        heads = fields.count("num_attention_heads")
        hidden = fields.count("hidden_size")
        # What an absent attribute means differs between the families.
        default = {"num_key_value_heads": heads} if family == "llama" else {}
        if family != "qwen3":
            default["head_dim"] = hidden // heads
        attention_bias = family != "mistral" and fields.flag("attention_bias")
        if attention_bias and family == "qwen2":
            fields.refuse("attention_bias", True, "qwen2 has biases of its own kind")
        made = cls(
            family=family,
            vocab_size=fields.count("vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.count("intermediate_size"),
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
            windows=_windows(fields, family),
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            qkv_bias=family == "qwen2" or attention_bias,
            output_bias=attention_bias,
            mlp_bias=family == "llama" and fields.flag("mlp_bias"),
            qk_norm=family == "qwen3",
        )
        fields.end()
        if heads % made.num_key_value_heads:
            fields.refuse(
                "num_key_value_heads",
                made.num_key_value_heads,
                f"needs to divide num_attention_heads, {heads}",
            )
        if made.head_dim % 2:
            fields.refuse("head_dim", made.head_dim, "needs to be even")
        return made


def _windows(fields: _Fields, family: str) -> tuple[int | None, ...]:
    """The sliding window of each layer."""
    layers = fields.count("num_hidden_layers")
    if layers > _MAX_LAYERS:
        fields.refuse("num_hidden_layers", layers, f"at most {_MAX_LAYERS} are read")
    if family == "llama":
        return (None,) * layers
    if family == "mistral":
        if fields.take("sliding_window", 0) is None:
            return (None,) * layers
        return (fields.count("sliding_window"),) * layers
    used = fields.flag("use_sliding_window")
    first = fields.take("max_window_layers", 28)
    window = fields.take("sliding_window", 4096)
    types = fields.take("layer_types")
    if types is None:
        kinds = ("full_attention", "sliding_attention")
        types = [
            kinds[used and window is not None and i >= first] for i in range(layers)
        ]
    if len(types) != layers:
        fields.refuse("layer_types", types, f"needs one for each of {layers} layers")
    windows: dict[str, int | None] = {"full_attention": None}
    if used and window is not None:
        windows["sliding_attention"] = fields.count("sliding_window")
    for kind in types:
        if kind not in windows:
            fields.refuse("layer_types", kind, f"each needs to be {_one_of(windows)}")
    return tuple(windows[kind] for kind in types)


def _rope(fields: _Fields) -> Rope:
    """From `rope_parameters`, or from `rope_theta` and `rope_scaling` of old."""
    theta = fields.positive("rope_theta", 10000.0)
    length = fields.count("max_position_embeddings")
    given: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        given |= fields.take(name) or {}
    rope = _Fields(given, fields.name, "rope_parameters.")
    kind = rope.take("rope_type", rope.take("type", "default"))
    rope.take("type")
    if kind not in _ROPE_FIELDS:
        rope.refuse("rope_type", kind, f"supported: {_one_of(_ROPE_FIELDS)}")
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


class _Fields:
    """The attributes of a JSON object, and which of them have been read."""

    def __init__(self, values: Mapping[str, Any], name: str, prefix: str = "") -> None:
        self.name = name
        self._values, self._prefix, self._read = values, prefix, set[str]()

    def take(self, attribute: str, default: Any = None) -> Any:
        self._read.add(attribute)
        return self._values.get(attribute, default)

    def count(
        self, attribute: str, default: int | None = None, *, null: int | None = None
    ) -> int:
        """A positive integer; `default` where it is absent, `null` where it is null."""
        value = self.take(attribute, default)
        value = null if value is None and attribute in self._values else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.refuse(attribute, value, "needs a positive integer")
        return value

    def positive(self, attribute: str, default: float | None = None) -> float:
        value = self.take(attribute, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            self.refuse(attribute, value, "needs a positive number")
        return float(value)

    def flag(self, attribute: str) -> bool:
        value = self.take(attribute, False)
        if not isinstance(value, bool):
            self.refuse(attribute, value, "needs true or false")
        return value

    def end(self) -> None:
        """Refuses what has not been read, unless it says nothing."""
        for attribute, value in self._values.items():
            known = attribute in self._read or attribute in _WITHOUT_EFFECT.split()
            if not known and value is not None:
                self.refuse(
                    attribute,
                    value,
                    "unknown, and it may change what the model computes; if it does "
                    "not, take it out of the file",
                )

    def refuse(self, attribute: str, value: object, why: str) -> NoReturn:
        raise CheckpointError(
            f"{self.name}: {self._prefix}{shown(attribute)[1:-1]} = {shown(value)}: "
            f"{why}"
        )


def _one_of(names: Iterable[str]) -> str:
    return ", ".join(names)
