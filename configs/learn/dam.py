r"""DAM: coefficients by column that make one model speak like each expert on its data.

    m3jax learn --config=dam --base=BASE --models=A,B \
        --tasks=TASKS.json --output=OUT

Agrees with arcee-ai/DAM (arXiv 2410.08371) in its loss, T² KL to each expert at T = 2
and 0.01 × the cosine of the models' coefficients, in what is learned (linear weights,
a coefficient for each input column and model) and in the optimiser, MoFO-AdamW at 1e-3
of the largest 30 %, decay 0.01, batch 1. Ours: all start at 1/K (the release: biases at
1), the steps, and the data: what each expert writes behind its task's prompts, so that
no label is read. GPT-2's matrices are (in, out): there a column is an output.
"""

from ml_collections import ConfigDict

from m3jax.commands import learn_config


def get_config() -> ConfigDict:
    config = learn_config.default()
    config.recipe.method = "average"
    config.space.granularity = "column"
    config.space.include = (r"_proj\.weight$", r"\.c_\w+\.weight$")
    config.space.regularisers = (("similarity", 0.01),)
    config.objective = (("kl", 1.0),)
    config.temperature = 2.0
    config.inputs = "continuation"
    config.optimizer.name = "mofo_adamw"
    config.optimizer.rate = 1e-3
    config.optimizer.options = (("fraction", 0.3), ("weight_decay", 0.01))
    config.steps = 1000
    config.batch = 1
    return config
