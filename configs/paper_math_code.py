r"""The paper's pair WizardMath-13B and Llama-2-13b-code-alpaca, task arithmetic and M3.

    m3jax merge --config=configs/paper_math_code.py \
        --base=meta-llama/Llama-2-13b-hf \
        --models=WizardLM/WizardMath-13B-V1.0,layoric/llama-2-13b-code-alpaca \
        --output=OUT

The paper's MBPP goes from 10.6 to 19.0 with M3. Its draw was not recorded, so its merge
cannot be made again; this one can, from the seed. Add --config.dare.drop_rate=0.2 for
DARE. Checkpoints that are published as pickled .bin files have to be converted to
safetensors first; m3jax says which.

Source: arXiv 2502.15434.
"""

from ml_collections import ConfigDict

from m3jax.commands import config as recipes


def get_config() -> ConfigDict:
    config = recipes.default()
    config.method = "task_arithmetic"
    config.mixup.alpha = 0.5
    config.vocabulary = "mean"  # 32000 rows in some, 32001 in others
    return config
