r"""Safety-aware merging: task vectors weighed by a loss on safety and on tasks.

    m3jax learn --config=safety_align --base=BASE --models=A,B \
        --tasks=TASKS.json --output=OUT

Σ weight(task) · cross-entropy of the answers: name the safety task `safety`, its weight
is 1; give the others 0.3, the paper's α, by
--config.task_weights="(('safety', 1.0), ('maths', 0.3))". The objective is that of
arXiv 2406.14563, whose scripts search the weights without gradients; descent on it, in
this space, with these rates and steps, is ours.
"""

from ml_collections import ConfigDict

from m3jax.commands import learn_config


def get_config() -> ConfigDict:
    config = learn_config.default()
    config.recipe.method = "task_arithmetic"
    config.space.granularity = "tensor"
    config.space.constraint = "clip"
    config.space.bounds = (0.0, 1.5)
    config.space.initial = 0.5
    config.objective = (("cross_entropy", 1.0),)
    config.task_weights = ()
    config.inputs = "completion"
    config.optimizer.name = "adam"
    config.optimizer.rate = 0.01
    config.steps = 200
    return config
