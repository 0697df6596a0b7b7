r"""AdaMerging++: AdaMerging of task vectors that TIES has trimmed and elected.

    m3jax learn --config=adamerging_pp --base=BASE --models=A,B \
        --tasks=TASKS.json --output=OUT

Agrees with EnnengYang/AdaMerging (arXiv 2310.02575): of each task vector the largest
20 % over the whole model are kept, and of those the ones with the elected sign; they
are not averaged. Otherwise as adamerging, and what is ours there is ours here.
"""

from ml_collections import ConfigDict

from m3jax.commands import learn_config


def get_config() -> ConfigDict:
    config = learn_config.default()
    config.recipe.method = "task_arithmetic"
    config.recipe.elect.density = 0.2
    config.space.granularity = "tensor"
    config.space.constraint = "clip"
    config.space.initial = 0.3
    config.objective = (("entropy", 1.0),)
    config.inputs = "prompt"
    config.optimizer.name = "adam"
    config.optimizer.rate = 1e-3
    config.steps = 500
    config.batch = 32
    return config
