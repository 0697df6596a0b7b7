r"""Task arithmetic with DARE.

    m3jax merge --config=configs/task_arithmetic_dare.py \
        --base=BASE --models=A,B --output=OUT

Source: arXiv 2212.04089; DARE: arXiv 2311.03099.
"""

from ml_collections import ConfigDict

from m3jax.commands import config as recipes


def get_config() -> ConfigDict:
    config = recipes.default()
    config.method = "task_arithmetic"
    config.scaling = 1.0  # total weight K; 1/K compares fairly with M3
    config.mixup.alpha = None  # equal weights
    config.dare.drop_rate = 0.2  # the paper's, for every model
    return config
