r"""Weighted average with M3.

    m3jax merge --config=configs/average_m3.py \
        --models=A,B --output=OUT

Source: arXiv 2203.05482; M3: arXiv 2502.15434.
"""

from ml_collections import ConfigDict

from m3jax.commands import config as recipes


def get_config() -> ConfigDict:
    config = recipes.default()
    config.mixup.alpha = 0.5  # λ ~ Beta(0.5, 0.5)
    return config
