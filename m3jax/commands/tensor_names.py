"""What a tensor's name says of it: its layer, its part of the model, its kind.

Only for showing checkpoints to people; no result depends on it. It knows the names
that transformers gives to the common architectures, and makes something readable of
any other.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from m3jax.engine.plan import natural_order

_FEW_NUMBERS = 6
PARTS = ("embeddings", "attention", "MLP", "norms", "other", "head")

# The field's words for modules, in the order of the computation, and their names; of
# several that end a tensor's name, the longest counts.
_MODULES = {
    "q": "q_proj query q_lin SelfAttention.q EncDecAttention.q",
    "k": "k_proj key k_lin SelfAttention.k EncDecAttention.k",
    "v": "v_proj value v_lin SelfAttention.v EncDecAttention.v",
    "qkv": "qkv_proj query_key_value c_attn",
    "o": "o_proj out_proj out_lin attn.c_proj attn.dense attention.dense "
    "self_attention.dense attention.output.dense crossattention.output.dense "
    "SelfAttention.o EncDecAttention.o",
    "router": "router gate",
    "gate": "gate_proj w1",
    "up": "up_proj w3 fc1 c_fc lin1 intermediate.dense dense_h_to_4h",
    "gate and up": "gate_up_proj",
    "down": "down_proj w2 fc2 lin2 mlp.c_proj output.dense dense_4h_to_h",
    "before attention": "input_layernorm pre_self_attn_layernorm ln_1 layer_norm1",
    "attention norm": "self_attn_layer_norm encoder_attn_layer_norm sa_layer_norm "
    "attention.output.LayerNorm crossattention.output.LayerNorm",
    "q norm": "q_norm",
    "k norm": "k_norm",
    "after attention": "post_attention_layernorm",
    "before MLP": "pre_feedforward_layernorm ln_2 layer_norm2",
    "after MLP": "post_feedforward_layernorm",
    "MLP norm": "final_layer_norm output.LayerNorm output_layer_norm",
    "embeddings": "embed_tokens wte",
    "positions": "wpe",
    "final norm": "norm ln_f",
    "head": "lm_head",
}
_KINDS = {name: kind for kind, names in _MODULES.items() for name in names.split()}
_ORDER = {kind: place for place, kind in enumerate(_MODULES)}
_OUTSIDE = {"final norm"}  # what a layer does not have, and what only a layer has
_INSIDE = {"MLP norm", "attention norm"}
_FURTHER = {  # of the same kind, beside it: what says so, and the word for it
    "cross": re.compile(r"encoder_attn|cross_?att|EncDecAttention"),
    "shared": re.compile(r"shared_expert"),
}
_PART_PATTERNS = (
    ("norms", re.compile(r"norm|(^|[._])ln(_|\d|\.|$)", re.IGNORECASE)),
    ("embeddings", re.compile(r"emb|(^|\.)(wte|wpe|conv\d|patch)")),
    ("attention", re.compile(r"attn|attention|(^|\.)[qkvo]_(proj|lin)", re.IGNORECASE)),
    (
        "MLP",
        re.compile(
            r"mlp|ffn|feed_forward|moe|experts?\b|intermediate|(^|\.)(fc\d|lin\d)"
            r"|(^|\.)output\.dense|DenseReluDense"
        ),
    ),
)
_HEAD = re.compile(
    r"^(output|score)\b|(^|\.)(lm_head|embed_out|classifier|cls|pooler|proj_out"
    r"|(text|visual)_projection)\b"
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
    def order(self) -> tuple[Any, ...]:
        """Sorts tensors as data flows: embeddings, layers, final norm, head."""
        section, *kind = self.kind_order[:5]
        return section, *self.kind_order[5:], self.layer or 0, *kind

    @property
    def kind_order(self) -> tuple[Any, ...]:
        """Sorts kinds of tensors as data flows, and each of them by stack."""
        part = PARTS.index(self.part)
        section = 1 if self.layer is not None else 0 if part == 0 else 2
        word, _, rest = self.kind.partition(" ")
        further, kind = (1, rest) if word in _FURTHER else (0, self.kind)
        known = _ORDER.get(kind.removesuffix(" bias"), len(_ORDER))
        stack = "decoder" in self.stack, self.stack
        return section, part, further, known, self.kind, *stack

    @property
    def label(self) -> str:
        """Part and kind: ``attention: q``."""
        return self.kind if self.kind == self.part else f"{self.part}: {self.kind}"


@functools.cache
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
    if layer is None and part != "norms" and _HEAD.search(own):
        part = "head"
    words = [word for word in module.split(".") if not word.isdecimal()]
    ends = (".".join(words[-count:]) for count in (3, 2, 1))
    kind = next((_KINDS[end] for end in ends if end in _KINDS), "")
    if not kind or kind in (_INSIDE if layer is None else _OUTSIDE):
        kind = ".".join(words[-2:]) or last
    further = next((w for w, pattern in _FURTHER.items() if pattern.search(own)), None)
    kind = f"{further} {kind}" if further else kind
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
