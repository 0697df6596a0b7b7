"""Every architecture, saved in its old and new layouts, merges as it does in torch.

transformers 5 writes a model with the names of its modules, or with those that
checkpoints on the hub have: experts stacked or one by one, parts of a model of text and
images under other prefixes. Base and models are given in either, and transformers must
load the merge and compute with it what it computes with the mean of the parameters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import pytest
import safetensors

import m3jax

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ALL = {**architectures.CAUSAL, **architectures.OTHERS}
PLAIN = m3jax.Recipe(mixup=m3jax.Mixup(alpha=None))
TOLERANCE = 1e-5  # of outputs between 0.1 and 20, float32


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.mark.parametrize("name", ALL)
def test_outputs(name: str, tmp_path: Path):
    cls, model, states = made(name, tmp_path)
    mean = {
        key: (states["a"][key] + other) / 2 if other.is_floating_point() else other
        for key, other in states["b"].items()
    }
    wanted, before = (outputs(model, state) for state in (mean, states["base"]))
    assert (wanted - before).abs().max() > 1000 * TOLERANCE, "the merge changes nothing"
    layouts = ["hub"]
    if stored(tmp_path / "a_hub") != stored(tmp_path / "a_modules"):
        layouts.append("modules")
    for layout in layouts:
        base, output = tmp_path / f"base_{layout}", tmp_path / f"merged_{layout}"
        m3jax.merge(base, [tmp_path / "a_hub", tmp_path / "b_modules"], output, PLAIN)
        assert stored(output) == stored(base), "the output has the base's names"
        merged, info = cls.from_pretrained(output, output_loading_info=True)
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            assert not info[kind]
        found = outputs(merged, merged.state_dict())
        torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)


def made(name: str, folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """The class, a model of it, and the states of those that were saved."""
    cls_name, fields = ALL[name]
    cls = getattr(transformers, cls_name, None)
    if cls is None:
        pytest.skip(f"this transformers has no {cls_name}")
    torch.manual_seed(0)
    model = cls(cls.config_class(**fields)).float().eval()
    states = {}
    for who in ("base", "a", "b"):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder / f"{who}_hub", save_original_format=True)
        model.save_pretrained(folder / f"{who}_modules", save_original_format=False)
        states[who] = {key: own.clone() for key, own in model.state_dict().items()}
    return cls, model, states


def stored(folder: Path) -> set[str]:
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def outputs(model: Any, state: dict[str, Any]) -> Any:
    model.load_state_dict(state)
    with torch.no_grad():
        made = model.eval()(**inputs(model))
    return made.logits if hasattr(made, "logits") else made[0]


def inputs(model: Any) -> dict[str, Any]:
    """Something for a model to compute with: tokens, pixels, sounds."""
    generator = torch.Generator().manual_seed(0)
    kind = model.main_input_name
    tokens = torch.randint(3, 60, (2, 9), generator=generator)
    pixels = torch.randn(2, 3, 8, 8, generator=generator)
    if kind == "pixel_values":
        return {"pixel_values": pixels}
    given = {"input_ids": tokens}
    if kind == "input_features":
        given = {"input_features": torch.randn(2, 8, 16, generator=generator)}
    if model.config.model_type in ("clip", "siglip"):
        given["pixel_values"] = pixels
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = tokens[:, :7]
    return given
