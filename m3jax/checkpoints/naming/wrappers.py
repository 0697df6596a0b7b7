"""Prefixes of what a model was wrapped in when it was saved."""

from __future__ import annotations

import re
from collections.abc import Mapping

from m3jax.checkpoints.naming.table import Table, counted, renamed
from m3jax.checkpoints.source import Source

# Anywhere in a name: torch.compile's, and those of FSDP and activation checkpoints.
_ANYWHERE = re.compile(
    r"(?:^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# Before all names: PEFT's, and DataParallel's and DeepSpeed's.
_LEADING = ("base_model.model.", "module.")


def unwrap(table: Mapping[str, Source]) -> tuple[Table, str]:
    """Takes wrappers' prefixes off.

    ``module.`` and ``base_model.model.`` go where every name has them, so that no
    module of a model's own is renamed.

    Returns:
      The table, and what was done; "" if nothing was.
    """
    whole, taken = dict(table), []
    inside = [name for name in table if _ANYWHERE.search(name)]
    if inside:
        made = renamed(whole, lambda name: _ANYWHERE.sub("", name))
        if made is not None:
            whole = made
            taken += sorted({found for n in inside for found in _ANYWHERE.findall(n)})
    while whole and not any(".lora_" in name for name in whole):
        prefix = next((p for p in _LEADING if all(n.startswith(p) for n in whole)), "")
        if not prefix:
            break
        whole = {name.removeprefix(prefix): own for name, own in whole.items()}
        taken.append(prefix)
    if not taken:
        return dict(table), ""
    words = ", ".join(prefix.rstrip(".") + "." for prefix in taken)
    names = inside or list(table)
    return whole, f"{words} is left off the names of {counted(sorted(names))}"
