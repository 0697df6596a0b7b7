"""mergekit 0.1.5 as an oracle: it makes tiny models, and merges YAML, in a process of
its own environment, whose Python M3JAX_MERGEKIT names."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MERGEKIT = os.environ.get("M3JAX_MERGEKIT")
_MERGES = """
import json, pathlib, sys, torch, yaml
torch.set_num_threads(1)
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
names, copied = json.load(sys.stdin)
for name in names:
    try:
        config = MergeConfiguration.model_validate(yaml.safe_load(open(name + ".yml")))
        options = MergeOptions(
            quiet=True, copy_tokenizer=copied, write_model_card=False
        )
        run_merge(config, name + ".theirs", options)
    except Exception as error:
        pathlib.Path(name + ".error").write_text(repr(error))
"""
_MODELS = """
import json, sys, torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers import PreTrainedTokenizerFast
for folder, own in json.load(sys.stdin).items():
    try:
        fields = dict(own["config"])
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        kind = AutoModelForCausalLM
        if getattr(config, "is_encoder_decoder", False):
            kind = AutoModelForSeq2SeqLM
        torch.manual_seed(0)
        model = kind.from_config(config, dtype=torch.float32)
        state = torch.Generator().manual_seed(0)
        change = torch.Generator().manual_seed(own["seed"])
        with torch.no_grad():
            for tensor in model.parameters():
                rows = torch.randn((64, *tensor.shape[1:]), generator=state)
                if tensor.shape[0] > 64:
                    rows = torch.randn(tensor.shape, generator=state)
                moved = torch.randn(tensor.shape, generator=change)
                tensor.copy_(rows[: tensor.shape[0]] * 0.05)
                tensor.add_(moved * 0.02 * bool(own["seed"]))
        model.to(getattr(torch, own.get("dtype", "float32"))).save_pretrained(folder)
        if "tokenizer" in own:
            PreTrainedTokenizerFast(
                tokenizer_file=own["tokenizer"], **own.get("special", {})
            ).save_pretrained(folder)
    except Exception as error:
        print(folder, repr(error)[:300], file=sys.stderr)
"""


def make_models(models: Mapping[str, Any]) -> str:
    """Makes models with transformers.

    Args:
      models: by folder: `config` with its model_type; `seed`, 0 for a base, from which
        the others differ a little; may have `dtype`, `tokenizer` (a tokenizer.json) and
        `special` tokens.

    Returns:
      A line for each that transformers cannot make.
    """
    return _run(_MODELS, json.dumps(models)).stderr


def merge(names: Sequence[str], *, tokenizer: bool = False) -> None:
    """Merges NAME.yml to NAME.theirs, or writes what went wrong to NAME.error."""
    _run(_MERGES, json.dumps([list(names), tokenizer]))


def _run(program: str, given: str) -> subprocess.CompletedProcess[str]:
    assert MERGEKIT is not None
    keep = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [MERGEKIT, "-c", program],
        input=given,
        text=True,
        check=True,
        capture_output=True,
        env={**keep, "HF_HUB_OFFLINE": "1"},
    )


def refused(name: str) -> str | None:
    """Why mergekit did not merge NAME.yml; None where it did."""
    path = Path(f"{name}.error")
    return path.read_text() if path.exists() else None
