r"""Task arithmetic with M3.

    m3jax merge --config=configs/task_arithmetic_m3.py \
        --base=BASE --models=A,B --output=OUT

Source: arXiv 2212.04089; M3: arXiv 2502.15434.
"""

from ml_collections import ConfigDict

from m3jax.commands import config as recipes


def get_config() -> ConfigDict:
    config = recipes.default()
    config.method = "task_arithmetic"
    config.mixup.alpha = 0.5  # λ ~ Beta(0.5, 0.5)
    return config
