"""DIS of "Fine, I'll Merge It Myself", arXiv 2502.04030: which layers, and how strong.

For each layer of the models: which of them give their layer, in which order, and what
then multiplies the hidden state; none takes the base's. The genotype is that of
`m3jax.search.dis_program`. The K single models come first, then those that TPE or
random points suggest, with `hyperband` under Hyperband. More than 50 layers are not
evaluated, and count as the worst.

Ours: scales from 0.5 to 1.5, which stand in the weights (`m3jax.programs.as_recipe`),
and are left out where the tensors' names do not tell that they can; TPE in the place of
SMAC's random forest. The paper's budget is 500.
"""

from __future__ import annotations

import dataclasses
import math

from m3jax import programs
from m3jax.exploration.fields import Searched
from m3jax.exploration.groups import Group
from m3jax.exploration.presets.genotypes import searched
from m3jax.exploration.presets.setting import Plan, Setting
from m3jax.exploration.search import samplers
from m3jax.exploration.search.trials import Proposal
from m3jax.exploration.space import Dimension, Space, Values
from m3jax.recipe import RecipeError
from m3jax.search import dis_program

MOST = 50  # layers
_LOW, _HIGH = 0.5, 1.5
_SCALED = (
    "scales of hidden states go into the weights behind them: the children are plain "
    "models, equal to scaled ones but for the epsilon of the norms"
)
_UNSCALED = (
    "hidden states are not scaled: the names of the tensors do not tell that weights "
    "could do it; layers are chosen and ordered alone"
)


@dataclasses.dataclass(frozen=True)
class Genotypes(samplers.Draws):
    """Draws that are programs of layers."""

    def with_values(self, index: int, values: Values) -> Proposal | None:
        assert self.space is not None
        names = [group.name for group in self.space.groups]
        program = dis_program(
            [values[f"{name}:selected"] for name in names],
            [values[f"{name}:order"][0] for name in names],
            [values.get(f"{name}:scale", (1.0,))[0] for name in names],
        )
        if len(program) > MOST:
            return None
        recipe = programs.as_recipe(program, self.recipe)
        return self.proposal(index, recipe, new_seed=False)


def plan(setting: Setting) -> Plan:
    """`draws` trials, or those of Hyperband, less those of too many layers."""
    layers = setting.check_programs(MOST)
    if not setting.has_base:
        raise RecipeError(f"preset={setting.name!r} needs a base")
    count = setting.num_models
    fields = {
        "selected": Searched("selected", width=count, options=(0, 1)),
        "order": Searched("order", options=tuple(range(math.factorial(count)))),
    }
    scaled = programs.can_scale(setting.tensors)
    if scaled:
        fields["scale"] = Searched("scale", low=_LOW, high=_HIGH)
    groups = tuple(Group(f"layer{i}", "", str(i)) for i in range(layers))
    space = Space(count, fields, groups=groups)
    own = Genotypes(setting.recipe, setting.seed, setting.budget, space)
    search, total = searched(setting, own, [_alone(k) for k in range(count)])
    return Plan(
        search,
        total,
        setting.objective,
        reading=programs.as_recipe([(0, 0)], setting.recipe),
        notes=(_SCALED if scaled else _UNSCALED,),
    )


def _alone(model: int) -> samplers.Pick:
    """A model by itself, unscaled."""

    def pick(axis: Dimension, field: Searched) -> float:
        if field.name == "scale":
            return (1 - _LOW) / (_HIGH - _LOW)
        return float(field.name == "selected" and axis.place == model)

    return pick
