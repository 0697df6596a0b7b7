"""mergekit's YAML around the methods: slices, modules, documents, and our own key."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import yaml
from command_line import Run

import m3jax
from m3jax.recipe import mergekit, mergekit_writer

GOLDEN = Path(__file__).parent / "golden_mergekit"
LAYERS = 4


def _model(seed: int, prefix: str = "model.", layers: int = LAYERS) -> Any:
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}embed_tokens.weight": (6, 4)}
    for i in range(layers):
        shapes |= {
            f"{prefix}layers.{i}.attn.weight": (4, 4),
            f"{prefix}layers.{i}.norm.weight": (4,),
        }
    return checkpoints.random_model(seed, {**shapes, f"{prefix}norm.weight": (4,)})


def _write(folder: Path, seed: int, config: Any = None, **shape: Any) -> Any:
    tensors = _model(seed, **shape)
    checkpoints.write(folder, tensors)
    config = {"num_hidden_layers": LAYERS} if config is None else config
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def _merge(run: Run, folder: Path, text: str, *flags: str, code: int = 0) -> Any:
    (folder / "own.yml").write_text(text)
    output = folder / "out"
    ran = run(
        "merge",
        f"--config={folder / 'own.yml'}",
        f"--output={output}",
        "--nofsync",
        *flags,
    )
    assert ran.code == code, ran.err
    return ran if code else checkpoints.read(output)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


STACK = """
merge_method: passthrough
slices:
- sources: [{model: a, layer_range: [1, 4]}]
- sources: [{model: b, layer_range: [0, 2]}]
"""


def test_lists_by_layer_follow_the_slices(tmp_path: Path, run: Run) -> None:
    config = {
        "num_hidden_layers": 4,
        "layer_types": ["full", "sliding", "linear", "full"],
        "mlp_only_layers": [1, 3],
        "architectures": ["A", "B", "C", "D"],
        "eos_token_id": [1, 2, 3, 4],
        "sliding_window_pattern": 2,
        "decoder_sparse_step": 2,
    }
    _write(tmp_path / "a", 0, config)
    _write(tmp_path / "b", 1, {**config, "layer_types": list("pqrs")})
    (tmp_path / "own.yml").write_text(STACK)
    ran = run("merge", "--config=own.yml", "--output=out", "--nofsync")
    assert ran.code == 0, ran.err
    assert "decoder_sparse_step=2 counts layers, and stays" in ran.err
    assert "sliding_window_pattern" not in ran.err  # layer_types has the last word
    made = json.loads(Path("out/config.json").read_text())
    assert made["num_hidden_layers"] == 5
    assert made["layer_types"] == ["sliding", "linear", "full", "p", "q"]
    assert made["mlp_only_layers"] == [0, 2, 4]
    assert made["architectures"] == list("ABCD") and len(made["eos_token_id"]) == 4


def test_layers_of_a_nested_text_config(tmp_path: Path, run: Run) -> None:
    config = {"text_config": {"num_hidden_layers": 4, "layer_types": list("abcd")}}
    _write(tmp_path / "a", 0, config)
    _write(tmp_path / "b", 1, config)
    _merge(run, tmp_path, STACK)
    made = json.loads(Path("out/config.json").read_text())["text_config"]
    assert made == {"num_hidden_layers": 5, "layer_types": list("bcdab")}


def test_words_may_differ_between_slices(tmp_path: Path, run: Run) -> None:
    a, b = _write(tmp_path / "a", 0), _write(tmp_path / "b", 1)
    text = """
merge_method: model_stock
base_model: base
slices:
- sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [2, 3]}]
  parameters: {filter_wise: true}
- sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 1]}]
"""
    base = _write(tmp_path / "base", 2)
    refused = _merge(run, tmp_path, text, code=2)
    assert "base_model base is no source of a slice" in refused.error
    text = text.replace(
        "{model: b, layer", "{model: base, layer_range: [0, 1]}, {model: b, layer"
    )
    got = _merge(run, tmp_path, text)
    for i, (j, by_row) in enumerate([(2, True), (0, False)]):
        name = "model.layers.{}.attn.weight".format
        trees = [{"w": own[name(n)]} for own, n in ((base, 0), (a, 0), (b, j))]
        method = m3jax.ModelStock(by_row=by_row)
        recipe = m3jax.Recipe(method=method, mixup=m3jax.Mixup(alpha=None))
        wanted = m3jax.merge_params(trees[0], trees[1:], recipe)["w"]
        assert got[name(i)].tobytes() == np.asarray(wanted).tobytes()


def test_filters_of_words(tmp_path: Path, run: Run) -> None:
    """A tensor has the word of the first filter in its name, in slices too."""
    for i, name in enumerate(("base", "a", "b")):
        _write(tmp_path / name, i)
    for head, sources in (("models:\n", ""), ("slices:\n", "layer_range: [0, 4]")):
        entries = [f"{{model: {own}, {sources}}}" for own in ("base", "a", "b")]
        listed = "".join(f"- {own}\n" for own in entries)
        if sources:
            listed = f"- sources: [{', '.join(entries)}]\n"
        text = f"merge_method: model_stock\nbase_model: base\n{head}{listed}"
        found = {}
        rules = "[{filter: attn, value: true}, {value: false}]"
        for word in ("true", "false", rules):
            own = f"{text}parameters: {{filter_wise: {word}}}\n"
            found[word] = _merge(run, tmp_path, own, "--overwrite")
        for name, own in found[rules].items():
            wanted = found["true" if "attn" in name else "false"][name]
            assert own.tobytes() == wanted.tobytes(), name
            assert "attn" not in name or not np.array_equal(own, found["false"][name])


def test_gradients_of_booleans_go_by_steps(tmp_path: Path, run: Run) -> None:
    """As mergekit 0.1.5 has it: each holds up to the next one; the first outside."""
    a, b = _write(tmp_path / "a", 0), _write(tmp_path / "b", 1)
    text = "merge_method: linear\nmodels: [{model: a}, {model: b}]\n"
    for points, layers in (
        ([False, True], [0, 0, 0, 1]),
        ([True, False, True], [1, 1, 0, 1]),
        ([1, 1, 0, 0, 1], [1, 1, 0, 1]),
    ):
        shared = f"parameters: {{weight: 1, normalize: {points}}}\n"
        got = _merge(run, tmp_path, text + shared.lower(), "--overwrite")
        for name, own in got.items():
            layer = re.search(r"layers\.(\d)", name)
            halved = layers[int(layer[1])] if layer else points[0]
            wanted = (a[name] + b[name]) / (2 if halved else 1)
            np.testing.assert_allclose(own, wanted, atol=1e-6, err_msg=name)
    refused = "parameters: {weight: 1, normalize: [0.3, 1]}\n"
    ran = _merge(run, tmp_path, text + refused, "--overwrite", code=2)
    assert "normalize=0.3 needs true or false" in ran.error


def test_keys_without_an_effect() -> None:
    """Those that mergekit reads, and that nothing here depends on."""
    model = "{model: {path: a, revision: main}, override_architecture: BertModel}"
    text = f"""
merge_method: passthrough
slices:
- sources: [{{model: {model}, layer_range: [0, 1]}}]
  residual_weight: 0.25
"""
    found = mergekit.parse(text)
    assert found.result.models == ("a@main",)
    wanted = "passthrough has no parameter 'residual_weight' there: no effect"
    assert found.notes == (f"parameters: {wanted}",)


def test_slices_refuse_what_is_not_there(tmp_path: Path, run: Run) -> None:
    _write(tmp_path / "a", 0)
    _write(tmp_path / "b", 1)
    ran = _merge(run, tmp_path, STACK.replace("[0, 2]", "[0, 5]"), code=3)
    assert "layer_range [0, 5]: b has 4 layers" in ran.error
    two = {**_model(0), **_model(1, "vision_tower.")}
    shutil.rmtree(tmp_path / "b")
    checkpoints.write(tmp_path / "b", two)
    ran = _merge(run, tmp_path, STACK, code=3)
    assert "b: has layers in 'model.layers', 'vision_tower.layers'" in ran.error
    assert not Path("out").exists()


def test_models_of_other_slices_do_not_count(tmp_path: Path, run: Run) -> None:
    """A slice of one model beside one of two: as if it were merged alone."""
    a, b = _write(tmp_path / "a", 0), _write(tmp_path / "b", 1)
    text = """
merge_method: linear
slices:
- sources: [{model: a, layer_range: [0, 2], parameters: {weight: 0.7}}]
- sources:
  - {model: a, layer_range: [2, 4], parameters: {weight: 1}}
  - {model: b, layer_range: [2, 4], parameters: {weight: 3}}
"""
    got = _merge(run, tmp_path, text)
    for name in a:
        front = "embed" in name or re.search(r"layers\.[01]\.", name)
        wanted = a[name] if front else a[name] / 4 + b[name] * 3 / 4
        np.testing.assert_allclose(got[name], wanted, atol=1e-6)
    ran = _merge(run, tmp_path, text.replace("linear", "karcher"), code=2)
    assert "a slice of 1 models beside one of 2" in ran.error


def test_modules_have_parameters_of_their_own(tmp_path: Path, run: Run) -> None:
    trees = []
    for i, name in enumerate(("a", "b")):
        tensors = {
            **_model(i, "language_model.model."),
            **_model(i + 5, "vision_tower.", 3),
            "multi_modal_projector.weight": np.full((2, 2), i, np.float32),
        }
        checkpoints.write(tmp_path / name, tensors)
        trees.append(tensors)
    text = """
merge_method: linear
modules:
  text_decoder:
    models: [{model: a}, {model: b, parameters: {weight: [0, 1]}}]
    parameters: {weight: 1}
  vision_tower:
    models: [{model: a, parameters: {weight: 1}}]
parameters: {normalize: false}
"""
    got = _merge(run, tmp_path, text)
    a, b = trees
    for name in a:
        wanted = a[name]
        if "vision" not in name:
            layer = re.search(r"layers\.(\d)", name)
            wanted = a[name] + b[name] * (int(layer[1]) / 3 if layer else 0)
        if "projector" not in name:  # of no module: it goes with the last
            np.testing.assert_allclose(got[name], wanted, atol=1e-6, err_msg=name)
    assert np.array_equal(got["multi_modal_projector.weight"], np.zeros((2, 2)))


CHAIN = """
name: first
merge_method: linear
models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]
---
merge_method: linear
models: [{model: first, parameters: {weight: 1}}, {model: c, parameters: {weight: 1}}]
---
name: unused
merge_method: linear
models: [{model: nowhere, parameters: {weight: 1}}]
"""


def test_documents_stay_and_are_taken_again(tmp_path: Path, run: Run) -> None:
    a, b, c = (_write(tmp_path / name, i) for i, name in enumerate("abc"))
    got = _merge(run, tmp_path, CHAIN)
    for name in a:
        wanted = ((a[name] + b[name]) / 2 + c[name]) / 2
        np.testing.assert_allclose(got[name], wanted, atol=1e-6)
    first = Path("out.documents/first/model.safetensors")
    made = first.stat().st_mtime_ns
    again = run("merge", "--config=own.yml", "--output=out", "--overwrite")
    assert "first: finished before, and kept" in again.err
    assert "unused: no document needs it" in again.err
    assert first.stat().st_mtime_ns == made
    shutil.rmtree(tmp_path / "a")
    _write(tmp_path / "a", 7)
    run("merge", "--config=own.yml", "--output=out", "--overwrite")
    assert first.stat().st_mtime_ns != made


def test_a_record_makes_the_documents_again(tmp_path: Path, run: Run) -> None:
    for i, name in enumerate("abc"):
        _write(tmp_path / name, i)
    got = _merge(run, tmp_path, CHAIN, "--seed=5")
    shutil.rmtree("out.documents")
    ran = run("merge", "--config=out/m3jax.json", "--output=again")
    assert ran.code == 0, ran.err
    again = checkpoints.read(Path("again"))
    assert all(own.tobytes() == again[name].tobytes() for name, own in got.items())
    assert run("verify", "out").code == 0


def test_where_all_documents_have_names(tmp_path: Path, run: Run) -> None:
    """The output is the one that no other needs."""
    for i, name in enumerate("abc"):
        _write(tmp_path / name, i)
    got = _merge(run, tmp_path, CHAIN)
    named = CHAIN.replace("---\nmerge", "---\nname: last\nmerge").split("---\nname: u")
    Path("own.yml").write_text(named[0])
    ran = run("merge", "--config=own.yml", "--output=named")
    assert "last: no other document needs it, and it is the output" in ran.err
    again = checkpoints.read(Path("named"))
    assert all(own.tobytes() == again[name].tobytes() for name, own in got.items())


def test_a_dry_run_plans_every_document(tmp_path: Path, run: Run) -> None:
    """Also those whose inputs are other documents', which are not there yet."""
    for i, name in enumerate("abc"):
        _write(tmp_path / name, i)
    Path("own.yml").write_text(CHAIN)
    there = sorted(tmp_path.iterdir())
    ran = run("merge", "--config=own.yml", "--output=out", "--dry_run")
    assert ran.code == 0 and sorted(tmp_path.iterdir()) == there
    first, last = ran.out.split("the output: ")
    assert first.startswith("first: linear of a, b\n")
    assert last.startswith("linear of first, c\n")
    for plan, place in ((first, "out.documents/first"), (last, "out")):
        assert "10 (10 merged, 0 copied), 108 elements" in plan
        assert f"{place}, free" in plan
    shutil.rmtree("c")
    _write(tmp_path / "c", 2, layers=3)
    ran = run("merge", "--config=own.yml", "--dry_run")
    assert ran.code == 3 and "is missing in c" in ran.out


def test_documents_draw_apart(tmp_path: Path, run: Run) -> None:
    """Each from a seed of its name, with which it can be merged alone."""
    base = _write(tmp_path / "base", 0)
    checkpoints.write(tmp_path / "a", {name: own + 1 for name, own in base.items()})
    family = FAMILY.replace(", {model: b, parameters: {weight: 0.5, density: 0.5}}", "")
    one = "merge_method: dare_linear\n" + family
    text = f"name: x\n{one}---\nname: y\n{one}---\nmerge_method: linear\nmodels: "
    weighed = "{{model: {}, parameters: {{weight: 1}}}}"
    _merge(run, tmp_path, f"{text}[{weighed.format('x')}, {weighed.format('y')}]")
    name = "model.embed_tokens.weight"
    x, y = (checkpoints.read(Path("out.documents") / own)[name] for own in "xy")
    assert not np.array_equal(x, y)
    (tmp_path / "own.yml").write_text(one)
    seed = int.from_bytes(hashlib.sha256(b"0 y").digest()[:4], "little")
    run("merge", "--config=own.yml", "--output=alone", f"--seed={seed}")
    assert np.array_equal(checkpoints.read(Path("alone"))[name], y)


def test_a_model_that_no_document_makes(tmp_path: Path, run: Run) -> None:
    for i, name in enumerate("ab"):
        _write(tmp_path / name, i)
    ran = _merge(run, tmp_path, CHAIN.replace("model: c", "model: frist"), code=3)
    assert "frist" in ran.error and "there are first" in ran.error
    assert not Path("out").exists() and not Path("out.documents").exists()


FAMILY = (
    "base_model: base\nmodels: [{model: a, parameters: {weight: 1, density: 0.75}}, "
    "{model: b, parameters: {weight: 0.5, density: 0.5}}]\n"
)


def test_thresholds_of_the_whole_model(tmp_path: Path, run: Run) -> None:
    base, a, b = (_write(tmp_path / n, i) for i, n in enumerate(("base", "a", "b")))
    text = "merge_method: ties\nm3jax: {threshold: model}\n" + FAMILY
    got = _merge(run, tmp_path, text)
    taus = []
    for own, weight, density in ((a, 1.0, 0.75), (b, 0.5, 0.5)):
        tau = {name: own[name] - base[name] for name in base}
        sizes = np.sort(np.abs(np.concatenate([t.ravel() for t in tau.values()])))
        low = sizes[len(sizes) - int(density * len(sizes))]
        taus.append({n: weight * np.where(abs(t) >= low, t, 0) for n, t in tau.items()})
    for name in base:
        x = np.stack([tau[name] for tau in taus])
        agree = (x > 0) if np.ndim(x) == 0 else np.where(x.sum(0) >= 0, x > 0, x < 0)
        weights = np.array([1.0, 0.5]).reshape(-1, *[1] * base[name].ndim)
        total = (weights * agree).sum(0)
        wanted = (x * agree).sum(0) / np.where(total > 0, total, 1)
        np.testing.assert_allclose(got[name] - base[name], wanted, atol=1e-6)


def test_the_papers_rescaling(tmp_path: Path, run: Run) -> None:
    base, a, _ = (_write(tmp_path / n, i) for i, n in enumerate(("base", "a", "b")))
    text = "merge_method: dare_linear\nm3jax: {rescaling: rate}\n" + FAMILY
    got = _merge(run, tmp_path, text.replace("weight: 0.5", "weight: 0"))
    name = "model.layers.1.attn.weight"
    change = (got[name] - base[name]) / (a[name] - base[name])
    assert {round(abs(float(own)), 3) for own in change.ravel()} == {0, 1.333}
    with pytest.raises(m3jax.RecipeError, match=r"m3jax.rescaling='rate' needs"):
        mergekit.parse(text.replace("dare_linear", "ties"))


def test_our_methods_by_their_own_names(tmp_path: Path, run: Run) -> None:
    base, a, b = (_write(tmp_path / n, i) for i, n in enumerate(("base", "a", "b")))
    text = "merge_method: tsv_m\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"
    got = _merge(run, tmp_path, text + "parameters: {scaling: 0.5}\ndtype: float32")
    recipe = m3jax.Recipe(method=m3jax.TsvM(scaling=0.5), mixup=m3jax.Mixup(alpha=None))
    wanted = m3jax.merge_params(base, [a, b], recipe)
    assert all(np.allclose(own, wanted[name], atol=1e-6) for name, own in got.items())
    with pytest.raises(m3jax.RecipeError, match="did you mean 'scaling'"):
        mergekit.parse(text + "parameters: {scalling: 0.5}")


def test_weights_that_sum_to_0_are_refused(tmp_path: Path, run: Run) -> None:
    _write(tmp_path / "a", 0)
    _write(tmp_path / "b", 1)
    text = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, "
    ran = _merge(run, tmp_path, text + "{model: b, parameters: {weight: -1}}]", code=3)
    assert "tensor 'model." in ran.error
    assert not Path("out").exists()


def test_della_of_a_row_of_one(tmp_path: Path, run: Run) -> None:
    """A dimension of size 1 has no ranks: its entries are kept with density d."""
    base = {"scale": np.zeros((400, 1), np.float32)}
    checkpoints.write(tmp_path / "base", base)
    checkpoints.write(tmp_path / "a", {"scale": np.ones((400, 1), np.float32)})
    text = "merge_method: della_linear\nbase_model: base\n"
    models = "models: [{model: a, parameters: {weight: 1, density: 0.5}}]\n"
    got = _merge(run, tmp_path, text + models + "parameters: {rescale: false}\n")
    assert 0.4 < (got["scale"] == 1).mean() < 0.6
    assert set(np.unique(got["scale"])) == {0, 1}


def test_integers_are_no_dtype_to_merge_in(tmp_path: Path, run: Run) -> None:
    _write(tmp_path / "a", 0)
    text = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n"
    ran = _merge(run, tmp_path, text + "dtype: int64\n", code=2)
    assert "dtype='int64' needs one of" in ran.error


@pytest.mark.parametrize(
    "name",
    [
        "ties_lambda",
        "filter_gradient_global",
        "multi_chain",
        "slice_base_model",
        "mixed_slices",
        "slice_shifted_filter",
        "nuslerp_task_last",
        "stack_scaled",
        "float64_linear",
        "breadcrumbs_ties_gamma",
        "karcher_tolerance",
    ],
)
def test_converted_and_back(name: str, tmp_path: Path, run: Run) -> None:
    source = GOLDEN / "yaml" / f"{name}.yml"
    there, back = tmp_path / "there.json", tmp_path / "back.yml"
    assert run("convert", source, f"--output={there}").code == 0
    assert run("convert", there, f"--output={back}").code == 0
    first = mergekit.parse(source.read_text())
    again = mergekit.parse(back.read_text())
    assert again.result.recipe.to_dict() == first.result.recipe.to_dict()
    assert again.result.inputs == first.result.inputs
    assert [own.to_dict() for own in again.named] == [
        own.to_dict() for own in first.named
    ]


@pytest.mark.parametrize(
    "recipe, said",
    [
        (m3jax.Recipe(method="average"), "mixup.alpha"),
        (m3jax.Recipe(method="ties", mixup=m3jax.Mixup(alpha=None)), "method=ties"),
        (
            m3jax.Recipe(
                method="task_arithmetic",
                dare=m3jax.Dare(drop_rate=0.2),
                mixup=m3jax.Mixup(alpha=None),
            ),
            "transforms=dare",
        ),
        (
            m3jax.Recipe(
                method=m3jax.Linear(weights=({"gradient": [0, 1]}, 1)),
                mixup=m3jax.Mixup(alpha=None),
            ),
            "linear.weights",
        ),
    ],
)
def test_what_mergekit_cannot_say_is_named(recipe: Any, said: str) -> None:
    from m3jax.recipe.documents import Document

    with pytest.raises(m3jax.RecipeError, match=re.escape(said)):
        mergekit_writer.write([Document("base", ("a", "b"), recipe)])


def test_an_average_is_said_as_linear(tmp_path: Path, run: Run) -> None:
    ran = run(
        "convert",
        "average",
        "--models=a,b",
        "--config.mixup.alpha=None",
        "--config.mixup.ratios=(0.25, 0.75)",
    )
    assert ran.code == 0, ran.err
    assert yaml.safe_load(ran.out) == {
        "merge_method": "linear",
        "models": [
            {"model": "a", "parameters": {"weight": 0.25}},
            {"model": "b", "parameters": {"weight": 0.75}},
        ],
        "parameters": {"normalize": True},
    }
