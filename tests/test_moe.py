"""Mixtures of experts: what mergekit builds, what transformers computes of ours."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from checkpoints import digest, read, write
from command_line import Run
from safetensors.numpy import load_file
from test_mergekit import _fused
from tiny_models import config_dict, prompts, reference

from m3jax import prng

GOLDEN = Path(__file__).parent / "golden_mergekit"
EXPERTS = {"experts": [{"source_model": "a"}, {"source_model": "b"}]}


@pytest.mark.parametrize("case", json.loads((GOLDEN / "moe.json").read_text()))
def test_builds_what_mergekit_builds(
    case: dict[str, Any], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mergekit runs the base in bfloat16 for hidden states: its gates are that near."""
    monkeypatch.chdir(GOLDEN / "models")
    config = f"--config={GOLDEN / case['yaml']}"
    ran = run("merge", config, f"--output={tmp_path / 'out'}")
    assert ran.code == 0, ran.err
    got, expected = _fused(read(tmp_path / "out")), load_file(GOLDEN / case["expected"])
    assert set(got) == set(expected)
    for name, own in got.items():
        end = name.partition(".mlp.")[0] and "mlp." + name.partition(".mlp.")[2]
        loose = case.get("loose", {}).get(end, case["atol"])
        assert own.shape == expected[name].shape
        if end not in case.get("random", []):
            np.testing.assert_allclose(own, expected[name], rtol=2e-6, atol=loose)


def _dense(folder: Path, family: str, seed: int) -> Path:
    """A dense model as transformers saves it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder.parent.mkdir(exist_ok=True, parents=True)
    if seed == 0:
        reference(family).save_pretrained(folder)
        return folder
    torch.manual_seed(seed)
    fields = dict(config_dict(family))
    made = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    transformers.AutoModelForCausalLM.from_config(made).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["llama2", "mistral", "qwen2", "qwen3"])
def test_equal_experts_are_the_dense_model(
    family: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the gates choose, since what they choose is weighted by shares of 1."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    _dense(tmp_path / "base", family, 0)
    document: dict[str, Any] = {
        "base_model": "base",
        "gate_mode": "random",
        "experts": [{"source_model": "base"}] * 3,
    }
    if family == "qwen2":
        document["shared_experts"] = [{"source_model": "base", "residual_scale": 0}]
    Path("moe.yml").write_text(yaml.safe_dump(document))
    ran = run("moe", "--config=moe.yml", "--output=out")
    assert ran.code == 0, ran.err
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            "out", attn_implementation="eager", dtype=torch.float32
        ).eval()
    tokens = torch.tensor(prompts(2, 9))
    with torch.no_grad():
        got, wanted = (own(tokens).logits for own in (model, reference(family)))
    np.testing.assert_allclose(got.numpy(), wanted.numpy(), atol=2e-4)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base and two experts, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("base", "a", "b")):
        _dense(tmp_path / name, "llama2", i)
    return tmp_path


def test_random_gates_follow_from_the_seed(models: Path, run: Run) -> None:
    flags = ("moe", "--base=base", "--models=a,b", "--experts_per_token=1")
    assert run(*flags, "--output=out", "--seed=5").code == 0
    key = prng.fold_in(prng.fold_in(prng.root_key(5), 4), 1)
    drawn = jax.random.normal(jax.random.wrap_key_data(key), (2, 32))
    got = read(models / "out")
    name = "model.layers.1.block_sparse_moe"
    assert np.array_equal(got[f"{name}.gate.weight"][1], drawn[1])
    own = read(models / "b")["model.layers.1.mlp.down_proj.weight"]
    assert np.array_equal(got[f"{name}.experts.1.w2.weight"], own)
    config = json.loads((models / "out" / "config.json").read_text())
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (2, 1)


def test_the_record_builds_the_same_bytes(models: Path, run: Run) -> None:
    document = {"base_model": "base", "gate_mode": "uniform_random", **EXPERTS}
    Path("moe.yml").write_text(yaml.safe_dump(document | {"m3jax": {"seed": 7}}))
    assert run("merge", "--config=moe.yml", "--output=1", "--chunk_size=1024").code == 0
    assert run("merge", "--config=1/m3jax.json", "--output=2").code == 0
    assert digest(models / "1") == digest(models / "2")
    assert run("verify", "2").code == 0
    assert run("moe", "--config=moe.yml", "--dry_run").code == 0


def test_noise_on_an_expert(models: Path, run: Run) -> None:
    """Of that deviation, before what it adds is scaled; the same for any chunks."""
    document = {"base_model": {"model": {"path": "base"}}, "gate_mode": "random"}
    noisy = {"source_model": "a", "noise_scale": 0.5, "residual_scale": 0.1}
    document |= {"experts": [noisy, {"source_model": "b"}], "architecture": "Mixtral"}
    Path("moe.yml").write_text(yaml.safe_dump(document))
    merged = ("moe", "--config=moe.yml", "--seed=3")
    assert run(*merged, "--output=out").code == 0
    flags = ("--config=out/m3jax.json", "--chunk_size=1024", "--output=again")
    assert run("moe", *flags).code == 0
    assert digest(models / "out") == digest(models / "again")
    got, own = read(models / "out"), read(models / "a")
    noises = []
    for word, kind, scale in (("w1", "gate", 1), ("w3", "up", 1), ("w2", "down", 0.1)):
        for layer in range(2):
            name = f"model.layers.{layer}.block_sparse_moe.experts.0.{word}.weight"
            weight = own[f"model.layers.{layer}.mlp.{kind}_proj.weight"]
            noises.append((got[name] / scale - weight).ravel() / 0.5)
    assert len({noise[:8].tobytes() for noise in noises}) == 6
    noise = np.concatenate(noises)
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    untouched = got["model.layers.0.block_sparse_moe.experts.1.w2.weight"]
    wanted = read(models / "b")["model.layers.0.mlp.down_proj.weight"]
    assert np.array_equal(untouched, wanted)


def _deepseek(model: Any, tensors: dict[str, np.ndarray], per_token: int) -> Any:
    """A dense model with the feed-forward layers that DeepSeek-MoE has: what the
    shared expert gives, and of the experts with the largest softmax scores (arXiv
    2401.06066, eq. 3 to 5) the mean by their scores, which then sum to 1."""
    torch = pytest.importorskip("torch")

    def weight(name: str) -> Any:
        return torch.from_numpy(tensors[f"model.layers.{name}.weight"].copy())

    def expert(x: Any, name: str) -> Any:
        gate, up, down = (weight(f"{name}.{k}_proj") for k in ("gate", "up", "down"))
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    class Mixture(torch.nn.Module):
        def __init__(self, layer: int) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Any) -> Any:
            here = f"{self.layer}.mlp"
            scores = (x @ weight(f"{here}.gate").T).softmax(-1)
            best, chosen = scores.topk(per_token, -1)
            best = best / best.sum(-1, keepdim=True)
            every = [expert(x, f"{here}.experts.{e}") for e in range(scores.shape[-1])]
            own = torch.stack(every, -2)  # (..., experts, width)
            index = chosen[..., None].expand(*chosen.shape, own.shape[-1])
            routed = (own.gather(-2, index) * best[..., None]).sum(-2)
            return routed + expert(x, f"{here}.shared_experts")

    for layer, block in enumerate(model.model.layers):
        block.mlp = Mixture(layer)
    return model


def test_deepseek_computes_what_the_dense_model_does(models: Path, run: Run) -> None:
    """Of equal experts and a silent shared one, whatever the gates choose: transformers
    has no such model (its code is fetched), so the paper's layer stands here."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    document: dict[str, Any] = {
        "base_model": "base",
        "gate_mode": "random",
        "experts": [{"source_model": "base"}] * 3,
        "shared_experts": [{"source_model": "a", "residual_scale": 0}],
    }
    Path("moe.yml").write_text(yaml.safe_dump(document))
    assert run("moe", "--config=moe.yml", "--output=out").code == 0
    dense = transformers.AutoModelForCausalLM.from_pretrained("base").eval()
    tokens = torch.tensor(prompts(2, 9))
    with torch.no_grad():
        wanted = dense(tokens).logits.numpy()
        made = _deepseek(dense, read(models / "out"), 2)(tokens).logits.numpy()
    np.testing.assert_allclose(made, wanted, atol=2e-4)


def test_deepseek_has_a_shared_expert(models: Path, run: Run) -> None:
    document = {"base_model": "base", "gate_mode": "random", **EXPERTS}
    document |= {"shared_experts": [{"source_model": "base"}], "dtype": "bfloat16"}
    Path("moe.yml").write_text(yaml.safe_dump(document))
    ran = run("moe", "--config=moe.yml", "--output=out")
    assert ran.code == 0, ran.err
    got, config = read(models / "out"), json.loads(Path("out/config.json").read_text())
    shared = got["model.layers.0.mlp.shared_experts.up_proj.weight"]
    wanted = read(models / "base")["model.layers.0.mlp.up_proj.weight"]
    assert np.array_equal(shared, wanted.astype("bfloat16"))
    assert (config["model_type"], config["n_routed_experts"]) == ("deepseek", 2)
    assert config["n_shared_experts"] == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"expertz": 1}, "unknown key expertz; did you mean 'experts'?"),
        ({"gate_mode": "hiden"}, "gate_mode='hiden' needs one of hidden"),
        ({"gate_mode": "hidden"}, "experts[0].positive_prompts is missing"),
        ({"experts_per_token": 3}, "experts_per_token=3 needs 1 to the number"),
        ({"base_model": None}, "base_model=None needs a name"),
        ({"architecture": "qwen3_moe"}, "takes qwen3 models, base is 'llama'"),
        ({"experts": [{"source_model": "q"}] * 2}, "q: is 'qwen3', base 'llama'"),
        ({"experts": [{"source_model": "w"}] * 2}, "experts are models of one archi"),
        ({"experts": [{"source_model": "a", "noise_scale": "x"}]}, "needs a number"),
        ({"experts": [{"source_model": "a", "residual_scale": "x"}]}, "needs a number"),
        ({"shared_experts": [{"source_model": "a"}] * 2}, "deepseek has at most one"),
    ],
)
def test_one_line_says_what_is_wrong(
    change: dict[str, Any], message: str, models: Path, run: Run
) -> None:
    if "'q'" in str(change):
        _dense(models / "q", "qwen3", 0)
    wide = read(models / "a")
    wide["model.layers.1.mlp.up_proj.weight"] = np.ones((3, 32), np.float32)
    write(models / "w", wide, json.loads((models / "a" / "config.json").read_text()))
    document = {"base_model": "base", "gate_mode": "random", **EXPERTS} | change
    Path("moe.yml").write_text(yaml.safe_dump(document))
    ran = run("merge", "--config=moe.yml", "--output=out")
    assert ran.code in (2, 3)
    assert message in ran.error
    assert not Path("out").exists()


def test_experts_whose_names_begin_otherwise(models: Path, run: Run) -> None:
    short = {n.removeprefix("model."): t for n, t in read(models / "b").items()}
    config = json.loads((models / "b" / "config.json").read_text())
    write(models / "short", short, config)
    for i, name in enumerate(("b", "short")):
        flags = ("--base=base", f"--models=a,{name}", f"--output=out{i}")
        assert run("moe", *flags).code == 0
    one, other = (read(models / f"out{i}") for i in range(2))
    assert one.keys() == other.keys()
    assert all(np.array_equal(own, other[name]) for name, own in one.items())
