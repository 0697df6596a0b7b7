r"""Weighted average.

    m3jax merge --config=configs/average.py \
        --models=A,B --output=OUT

Source: arXiv 2203.05482.
"""

from ml_collections import ConfigDict

from m3jax.commands import config as recipes


def get_config() -> ConfigDict:
    config = recipes.default()
    config.mixup.alpha = None  # equal weights
    return config
