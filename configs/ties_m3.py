r"""TIES with M3.

    m3jax merge --config=configs/ties_m3.py \
        --base=BASE --models=A,B --output=OUT

Source: arXiv 2306.01708; M3: arXiv 2502.15434.
"""

from ml_collections import ConfigDict

from m3jax.commands import config as recipes


def get_config() -> ConfigDict:
    config = recipes.default()
    config.method = "ties"
    config.trim_rate = 0.5  # the released code's default
    config.mixup.alpha = 0.5  # λ ~ Beta(0.5, 0.5)
    return config
