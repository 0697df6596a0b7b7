r"""The paper's pair WizardLM-13B-V1.2 and WizardMath-13B-V1.0, by TIES with M3.

    m3jax merge --config=configs/paper_lm_math.py \
        --base=meta-llama/Llama-2-13b-hf \
        --models=WizardLM/WizardLM-13B-V1.2,WizardLM/WizardMath-13B-V1.0 \
        --output=OUT

The paper's GSM8K goes from 14.6 to 18.6 with M3. Its draw was not recorded, so its
merge cannot be made again; this one can, from the seed. Add --config.dare.drop_rate=0.2
for DARE. Checkpoints that are published as pickled .bin files have to be converted to
safetensors first; m3jax says which.

Source: arXiv 2502.15434.
"""

from ml_collections import ConfigDict

from m3jax.commands import config as recipes


def get_config() -> ConfigDict:
    config = recipes.default()
    config.method = "ties"
    config.trim_rate = 0.5
    config.mixup.alpha = 0.5
    config.vocabulary = "mean"  # 32000 rows in some, 32001 in others
    return config
