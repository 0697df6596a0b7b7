r"""NP Merge: a learned share for every parameter of two models.

    m3jax learn --config=np_merge --base=BASE --models=A,B \
        --tasks=TASKS.json --output=OUT

c_0 = σ(r), c_1 = 1 − σ(r), r = 0 at the start; of K models a softmax of K − 1 learned
numbers and 0 (ours; the paper merges successive pairs). arXiv 2412.15467 has no public
code, so rate, steps and optimiser are ours: Adafactor, whose state is a row and a
column for each matrix. Align models of unlike units first (`m3jax.align`).
"""

from ml_collections import ConfigDict

from m3jax.commands import learn_config


def get_config() -> ConfigDict:
    config = learn_config.default()
    config.recipe.method = "average"
    config.space.granularity = "element"
    config.space.constraint = "share"
    config.objective = (("cross_entropy", 1.0),)
    config.inputs = "completion"
    config.optimizer.name = "adafactor"
    config.optimizer.rate = 0.05
    config.optimizer.options = (("multiply_by_parameter_scale", False),)
    config.steps = 200
    return config
