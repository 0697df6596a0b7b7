"""A tokenizer of single characters, as an object and as files of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

SPECIAL = ("<s>", "</s>", "<unk>")
ALPHABET = "\n abcdefghijklmnopqrstuvwxyz0123456789.,:;?!+-*/=()[]'\"_#$"
VOCABULARY = [*SPECIAL, *ALPHABET]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class Characters:
    """Implements `m3jax.evaluation.tokenizer.Tokenizer`; token 0 begins a text."""

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
    added = [
        {
            "id": i,
            "content": token,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for i, token in enumerate(SPECIAL)
    ]
    begin = {"id": "<s>", "type_id": 0}
    fields = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": r"[\s\S]"},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": begin},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
