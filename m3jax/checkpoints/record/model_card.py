"""The model card of a merged checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from m3jax.checkpoints.folder import Checkpoint

_FEW_GROUPS = 80  # ratios of more groups than this are left to m3jax.json


def render(
    recipe: Mapping[str, Any],
    seed: int,
    ratios: Mapping[str, tuple[float, ...]] | None,
    base: Checkpoint | None,
    models: Sequence[Checkpoint],
) -> str:
    """The card: what was merged, how, with which ratios, and how to make it again."""
    checkpoints = [*([base] if base else []), *models]
    on_hub = [c.name.partition("@")[0] for c in checkpoints if c.revision]
    front = ["---", "library_name: transformers", "tags:", "- merge", "- m3jax"]
    if on_hub:
        front += ["base_model:", *[f"- {name}" for name in dict.fromkeys(on_hub)]]
    lines = [
        *front,
        "---",
        "",
        f"# Merge of {len(models)} models by {recipe['method']}",
        "",
    ]
    lines += [
        "Made with m3jax (Mixup Model Merge, arXiv 2502.15434). `m3jax.json` holds the "
        "complete record and a checksum of every tensor; `m3jax verify` checks it.",
        "",
        "| role | checkpoint | revision |",
        "|---|---|---|",
    ]
    if base:
        lines.append(f"| base | `{base.name}` | {base.revision or '—'} |")
    for i, model in enumerate(models, start=1):
        lines.append(f"| model {i} | `{model.name}` | {model.revision or '—'} |")
    lines += ["", "## Ratios", ""]
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


def _ratios(
    mixup: Mapping[str, Any], ratios: Mapping[str, tuple[float, ...]] | None
) -> list[str]:
    if ratios is None:
        return ["M3 is off: the models have equal weight."]
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
