r"""Task vectors weighed by tensor so that the merge speaks like each expert; no labels.

    m3jax learn --config=distil --base=BASE --models=A,B \
        --tasks=TASKS.json --output=OUT

DAM's loss (arXiv 2410.08371) in AdaMerging's space (arXiv 2310.02575). The combination,
the rate and the steps are ours; docs/LEARN.md has what it gives on the demo's models.
"""

from ml_collections import ConfigDict

from m3jax.commands import learn_config


def get_config() -> ConfigDict:
    config = learn_config.default()
    config.recipe.method = "task_arithmetic"
    config.space.granularity = "tensor"
    config.space.initial = 0.5
    config.objective = (("kl", 1.0),)
    config.inputs = "continuation"
    config.optimizer.name = "adam"
    config.optimizer.rate = 0.02
    config.steps = 100
    config.validate_every = 25
    return config
