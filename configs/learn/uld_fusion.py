r"""Fusion by universal logit distillation, from teachers of any vocabulary.

    m3jax learn --config=uld_fusion --base=BASE --models=A,B \
        --tasks=TASKS.json --output=OUT

The L1 distance of sorted probabilities, of z-scored logits of which the 10 largest are
kept, as InfiFusion (arXiv 2501.02795) names both and its authors say K = 10. The order
of the two, the space, rate and steps are ours. --teachers=X,Y,... gives one checkpoint
for each task, of any architecture that m3jax runs; without it the models teach.
"""

from ml_collections import ConfigDict

from m3jax.commands import learn_config


def get_config() -> ConfigDict:
    config = learn_config.default()
    config.recipe.method = "task_arithmetic"
    config.space.granularity = "tensor"
    config.space.initial = 0.5
    config.objective = (("uld", 1.0),)
    config.top_k = 10
    config.standardize = True
    config.inputs = "continuation"
    config.optimizer.name = "adam"
    config.optimizer.rate = 0.01
    config.steps = 200
    return config
