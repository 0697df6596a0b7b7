"""A tokenizer of single characters, as an object and as files of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import WordLevel

SPECIAL = ("<s>", "</s>", "<unk>")
ALPHABET = "\n abcdefghijklmnopqrstuvwxyz0123456789.,:;?!+-*/=()[]'\"_#$"
VOCABULARY = [*SPECIAL, *ALPHABET]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class Characters:
    """Does what `m3jax.models.tokenizer.Tokenizer` does; token 0 begins a text."""

    stop_tokens = (1,)
    first_token = 0

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        tokens = [VOCABULARY.index(c) if c in ALPHABET else 2 for c in text]
        return [0, *tokens] if add_special_tokens else tokens

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(VOCABULARY[token] for token in tokens if token >= len(SPECIAL))

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        lines = [f"{m['role']}: {m['content']}\n" for m in messages]
        return "".join(lines) + "assistant:"


def write(folder: Path) -> None:
    """The same tokenizer as tokenizer.json, for transformers."""
    vocabulary = {token: i for i, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
