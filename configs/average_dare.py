r"""Weighted average with DARE.

    m3jax merge --config=configs/average_dare.py \
        --base=BASE --models=A,B --output=OUT

Source: arXiv 2203.05482; DARE: arXiv 2311.03099.
"""

from ml_collections import ConfigDict

from m3jax.commands import config as recipes


def get_config() -> ConfigDict:
    config = recipes.default()
    config.mixup.alpha = None  # equal weights
    config.dare.drop_rate = 0.2  # the paper's, for every model
    return config
