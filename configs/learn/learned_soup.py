r"""Learned soup: softmax weights of the models for each tensor, from labels.

    m3jax learn --config=learned_soup --base=BASE --models=A,B \
        --tasks=TASKS.json --output=OUT

Agrees with AlphaWrapper of mlfoundations/model-soups (arXiv 2203.05482) by layer: the
soup starts uniform, AdamW at 0.05 without decay, cross-entropy of logits that are
multiplied by a number β, which is learned too and is no part of the merged model. Ours:
the steps.
"""

from ml_collections import ConfigDict

from m3jax.commands import learn_config


def get_config() -> ConfigDict:
    config = learn_config.default()
    config.recipe.method = "average"
    config.space.granularity = "tensor"
    config.space.constraint = "simplex"
    config.objective = (("cross_entropy", 1.0),)
    config.inputs = "completion"
    config.scale_logits = True
    config.optimizer.name = "adamw"
    config.optimizer.rate = 0.05
    config.optimizer.options = (("weight_decay", 0.0),)
    config.steps = 200
    return config
