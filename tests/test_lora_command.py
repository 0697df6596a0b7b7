"""`m3jax lora extract` and `m3jax lora merge`: PEFT folders, and what they lose."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import read, write
from command_line import Run
from test_lora import MODULE, _model, adapter, pair

import m3jax
from m3jax.checkpoints.folder import open_checkpoint
from m3jax.checkpoints.source import read_whole
from m3jax.lora import factors

GOLDEN = Path(__file__).parent / "golden_mergekit"
OFF = "--config.mixup.alpha=None"


def opened(name: str | Path) -> dict[str, np.ndarray]:
    with open_checkpoint(str(name)) as checkpoint:
        return {n: read_whole(source) for n, source in checkpoint.tensors.items()}


def errors(out: str) -> dict[str, tuple[str, float]]:
    """Rank and error of each tensor, as they are printed."""
    rows = [line.split() for line in out.splitlines()[1:-1]]
    return {row[0]: (row[-3], float(row[-2])) for row in rows}


def relative(change: np.ndarray, got: np.ndarray) -> float:
    return float(np.linalg.norm(change - got) / np.linalg.norm(change))


@pytest.mark.parametrize("case", json.loads((GOLDEN / "extract_lora.json").read_text()))
def test_extracts_as_mergekit_does(
    case: dict[str, Any], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(GOLDEN / "models")
    lora = "--embed-lora" in case["flags"]
    ran = run(
        *("lora", "extract", "--base=base", "--model=a", f"--output={tmp_path / 'a'}"),
        *(f"--rank={case['max_rank']}", f"--embeddings={'lora' if lora else 'whole'}"),
    )
    assert ran.code == 0, ran.err
    said = errors(ran.out)
    base, model, got = read(Path("base")), read(Path("a")), opened(f"base+{tmp_path}/a")
    for name, least in case["relative_error"].items():
        change = model[name].astype(np.float64) - base[name]
        assert said[name][0] == str(case["rank"][name])
        assert said[name][1] == pytest.approx(least, abs=2e-5)
        assert relative(change, got[name] - base[name]) == pytest.approx(
            least, abs=2e-5
        )
    for name in case["saved_whole"]:
        assert np.array_equal(got[name], model[name]), name
    assert {n for n, own in said.items() if own[0] == "whole"} <= set(
        case["saved_whole"]
    )


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "tied"])
def test_peft_reads_what_is_extracted(kind: str, tmp_path: Path, run: Run) -> None:
    """All ranks kept, so that merging back gives the model: biases, norms, Conv1D."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _model(kind)
        model.save_pretrained(tmp_path / "base")
        with torch.no_grad():
            for name, own in model.named_parameters():
                if ".1.mlp.up" not in name:  # which stays as it was
                    own.add_(0.1 * torch.randn(own.shape))
        model.save_pretrained(tmp_path / "tuned")
        base, tuned, made = (tmp_path / n for n in ("base", "tuned", "made"))
        flags = (f"--base={base}", f"--model={tuned}", f"--output={made}")
        ran = run("lora", "extract", *flags, "--energy=1")
        assert ran.code == 0, ran.err
        assert "1.mlp.up_proj.weight" not in ran.out
        start = transformers.AutoModelForCausalLM.from_pretrained(base)
        loaded = peft.PeftModel.from_pretrained(start, made)
        state = loaded.merge_and_unload().state_dict()
    wanted, got = read(tuned), opened(f"{base}+{made}")
    for name, own in wanted.items():
        np.testing.assert_allclose(got[name], own, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(state[name].numpy(), own, atol=1e-6, err_msg=name)


def _twins(folder: Path, rows: int, columns: int) -> np.ndarray:
    """Base and a model whose change has singular values 1, 1/2, 1/4, …"""
    generator = np.random.default_rng(2)
    u, _ = np.linalg.qr(generator.normal(size=(rows, 12)))
    v, _ = np.linalg.qr(generator.normal(size=(columns, 12)))
    change = (u * 0.5 ** np.arange(12)) @ v.T
    base = np.round(generator.normal(size=(rows, columns)), 3)
    name = f"{MODULE}.weight"
    write(folder / "base", {name: base.astype(np.float64)}, {})
    write(folder / "model", {name: base + change}, {})
    return change


def test_energy_and_the_randomised_svd(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    change = _twins(tmp_path, 60, 50)
    common = ("lora", "extract", "--base=base", "--model=model")
    ran = run(*common, "--energy=0.99", "--output=e")
    (rank, error) = errors(ran.out)[f"{MODULE}.weight"]
    squares = np.cumsum(0.25 ** np.arange(12))
    count = int(np.searchsorted(squares / squares[-1], 0.99)) + 1
    least = np.sqrt(1 - squares[count - 1] / squares[-1])
    assert (rank, error) == (str(count), pytest.approx(least, abs=1e-5))
    for i in range(2):
        ran = run(*common, "--rank=5", "--svd=randomised", f"--output=r{i}", "--seed=4")
        assert "—" in ran.out  # no bound is known
        assert errors(ran.out)[f"{MODULE}.weight"][1] == pytest.approx(
            np.sqrt(1 - squares[4] / squares[-1]), abs=1e-5
        )
    weights = [(tmp_path / f"r{i}" / "adapter_model.safetensors") for i in range(2)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    ran = run(*common, "--energy=1", "--factors_dtype=bfloat16", "--output=b")
    got = opened("base+b")[f"{MODULE}.weight"] - read(Path("base"))[f"{MODULE}.weight"]
    assert relative(change, got) == pytest.approx(
        errors(ran.out)[f"{MODULE}.weight"][1], abs=1e-4
    )


def test_names_with_another_beginning(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    change = _twins(tmp_path, 30, 20)
    short = {n.removeprefix("model."): t for n, t in read(Path("model")).items()}
    write(tmp_path / "short", short, {})
    flags = ("--base=base", "--model=short", "--energy=1", "--output=a")
    ran = run("lora", "extract", *flags)
    assert ran.code == 0, ran.err
    np.testing.assert_allclose(change_of("a"), change, atol=1e-6)


@pytest.fixture
def three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Adapters a, b and c of different ranks and scalings; their ΔW by name."""
    monkeypatch.chdir(tmp_path)
    made = {}
    for i, (name, rank) in enumerate([("a", 2), ("b", 3), ("c", 1)]):
        tensors = pair(rank, 16, 20, seed=i)
        adapter(tmp_path / name, tensors, r=rank, lora_alpha=i + 1)
        a, b = (own.astype(np.float64) for own in tensors.values())
        made[name] = (i + 1) / rank * b @ a
    generator = np.random.default_rng(9)
    base = {f"{MODULE}.weight": generator.normal(size=(16, 20)).astype(np.float32)}
    write(tmp_path / "base", base, {})
    return made


def change_of(name: str) -> np.ndarray:
    base = read(Path("base"))[f"{MODULE}.weight"]
    return opened(f"base+{name}")[f"{MODULE}.weight"].astype(np.float64) - base


@pytest.mark.parametrize("how", ["concatenate", "core", "svd"])
def test_a_weighted_sum_is_that_of_the_changes(
    how: str, three: dict[str, np.ndarray], run: Run
) -> None:
    cut = ("--energy=1",) if how == "svd" else ()
    ratios = "--config.mixup.ratios=(0.5,0.3,-0.2)"
    method = "--config.method=task_arithmetic"
    ran = run(
        *("lora", "merge", "--models=a,b,c", "--output=out", f"--how={how}"),
        *(ratios, method, "--config.scaling=2.0", *cut),
    )
    assert ran.code == 0, ran.err
    wanted = 2 * (0.5 * three["a"] + 0.3 * three["b"] - 0.2 * three["c"])
    np.testing.assert_allclose(change_of("out"), wanted, atol=2e-5)
    assert errors(ran.out)[MODULE] == ("6", 0.0)


def test_ratios_are_those_of_a_merge_of_models(
    three: dict[str, np.ndarray], run: Run
) -> None:
    flags = ("--models=a,b,c", "--seed=5", "--config.mixup.alpha=0.5")
    assert run("lora", "merge", *flags, "--output=adapter").code == 0
    assert run("merge", "--base=base", *flags, "--output=model").code == 0
    model = read(Path("model"))[f"{MODULE}.weight"] - read(Path("base"))[
        f"{MODULE}.weight"
    ].astype(np.float64)
    np.testing.assert_allclose(change_of("adapter"), model, atol=1e-5)


def test_ties_in_the_core_space(three: dict[str, np.ndarray], run: Run) -> None:
    """Against its definition, with bases of NumPy's."""
    ran = run(
        *("lora", "merge", "--models=a,b,c", "--output=out", "--how=core"),
        *(OFF, "--config.method=ties", "--config.trim_rate=0.4"),
    )
    assert ran.code == 0, ran.err
    pairs = [pair(rank, 16, 20, seed=i) for i, rank in enumerate([2, 3, 1])]
    a, b = (
        [p[f"{MODULE}.lora_{x}.weight"].astype(np.float64) for p in pairs] for x in "AB"
    )
    u = np.linalg.svd(np.hstack(b), full_matrices=False)[0]
    v = np.linalg.svd(np.vstack(a), full_matrices=False)[2]
    cores = [{"x": (u.T @ own @ v.T).astype(np.float32)} for own in three.values()]
    zero = {"x": np.zeros((6, 6), np.float32)}
    recipe = m3jax.Recipe(
        method=m3jax.Ties(trim_rate=0.4), mixup=m3jax.Mixup(alpha=None)
    )
    merged = np.asarray(m3jax.merge_params(zero, cores, recipe, 0)["x"])
    np.testing.assert_allclose(change_of("out"), u @ merged @ v, atol=2e-5)


def test_the_best_rank_of_a_merge(three: dict[str, np.ndarray], run: Run) -> None:
    for recipe in ((), ("--config.method=ties",)):
        output = f"out{len(recipe)}"
        ran = run(
            *("lora", "merge", "--models=a,b", f"--output={output}", "--how=svd"),
            *(OFF, "--rank=2", *recipe),
        )
        assert ran.code == 0, ran.err
        deltas = [{"x": three[n].astype(np.float32)} for n in "ab"]
        zero = {"x": np.zeros((16, 20), np.float32)}
        asked = m3jax.Recipe(
            method="ties" if recipe else "average", mixup=m3jax.Mixup(alpha=None)
        )
        merged = np.asarray(m3jax.merge_params(zero, deltas, asked, 0)["x"])
        values = np.linalg.svd(merged.astype(np.float64), compute_uv=False)
        least = np.linalg.norm(values[2:]) / np.linalg.norm(values)
        assert errors(ran.out)[MODULE] == ("2", pytest.approx(least, abs=2e-5))
        assert relative(merged, change_of(output)) == pytest.approx(least, abs=1e-4)


def test_modules_that_only_one_has_and_what_is_saved_whole(
    three: dict[str, np.ndarray], run: Run, tmp_path: Path
) -> None:
    norm = np.linspace(0, 2, 5).astype(np.float32)
    write(tmp_path / "base2", read(Path("base")) | {"model.norm.weight": norm}, {})
    saved = {"model.norm.weight": norm + 1}
    adapter(tmp_path / "n", pair(2, 16, 20) | saved, modules_to_save=["norm"])
    common = ("lora", "merge", "--models=n,b", OFF)
    assert "give --base" in run(*common, "--output=out").error
    ran = run(*common, "--output=out", "--base=base2")
    assert ran.code == 0, ran.err
    got = opened("base2+out")["model.norm.weight"]
    np.testing.assert_allclose(got, norm + 0.5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("lora",), "needs extract or merge"),
        (("lora", "extract", "--base=base", "--output=o"), "--base and --model"),
        (
            ("lora", "extract", "--base=base", "--model=a", "--output=o"),
            "rank or energy is missing",
        ),
        (("lora", "merge", "--models=a", "--output=o"), "two adapters or more"),
        (("lora", "merge", "--models=a,base", "--output=o"), "base: no adapter"),
        (
            ("lora", "merge", "--models=a,b", "--output=o", "--config.method=ties"),
            "how=concatenate adds adapters up",
        ),
        (("lora", "merge", "--models=a,b", "--output=o", "--rank=2"), "cuts to a rank"),
        (("lora", "merge", "--models=a,b", "--output=base"), "base"),
        (
            ("lora", "merge", "--models=a,b", "--svd=full"),
            "--svd is not of",
        ),
        (
            ("lora", "extract", "--base=base", "--model=n", "--rank=1", "--output=o"),
            "'model.norm.weight' is missing in base",
        ),
    ],
)
def test_one_line_says_what_is_wrong(
    arguments: tuple[str, ...], message: str, three: dict[str, np.ndarray], run: Run
) -> None:
    write(Path("n"), {"model.norm.weight": np.ones(3, np.float32)}, {})
    ran = run(*arguments)
    assert ran.code in (2, 3)
    assert message in ran.err
    assert "Traceback" not in ran.err
    assert not Path("o").exists()


def test_core_holds_adapters_exactly_whatever_their_ranks() -> None:
    generator = np.random.default_rng(0)
    pairs = [
        factors.Pair(generator.normal(size=(r, 5)), generator.normal(size=(4, r)))
        for r in (1, 3, 6)  # more together than the matrix has
    ]
    space = factors.core(pairs, [1.0, 2.0, -1.0])
    for own, scaling, core in zip(pairs, [1.0, 2.0, -1.0], space.cores, strict=True):
        np.testing.assert_allclose(space.u @ core @ space.vt, scaling * own.dense)
