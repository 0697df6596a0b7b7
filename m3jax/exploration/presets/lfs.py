"""LFS of "Fine, I'll Merge It Myself", arXiv 2502.04030: a method per group of layers.

Each group has average (its `linear`), task arithmetic or TIES, or slerp of two models,
with numbers of its own; the genotype is that of `m3jax.search.lfs_merge`. The K single
models come first. Then TPE or random points, with `hyperband` under Hyperband.

Ours: TPE in the place of SMAC's random forest; the ranges, the registry's; TIES trims a
task vector over its group instead of each tensor; one set of numbers a group, for
attention and MLP alike; weights are uniform on the simplex, and slerp, at hand for two
models only, has a share where the release has a softmax. The paper's budget is 500.
"""

from __future__ import annotations

import dataclasses

from m3jax.exploration.groups import layer_groups, num_layers
from m3jax.exploration.presets.genotypes import searched
from m3jax.exploration.presets.setting import Plan, Setting
from m3jax.exploration.search import samplers
from m3jax.exploration.search.trials import Proposal
from m3jax.exploration.space import WHOLE, Space, Values
from m3jax.recipe import Mixup, RecipeError

_WEIGHED, _SUMMED = ("average", "slerp"), ("task_arithmetic", "ties")
_GROUPS = 4


@dataclasses.dataclass(frozen=True)
class Genotypes(samplers.Draws):
    """Draws whose ratios are looked at by the methods that have some in LFS."""

    def with_values(self, index: int, values: Values) -> Proposal | None:
        assert self.space is not None
        unweighed = {
            self.space.label(g, "ratios")
            for g in range(len(self.space.groups))
            if values[self.space.label(g, "method")][0] in _SUMMED
        }
        own = {label: v for label, v in values.items() if label not in unweighed}
        return super().with_values(index, own)


def plan(setting: Setting) -> Plan:
    """`draws` trials, or those of Hyperband."""
    setting.check_averages()
    if not setting.has_base:
        raise RecipeError(f"preset={setting.name!r} needs a base")
    layers = num_layers(setting.tensors)
    count = setting.groups or min(_GROUPS, layers)
    groups = layer_groups(setting.tensors, count) if count else WHOLE
    weighed = _WEIGHED if setting.num_models == 2 else _WEIGHED[:1]
    fields = [f"method={'|'.join((*weighed, *_SUMMED))}", "ratios"]
    recipe = dataclasses.replace(setting.recipe, mixup=Mixup(alpha=None))
    space = Space.parse(
        [*fields, "scaling", "trim_rate"], recipe, setting.num_models, groups
    )
    own = Genotypes(recipe, setting.seed, setting.budget, space)
    singles = [_alone(k) for k in range(setting.num_models)]
    search, total = searched(setting, own, singles)
    return Plan(search, total, setting.objective, reading=space.reading(recipe))


def _alone(model: int) -> samplers.Pick:
    """A model by itself, in every group: the average, all of it that model."""
    return lambda axis, field: float(field.name == "ratios" and axis.place == model)
