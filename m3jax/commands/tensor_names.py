"""What a tensor's name says of it: its layer, its part of the model, its kind.

Only for showing checkpoints to people; no result depends on it. It knows the names
that transformers gives to the common architectures, and makes something readable of
any other.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Hashable, Iterable

from m3jax.engine.plan import natural_order

_FEW_NUMBERS = 6
PARTS = ("embeddings", "attention", "MLP", "norms", "other", "head")

# Names of modules, and the field's words for them, in the order of the computation.
_KINDS = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "qkv_proj": "qkv",
    "query_key_value": "qkv",
    "c_attn": "qkv",
    "o_proj": "o",
    "out_proj": "o",
    "router": "router",
    "gate": "router",
    "gate_proj": "gate",
    "w1": "gate",
    "up_proj": "up",
    "w3": "up",
    "gate_up_proj": "gate and up",
    "fc1": "up",
    "c_fc": "up",
    "down_proj": "down",
    "w2": "down",
    "fc2": "down",
    "input_layernorm": "before attention",
    "pre_self_attn_layernorm": "before attention",
    "ln_1": "before attention",
    "q_norm": "q norm",
    "k_norm": "k norm",
    "post_attention_layernorm": "after attention",
    "pre_feedforward_layernorm": "before MLP",
    "ln_2": "before MLP",
    "post_feedforward_layernorm": "after MLP",
    "embed_tokens": "embeddings",
    "wte": "embeddings",
    "wpe": "positions",
    "norm": "final norm",
    "ln_f": "final norm",
    "lm_head": "head",
}
_ORDER = {kind: place for place, kind in enumerate(dict.fromkeys(_KINDS.values()))}
_PART_PATTERNS = (
    ("norms", re.compile(r"norm|(^|[._])ln(_|\d|\.|$)")),
    ("head", re.compile(r"^(lm_head|embed_out|output|score)\b")),
    ("embeddings", re.compile(r"emb|(^|\.)wte|(^|\.)wpe")),
    ("attention", re.compile(r"attn|attention|(^|\.)[qkvo]_proj")),
    ("MLP", re.compile(r"mlp|ffn|feed_forward|experts?\b|\bmoe\b|(^|\.)fc\d")),
)


@dataclasses.dataclass(frozen=True)
class TensorName:
    """What a name says.

    Attributes:
      stack: what holds the numbered layers ("model.layers"); "" outside of them.
      layer: its number; None outside the layers.
      part: one of PARTS.
      kind: what the tensor is within its layer ("q", "down", "q bias").
    """

    stack: str
    layer: int | None
    part: str
    kind: str

    @property
    def order(self) -> tuple[int, str, int, int, int, str]:
        """Sorts tensors as data flows: embeddings, layers, final norm, head."""
        part = PARTS.index(self.part)
        section = 1 if self.layer is not None else 0 if part == 0 else 2
        known = _ORDER.get(self.kind.removesuffix(" bias"), len(_ORDER))
        return section, self.stack, self.layer or 0, part, known, self.kind


def describe(name: str) -> TensorName:
    """Takes a tensor's name apart."""
    numbered = re.match(r"(.*?)\.?(?<![^.])(\d{1,9})\.(.+)", name)
    stack, layer, own = "", None, name
    if numbered:
        stack, layer, own = numbered[1], int(numbered[2]), numbered[3]
    module, _, last = own.rpartition(".")
    if last not in ("weight", "bias"):
        module, last = own, "weight"
    part = next((p for p, pattern in _PART_PATTERNS if pattern.search(own)), "other")
    words = [word for word in module.split(".") if not word.isdecimal()]
    kind = _KINDS.get(words[-1] if words else "", "")
    if not kind or (kind == "final norm" and layer is not None):
        kind = ".".join(words[-2:]) or last
    return TensorName(stack, layer, part, f"{kind} bias" if last == "bias" else kind)


def in_order(names: Iterable[str]) -> list[str]:
    """Names in the order of `TensorName.order`, and by name where that is equal."""
    return sorted(names, key=lambda name: (describe(name).order, natural_order(name)))


def fold(names: Iterable[str]) -> str:
    """One name for several that differ in numbers: ``layers.0–21.mlp.weight``.

    A position that takes every number from the first to the last is shown as a range,
    one that takes a few as a list, any other as ``*``.
    """
    words = [name.split(".") for name in names]
    folded = []
    for column in zip(*words, strict=True):
        values = sorted({int(word) for word in column if word.isdecimal()})
        if not values or len(set(column)) == 1:
            folded.append(column[0])
        elif values[-1] - values[0] == len(values) - 1:
            folded.append(f"{values[0]}–{values[-1]}")
        elif len(values) <= _FEW_NUMBERS:
            folded.append(",".join(map(str, values)))
        else:
            folded.append("*")
    return ".".join(folded)


def alike(
    names: Iterable[str], facts: Callable[[str], Hashable]
) -> list[tuple[str, list[str]]]:
    """Puts names together that differ in numbers alone and agree in their facts.

    Returns:
      Folded name and names of each group, in the order of the computation.
    """
    groups: dict[Hashable, list[str]] = {}
    for name in in_order(names):
        words = ["*" if word.isdecimal() else word for word in name.split(".")]
        groups.setdefault((".".join(words), facts(name)), []).append(name)
    return [(fold(group), group) for group in groups.values()]
