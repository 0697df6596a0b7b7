"""Models that are put together of blocks of others.

    program = [(0, 0), (0, 1), (1, 1), (-1, 2)]  # blocks of maths, code and the base
    recipe = m3jax.programs.as_recipe(program)
    m3jax.merge("base", ["maths", "code"], "child", recipe)

`apply` makes the same model in memory.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from m3jax.checkpoints.errors import shown
from m3jax.checkpoints.formats import tree
from m3jax.methods.fields import Rules, Runs
from m3jax.methods.passthrough import Passthrough
from m3jax.recipe import Mixup, Piece, Recipe, Slice
from m3jax.search.pytrees import is_embedding, num_layers, place_of

BASE = -1  # the model of a block that is the base's

# What a block adds to the residual stream comes out of these.
_ADDING = r"\.(o_proj|down_proj|c_proj)\.(weight|bias)$"
# Blocks x + attention(norm(x)), then x + mlp(norm(x)), have these tensors and no other.
_PRE_NORM = re.compile(
    r"\.(self_attn\.([qkvo]_proj|[qk]_norm)|mlp\.(gate|up|down)_proj"
    r"|(input|post_attention)_layernorm|ln_[12]|attn\.c_(attn|proj)|mlp\.c_(fc|proj))"
    r"\.(weight|bias)|\.self_attn\.rotary_emb\.inv_freq|\.attn\.(masked_)?bias"
)


class Block(NamedTuple):
    """Block `layer` of a model, and what multiplies the hidden state after it."""

    model: int
    layer: int
    scale: float = 1.0


class Child(NamedTuple):
    """What a program makes.

    Attributes:
      params: nested dicts whose blocks are numbered from 0.
      scales: (blocks,), of the hidden state after each block, its residual included.
        They are no weights: the child's own code would have to apply them, from its
        config. `as_recipe` puts them into weights.
    """

    params: dict[str, Any]
    scales: list[float]


def apply(base: Any, models: Sequence[Any], program: Sequence[Sequence[Any]]) -> Child:
    """The model of the blocks that a program lists, in its order.

    Child block i is block layer_i of model_i, bit for bit. Embeddings are those of the
    first block's model, the head, the last norm and whatever else lies outside the
    blocks those of the last one's; of the base where the program is empty (ours).
    Agrees with `MergeUtils` of Guinan-Su/auto-merge-llm.

    Args:
      base: the pytree of model −1.
      models: K pytrees of nested dicts. The first number in a tensor's name is that of
        its block.
      program: (model, layer) or (model, layer, scale) each, as of
        `m3jax.search.dis_program` or of the blocks of `m3jax.search.rmm_step`.

    Raises:
      ValueError: there is no such model, it has no such block, or blocks of several
        stacks, such as an encoder and a decoder.
      CheckpointError: the names of the child's tensors do not fit each other.
    """
    blocks = [Block(*entry) for entry in program]
    flat = [tree.flatten(params)[0] for params in (*models, base)]  # base is [-1]
    for i, block in enumerate(blocks):
        if not BASE <= block.model < len(models):
            raise ValueError(
                f"program[{i}] names model {block.model}; there are {len(models)}, "
                "from 0, and the base, -1"
            )
        stacks = {p.before for p in map(place_of, flat[block.model]) if p is not None}
        if len(stacks) > 1:
            raise ValueError(
                f"model {block.model} has blocks in {sorted(stacks)}: give each stack, "
                "such as an encoder, a program of its own"
            )
        count = num_layers(flat[block.model])
        if not 0 <= block.layer < count:
            raise ValueError(
                f"program[{i}] names block {block.layer} of model {block.model}, which "
                f"has {count} blocks"
            )
    child: dict[str, Any] = {}
    first, last = (blocks[i].model if blocks else BASE for i in (0, -1))
    for model, embeddings in ((first, True), (last, False)):
        for name, leaf in flat[model].items():
            if place_of(name) is None and is_embedding(name) is embeddings:
                child[name] = leaf
    for i, block in enumerate(blocks):
        for name, leaf in flat[block.model].items():
            place = place_of(name)
            if place is not None and place.layer == block.layer:
                renumbered = f"{place.before}{i}{place.after}"
                assert renumbered not in child, shown(renumbered)
                child[renumbered] = leaf
    return Child(tree.nest(child), [float(block.scale) for block in blocks])


def as_recipe(program: Sequence[Sequence[Any]], like: Recipe | None = None) -> Recipe:
    """The recipe that merges base and models to what a program makes.

    `m3jax.merge` writes it as a checkpoint, whose config.json has the number of layers
    and the lists by layer; `merge_params` makes the pytree. Blocks and what lies
    outside them come from where `apply` has them.

    The scales go into the weights, so that the child is a plain model: with C the
    product of the scales before a block, what the block adds to the residual stream is
    divided by C, and rounded once. Every hidden state is then the scaled one over C,
    and its norm is the same but for ε, which counts 1/C² times as much for the scaled
    one; see `can_scale` for which blocks that holds. The last block's scale does
    nothing, for the same reason.

    Args:
      program: (model, layer) or (model, layer, scale) each, one or more.
      like: has the fields that are no step's; None: the defaults.

    Raises:
      ValueError: there is no block, or a scale is no finite number above 0.
    """
    blocks = [Block(*entry) for entry in program]
    if not blocks:
        raise ValueError("the program has no block; a model has one or more")
    shares, share = [], 1.0  # 1 / C of each block
    for i, block in enumerate(blocks):
        if not 0 < block.scale < math.inf:
            raise ValueError(
                f"program[{i}] has the scale {block.scale}; a finite number above 0 is "
                "needed"
            )
        shares.append(share)
        share /= block.scale
    runs = Runs(tuple((i + 1, own) for i, own in enumerate(shares)))
    scaled = any(own != 1.0 for own in shares)
    method = Passthrough(scale=Rules(((_ADDING, runs),), 1.0) if scaled else 1.0)
    slices = tuple(
        Slice((Piece(None if model == BASE else model, (first, stop)),))
        for model, first, stop, _ in _stretches(block[:2] for block in blocks)
    )
    return (like or Recipe()).with_fields(
        method=method,
        transforms=(),
        mixup=Mixup(alpha=None),
        rules=(),
        slices=slices,
    )


def of_recipe(recipe: Recipe) -> list[Block] | None:
    """The program of a recipe that `as_recipe` made; None of any other.

    Scales are those that the weights tell; the last is 1.
    """
    pieces = [own.models[0] for own in recipe.slices]
    if recipe.method.name != "passthrough" or not all(p.layers for p in pieces):
        return None
    places = [
        (BASE if piece.model is None else piece.model, layer)
        for piece in pieces
        for layer in range(*(piece.layers or ()))
    ]
    scale = recipe.method.scale
    shares = [1.0] * len(places)
    if isinstance(scale, Rules):
        shares = [own for _, own in scale.rules[0][1].runs]
    scales = [a / b for a, b in zip(shares, [*shares[1:], shares[-1]], strict=True)]
    return [Block(*own, s) for own, s in zip(places, scales, strict=True)] or None


def can_scale(names: Iterable[str]) -> bool:
    """Whether weights can scale hidden states: the blocks are those of a decoder that
    normalises what it reads, as Llama and GPT-2 do, judging by their tensors' names.
    """
    own = [place.after for place in map(place_of, names) if place is not None]
    adding = any(re.search(_ADDING, after) for after in own)
    return adding and all(map(_PRE_NORM.fullmatch, own))


def counted(program: Sequence[Block], models: Sequence[str]) -> str:
    """How many layers there are of each model: ``6 layers: 4 of maths, 2 of base``."""
    counts = Counter(block.model for block in program)
    names = [*models, "base"]
    each = (
        f"{counts[k]} of {names[k]}"
        for k in sorted(counts, key=lambda k: k % len(names))
    )
    plural = "" if len(program) == 1 else "s"
    return f"{len(program)} layer{plural}: {', '.join(each)}"


def described(program: Sequence[Block], models: Sequence[str]) -> str:
    """All of it: ``maths 0–3 ×0.9, code 4, base 5``."""
    names = [*models, "base"]
    parts = []
    for model, first, stop, scale in _stretches(program):
        layers = str(first) if stop == first + 1 else f"{first}–{stop - 1}"
        factor = "" if math.isclose(scale, 1.0) else f" ×{scale:.3g}"
        parts.append(f"{names[model]} {layers}{factor}")
    return ", ".join(parts)


def _stretches(
    blocks: Iterable[Sequence[Any]],
) -> list[tuple[int, int, int, float]]:
    """Consecutive layers of one model together: model, first, stop, the last scale."""
    found: list[tuple[int, int, int, float]] = []
    for model, layer, scale in (Block(*own) for own in blocks):
        if found and found[-1][::2] == (model, layer) and math.isclose(found[-1][3], 1):
            found[-1] = (model, found[-1][1], layer + 1, scale)
        else:
            found.append((model, layer, layer + 1, scale))
    return found
