r"""TIES.

    m3jax merge --config=configs/ties.py \
        --base=BASE --models=A,B --output=OUT

Source: arXiv 2306.01708.
"""

from ml_collections import ConfigDict

from m3jax.commands import config as recipes


def get_config() -> ConfigDict:
    config = recipes.default()
    config.method = "ties"
    config.trim_rate = 0.5  # the released code's default
    config.mixup.alpha = None  # equal weights
    return config
