r"""AdaMerging, layer-wise: coefficients that make predictions certain, without labels.

    m3jax learn --config=adamerging --base=BASE --models=A,B \
        --tasks=TASKS.json --output=OUT

The loss is the sum over tasks of the mean entropy of the predictions. Agrees with
EnnengYang/AdaMerging (arXiv 2310.02575): start 0.3, Adam at 1e-3, 500 steps, λ clipped
to [0, 1] with the raw λ as the state; one λ per tensor and task. Task-wise:
--config.space.granularity=model. The release adds two batches of 16 of each task in a
step; a batch of 32 is their mean, half of that.

Ours: language models have no heads, so the entropy is that of the token behind the
prompt (the release: of classes; tasks of kind choice have it). With it a merge can
become certain of something wrong: docs/LEARN.md has a case; see distil for another way
without labels.
"""

from ml_collections import ConfigDict

from m3jax.commands import learn_config


def get_config() -> ConfigDict:
    config = learn_config.default()
    config.recipe.method = "task_arithmetic"
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
