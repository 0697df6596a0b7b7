"""What a decoder is, and what config.json says of one.

Every attribute is read, or known not to change what the model computes, or refused by
name: an attribute that is passed over in silence is a wrong result.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn, Self

import jax

from m3jax.checkpoints.errors import CheckpointError, shown

# They are about training, generation, saving or other libraries.
_WITHOUT_EFFECT = """
    _attn_implementation_autoset _commit_hash _name_or_path add_cross_attention
    architectures attention_dropout auto_map bad_words_ids begin_suppress_tokens
    bos_token_id chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing
    id2label initializer_range is_decoder is_llama_config label2id length_penalty
    max_length max_sequence_length min_length no_repeat_ngram_size num_beam_groups
    num_beams num_return_sequences output_attentions output_hidden_states output_past
    output_scores pad_token_id prefix pretraining_tp problem_type pruned_heads
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config
    transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache
"""
_MAX_LAYERS = 10_000  # the deepest models have some hundred


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What every decoder has; hashable, a static argument of jit.

    Attributes:
      family: the ``model_type``.
      vocab_size: rows of the embedding.
      hidden_size: width of the residual stream.
      num_layers: how many.
      num_attention_heads, num_key_value_heads: heads of the queries, and those of keys
        and values, each of which serves an equal group of the former.
      head_dim: channels of a head.
      max_position_embeddings: tokens that the model was made for.
      tie_word_embeddings: the head is the embedding where there is no ``lm_head``.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    tie_word_embeddings: bool = False

    def of_layers(self, layers: Sequence[int]) -> Self:
        """That of a model whose layers are these of this one's, in this order."""
        return dataclasses.replace(self, num_layers=len(layers))


class Fields:
    """The attributes of a JSON object, and which of them have been read.

    Attributes:
      name: of the file, for errors.
    """

    def __init__(self, values: Mapping[str, Any], name: str, prefix: str = ""):
        """Takes an object; `prefix` stands before its attributes in errors."""
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

    def layers(self, attribute: str) -> int:
        """A number of layers, which is bounded: it says how much is to be built."""
        layers = self.count(attribute)
        if layers > _MAX_LAYERS:
            self.refuse(attribute, layers, f"at most {_MAX_LAYERS} are read")
        return layers

    def positive(self, attribute: str, default: float | None = None) -> float:
        value = self.take(attribute, default)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            self.refuse(attribute, value, "needs a positive number")
        return float(value)

    def choice(
        self, attribute: str, known: Iterable[str], default: str | None = None
    ) -> str:
        """One of the known words."""
        value, words = self.take(attribute, default), list(known)
        if value not in words:
            self.refuse(attribute, value, f"supported: {', '.join(words)}")
        return value

    def nested(self, attribute: str) -> dict[str, Any]:
        """The fields of an object; {} where it is absent or null."""
        value = self.take(attribute)
        if value is not None and not isinstance(value, dict):
            self.refuse(attribute, value, "needs an object")
        return value or {}

    def flag(self, attribute: str, default: bool = False) -> bool:
        value = self.take(attribute, default)
        if not isinstance(value, bool):
            self.refuse(attribute, value, "needs true or false")
        return value

    def fixed(self, values: Mapping[str, Any]) -> None:
        """Refuses attributes that are there and have other values than these."""
        for attribute, value in values.items():
            found = self.take(attribute, value)
            if found != value:
                self.refuse(attribute, found, f"only {value!r} is supported")

    def end(self, without_effect: str = "") -> None:
        """Refuses what has not been read, unless it says nothing.

        Args:
          without_effect: names of more attributes that do not, with space between.
        """
        known = {*self._read, *_WITHOUT_EFFECT.split(), *without_effect.split()}
        for attribute, value in self._values.items():
            if attribute not in known and value is not None:
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


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A decoder, as pure functions of a checkpoint's own pytree.

    Attributes:
      read_config: (fields of config.json, model_type) -> its `Config`; refuses what it
        does not know.
      parameter_shapes: config -> shape of every tensor but ``lm_head.weight``, by name.
      embedding: parameters -> (V, H).
      hidden_states: (parameters, tokens, positions, cache, config, dtype) -> normalised
        hidden states and the cache with these tokens; see `decoder.hidden_states`.
      buffers: names of tensors that some checkpoints carry and that follow from the
        config.
      prefix: that some checkpoints leave out of all names.
    """

    read_config: Callable[[Fields, str], Config]
    parameter_shapes: Callable[[Any], dict[str, tuple[int, ...]]]
    embedding: Callable[[Any], jax.Array]
    hidden_states: Callable[..., Any]
    buffers: re.Pattern[str]
    prefix: str = ""
