r"""TIES with M3 and DARE.

    m3jax merge --config=configs/ties_m3_dare.py \
        --base=BASE --models=A,B --output=OUT

Source: arXiv 2306.01708; M3: arXiv 2502.15434; DARE: arXiv 2311.03099.
"""

from ml_collections import ConfigDict

from m3jax.commands import config as recipes


def get_config() -> ConfigDict:
    config = recipes.default()
    config.method = "ties"
    config.trim_rate = 0.5  # the released code's default
    config.mixup.alpha = 0.5  # λ ~ Beta(0.5, 0.5)
    config.dare.drop_rate = 0.2  # the paper's, for every model
    return config
