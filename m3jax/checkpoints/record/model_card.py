"""The model card of a merged checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from m3jax.checkpoints.folder import Checkpoint
from m3jax.checkpoints.places import hub
from m3jax.checkpoints.record import card_head

_FEW_GROUPS = 80  # ratios of more groups than this are left to m3jax.json


def render(
    recipe: Mapping[str, Any],
    seed: int,
    ratios: Mapping[str, tuple[float, ...]] | None,
    base: Checkpoint | None,
    models: Sequence[Checkpoint],
) -> str:
    """The card: what was merged, how, with which ratios, and how to make it again."""
    checkpoints = {
        **({"base": base} if base else {}),
        **{f"model {i}": model for i, model in enumerate(models, start=1)},
    }
    parents = card_head.parents_of([*checkpoints.values()])
    lines = [
        "---",
        *card_head.head(recipe, parents),
        "---",
        "",
        f"# Merge of {len(models)} models by {recipe['method']}",
        "",
        "Made with m3jax (Mixup Model Merge, arXiv 2502.15434). `m3jax.json` holds the "
        "complete record and a checksum of every tensor; `m3jax verify` checks it.",
        "",
        "| role | checkpoint | revision | licence |",
        "|---|---|---|---|",
    ]
    for role, own in checkpoints.items():
        licences = card_head.parents_of([own]).values()
        shown = ", ".join(dict.fromkeys(str(one or "—") for one in licences))
        lines.append(f"| {role} | `{own.name}` | {own.revision or '—'} | {shown} |")
    lines += ["", *_about(parents)]
    lines += ["## Ratios", ""]
    lines += _ratios(recipe["mixup"], ratios)
    lines += [
        "",
        "## Recipe",
        "",
        f"Seed {seed}.",
        "",
        "```json",
        json.dumps(recipe, indent=2),
        "```",
        "",
        "To make the same bytes again, from where the paths above lead:",
        "",
        "```sh",
        "m3jax merge --config=THIS_FOLDER/m3jax.json --output=again",
        "```",
        "",
    ]
    return "\n".join(lines)


def _about(parents: Mapping[str, card_head.Licence | None]) -> list[str]:
    """What the head cannot say of the checkpoints, a paragraph each."""
    local = [f"`{name}`" for name in parents if not hub.repository(name)]
    lines = []
    if local:
        lines.append(
            f"Folders of the machine that merged them: {', '.join(local)}; the head of "
            "this card names no base model that is not on the hub."
        )
    if (common := card_head.agreed(parents)) is None:
        lines.append("No model card of theirs states a licence.")
    elif len({*parents.values()}) > 1:
        lines.append(
            "Their model cards state different licences, or none: whoever passes this "
            "merge on has to keep to all of them."
        )
    else:
        lines.append(f"All of them state the licence {common}.")
    return [own for line in lines for own in (line, "")]


def _ratios(
    mixup: Mapping[str, Any], ratios: Mapping[str, tuple[float, ...]] | None
) -> list[str]:
    if ratios is None:
        return ["M3 is off: no ratios were drawn."]
    if mixup["ratios"] is not None:
        how = "Given by hand"
    else:
        how = f"Drawn: α = {mixup['alpha']}, one draw per {mixup['granularity']}"
    if len(ratios) > _FEW_GROUPS:
        return [f"{how}; {len(ratios)} draws, see `m3jax.json`."]
    num_models = len(next(iter(ratios.values())))
    columns = " | ".join(f"model {i}" for i in range(1, num_models + 1))
    return [
        f"{how}.",
        "",
        f"| tensors | {columns} |",
        "|---|" + "---|" * num_models,
        *[
            f"| {group or 'all'} | {' | '.join(f'{ratio:.9g}' for ratio in values)} |"
            for group, values in ratios.items()
        ],
    ]
