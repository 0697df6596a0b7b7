"""What may be permuted in a decoder without changing what it computes.

- ``ffn``: the units of a feed-forward layer, between its matrices.
- ``heads``: heads of keys and values, each with its group of heads of queries; and
  heads of queries within their group. The channels of a head stay in their order, since
  rotary positions turn each pair of them by an angle of its own.
- ``residual``: the entries of the residual stream, everywhere at once. Norms look at
  all of them alike, and their weights go along.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from m3jax.align.axes import Axis, Layout, Units
from m3jax.models.config import Config
from m3jax.models.decoder import parameter_shapes

_R = "residual"
GROUPS = ("ffn", "heads", _R)
_PART_OF = {"queries": "heads", "keys": "heads", "ffn": "ffn", _R: _R}

_Table = dict[str, tuple[Axis, ...]]
_LLAMA: _Table = {
    r"model\.embed_tokens\.weight|lm_head\.weight": (None, _R),
    r"model\.norm\.weight|.*layernorm\.weight": (_R,),
    r".*\.q_proj\.weight": ("queries", _R),
    r".*\.q_proj\.bias": ("queries",),
    r".*\.[kv]_proj\.weight": ("keys", _R),
    r".*\.[kv]_proj\.bias": ("keys",),
    r".*\.o_proj\.weight": (_R, "queries"),
    r".*\.(gate|up)_proj\.weight": ("ffn", _R),
    r".*\.(gate|up)_proj\.bias": ("ffn",),
    r".*\.down_proj\.weight": (_R, "ffn"),
    r".*\.(o|down)_proj\.bias": (_R,),
    r".*\.[qk]_norm\.weight": (None,),  # of channels, the same for every head
}
# Matrices are (in, out); one holds queries, keys and values.
_GPT2: _Table = {
    r"(.*\.)?w[tp]e\.weight|lm_head\.weight": (None, _R),
    r"(.*\.)?ln_(1|2|f)\.(weight|bias)": (_R,),
    r".*\.c_attn\.weight": (_R, ("keys", 3)),
    r".*\.c_attn\.bias": (("keys", 3),),
    r".*\.attn\.c_proj\.weight": ("keys", _R),
    r".*\.c_fc\.weight": (_R, "ffn"),
    r".*\.c_fc\.bias": ("ffn",),
    r".*\.mlp\.c_proj\.weight": ("ffn", _R),
    r".*\.c_proj\.bias": (_R,),
}
_TABLES = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA) | {
    "gpt2": _GPT2
}
_LAYER = re.compile(r"(?:.*\.)?(?:layers|h)\.\d+\.")


def layout(
    config: Config,
    groups: Sequence[str] = ("ffn", "heads"),
    *,
    names: Iterable[str] | None = None,
) -> Layout:
    """The axes of a decoder, for `weight_matching`.

    Args:
      config: of the model.
      groups: of ``ffn``, ``heads`` and ``residual``, what may be permuted.
      names: of its leaves; None: those that follow from the config.

    Returns:
      Axes and units. Without ``residual`` leaves that nothing is permuted in are left
      out, and the groups of one layer do not depend on each other or on other layers.

    Raises:
      ValueError: a group is none of these.
    """
    for own in groups:
        if own not in GROUPS:
            raise ValueError(f"groups: {own!r} needs one of {', '.join(GROUPS)}")
    axes: dict[str, tuple[Axis, ...]] = {}
    units: dict[str, Units] = {}

    def named(layer: str, axis: Axis) -> Axis:
        kind, copies = axis if isinstance(axis, tuple) else (axis, 1)
        if kind is None or _PART_OF[kind] not in groups:
            return None
        group = kind if kind == _R else f"{layer}{kind}"
        if kind == "keys":
            units[group] = Units(config.head_dim)
        elif kind == "queries":
            units[group] = Units(config.head_dim, within=f"{layer}keys")
        return group if copies == 1 else (group, copies)

    for name in parameter_shapes(config) if names is None else names:
        for pattern, of_name in _TABLES[config.family].items():
            if re.fullmatch(pattern, name):
                found = _LAYER.match(name)
                layer = found.group() if found else ""
                made = tuple(named(layer, axis) for axis in of_name)
                if any(axis is not None for axis in made):
                    axes[name] = made
                break
    return Layout(axes, units)


def by_layer(found: Layout) -> list[Layout]:
    """The parts of a layout that do not depend on each other."""
    if any(_R in own for own in found.axes.values()):
        return [found]
    layers: dict[str, dict[str, tuple[Axis, ...]]] = {}
    for name, own in found.axes.items():
        layer = _LAYER.match(name)
        assert layer is not None
        layers.setdefault(layer.group(), {})[name] = own
    return [Layout(axes, found.units) for axes in layers.values()]


def part_of(group: str) -> str:
    """Which of GROUPS a group of a layout is of."""
    return _PART_OF[group.rpartition(".")[2]]
