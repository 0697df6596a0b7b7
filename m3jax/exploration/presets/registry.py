"""The presets by name, and which options of `explore` each leaves to the user."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from m3jax.exploration.presets.setting import Plan, Setting
from m3jax.recipe import RecipeError


class Preset(NamedTuple):
    """What a preset takes beside recipe, draws, seed, weights and budget.

    Attributes:
      options: names of `explore`'s options.
      samplers: that may be asked for.
    """

    options: tuple[str, ...] = ()
    samplers: tuple[str, ...] = ()


# Each is a module of this folder, with a function `plan`.
PRESETS = {
    "m3": Preset(("halving", "hyperband", "selector")),
    "greedy_soup": Preset(),
    "model_glue": Preset(("groups",)),
    "safety_aware": Preset(),
    "lfs": Preset(("groups", "hyperband", "generation"), ("tpe", "random")),
    "dis": Preset(("hyperband", "generation"), ("tpe", "random")),
    "rmm": Preset(("fraction",), ("random",)),
    "adamms": Preset(),
    "df_merge": Preset(("generation",), ("gp", "tpe")),
}


def check(name: str, sampler: str | None, options: dict[str, Any]) -> None:
    """Refuses what a preset has no place for.

    Args:
      options: that were given, by name; None where one was not.

    Raises:
      RecipeError: there is no such preset, or it does not take an option.
    """
    if name not in PRESETS:
        raise RecipeError(f"preset={name!r} needs one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    if sampler is not None and sampler not in preset.samplers:
        allowed = f"takes {' or '.join(preset.samplers)}" if preset.samplers else "none"
        raise RecipeError(
            f"preset={name!r} is a search of its own; sampler={sampler!r} does not go "
            f"with it ({allowed})"
        )
    for option, value in options.items():
        if value is not None and option not in preset.options:
            takes = ", ".join(preset.options) or "none of these options"
            raise RecipeError(
                f"preset={name!r} takes no {option}={value!r}; it takes {takes}"
            )


def plan(setting: Setting) -> Plan:
    """What the preset of this name does.

    Raises:
      RecipeError: it does not fit the recipe, the models or the tasks.
    """
    module = importlib.import_module(f"m3jax.exploration.presets.{setting.name}")
    found: Plan = module.plan(setting)
    return found
