"""`m3jax measure`: Fisher and Gram against torch, similarity against NumPy."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import checkpoints
import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny_models
import tiny_tokenizer

import m3jax
from m3jax.checkpoints.errors import CheckpointError
from m3jax.evaluation.tasks.task import TaskError, load_tasks
from m3jax.measuring.accumulate import Accumulation, accumulate
from m3jax.measuring.statistics import measure_fisher, measure_gram
from m3jax.measuring.texts import batches, questions

FAMILY = "one_layer"
TEXTS = [("2+2=", "4"), ("what?", "no")]
TASKS = {
    "ask": {"kind": "exact_match", "prompt": "{q}", "answer": "{a}"},
    "pick": {
        "kind": "choice",
        "prompt": "{q} or",
        "choices": ["yes", "no way"],
        "answer": "B",
        "normalise": "tokens",
    },
    "find": {"kind": "regex", "prompt": "{q}", "pattern": "a"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models `model` and `other`, and a JSON file for each of TASKS."""
    folder = tmp_path_factory.mktemp("measured")
    for seed, name in enumerate(("model", "other")):
        checkpoints.write(
            folder / name,
            tiny_models.tensors(FAMILY, seed),
            tiny_models.config_dict(FAMILY),
        )
        tiny_tokenizer.write(folder / name)
    lines = [json.dumps({"q": q, "a": a}) for q, a in TEXTS]
    (folder / "data.jsonl").write_text("\n".join(lines))
    for name, spec in TASKS.items():
        own = {"name": name, "data": "data.jsonl", **spec}
        (folder / f"{name}.json").write_text(json.dumps(own))
    return folder


def written(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "model.safetensors")


def fisher(folder: Path, task: str, output: Path, **options: Any) -> Any:
    tasks = load_tasks(folder / f"{task}.json")
    return written(measure_fisher(str(folder / "model"), tasks, output, **options))


@functools.cache
def encoded(text: str) -> list[int]:
    return tiny_tokenizer.Characters().encode(text, add_special_tokens=False)


class Torch:
    """The same model in torch, and squares of its gradients."""

    def __init__(self) -> None:
        self.torch = pytest.importorskip("torch")
        self.model = tiny_models.reference(FAMILY)

    def log_probabilities(self, prompt: str, answer: str) -> Any:
        """log p of all words at each token of the answer, and the answer's tokens."""
        before, after = [0, *encoded(prompt)], encoded(answer)
        logits = self.model(self.torch.tensor([before + after])).logits[0]
        own = self.torch.log_softmax(logits, -1)[len(before) - 1 : -1]
        return own, after

    def squares(self, score: Any) -> dict[str, np.ndarray]:
        self.model.zero_grad()
        score.backward(retain_graph=True)
        return {
            name: np.asarray(parameter.grad.detach().numpy(), np.float64) ** 2
            for name, parameter in self.model.named_parameters()
        }


def close(found: Any, parts: list[tuple[float, Any]], count: int) -> None:
    """`found` is Σ share · squares / count."""
    for name, tensor in found.items():
        wanted = sum(share * squares[name] for share, squares in parts) / count
        assert tensor.dtype == np.float32
        np.testing.assert_allclose(
            tensor, wanted, rtol=2e-3, atol=1e-5 * np.abs(wanted).max(), err_msg=name
        )


def test_exact_fisher_of_tokens_is_the_expectation_over_the_vocabulary(
    folder, tmp_path
):
    torch, parts = Torch(), []
    for prompt, answer in TEXTS:
        own, _ = torch.log_probabilities(prompt, answer)
        for position in own:
            for score in position:
                parts.append((float(score.detach().exp()), torch.squares(score)))
    found = fisher(folder, "ask", tmp_path / "fisher", kind="exact")
    close(found, parts, len(TEXTS))
    drawn = fisher(folder, "ask", tmp_path / "drawn", kind="sampled", samples=60)
    total, wanted = (sum(float(x.sum()) for x in f.values()) for f in (drawn, found))
    assert total == pytest.approx(wanted, rel=0.3)


def test_empirical_fisher_is_the_square_of_each_examples_gradient(folder, tmp_path):
    torch, parts = Torch(), []
    for prompt, answer in TEXTS:
        own, tokens = torch.log_probabilities(prompt, answer)
        score = sum(
            position[token] for position, token in zip(own, tokens, strict=True)
        )
        parts.append((1.0, torch.squares(score)))
    found = fisher(folder, "ask", tmp_path / "fisher", kind="empirical")
    close(found, parts, len(TEXTS))
    # Batches change nothing, nor how many gradients are held at a time.
    small = fisher(
        folder, "ask", tmp_path / "small", kind="empirical", tokens_per_batch=16
    )
    for name, tensor in found.items():
        np.testing.assert_allclose(small[name], tensor, rtol=1e-4, atol=1e-9)


def test_fisher_of_a_choice_has_the_choices_as_classes(folder, tmp_path):
    torch, parts, right = Torch(), [], []
    for prompt, _ in TEXTS:
        scores = []
        for choice in TASKS["pick"]["choices"]:
            own, tokens = torch.log_probabilities(f"{prompt} or", choice)
            each = [p[t] for p, t in zip(own, tokens, strict=True)]
            scores.append(sum(each) / len(each))
        shares = torch.torch.softmax(torch.torch.stack(scores), 0).tolist()
        squares = [torch.squares(score) for score in scores]
        parts += zip(shares, squares, strict=True)
        right.append((1.0, squares[1]))
    found = fisher(folder, "pick", tmp_path / "exact", kind="exact")
    close(found, parts, len(TEXTS))
    found = fisher(folder, "pick", tmp_path / "empirical", kind="empirical")
    close(found, right, len(TEXTS))


def test_gram_is_the_second_moment_of_the_linear_layers_inputs(folder, tmp_path):
    torch = Torch()
    seen: dict[str, list[np.ndarray]] = {}
    hooks = [
        module.register_forward_hook(
            lambda own, inputs, output, name=name: seen.setdefault(name, []).append(
                inputs[0].detach().numpy()[0].astype(np.float64)
            )
        )
        for name, module in torch.model.named_modules()
        if isinstance(module, torch.torch.nn.Linear)
    ]
    for prompt, answer in TEXTS:
        torch.log_probabilities(prompt, answer)
    for hook in hooks:
        hook.remove()
    tasks = load_tasks(folder / "ask.json")
    found = written(measure_gram(str(folder / "model"), tasks, tmp_path / "gram"))
    # A tied head is an embedding, too.
    assert {f"{name}.weight" for name in seen} - {"lm_head.weight"} == set(found)
    for name, gram in found.items():
        rows = np.concatenate(seen[name.removesuffix(".weight")])
        wanted = rows.T @ rows / len(rows)
        assert gram.dtype == np.float32
        np.testing.assert_allclose(
            gram, wanted, rtol=1e-3, atol=1e-5 * np.abs(wanted).max(), err_msg=name
        )


def test_merging_takes_what_was_measured(run, folder, tmp_path):
    models = [folder / "model", folder / "other"]
    for method, what, kind in (
        ("fisher", "fisher", ["--kind=empirical"]),
        ("regmean", "gram", []),
    ):
        outputs = []
        for model in models:
            outputs.append(tmp_path / f"{method}-{model.name}")
            ran = run(
                *("measure", what, model, f"--tasks={folder}/ask.json", *kind),
                f"--output={outputs[-1]}",
            )
            assert ran.code == 0, ran.err
            record = json.loads((outputs[-1] / "measured.json").read_text())
            assert record["measured"] == what
            assert record["examples"] == len(TEXTS)
        merged = tmp_path / method
        ran = run(
            *("merge", f"--models={models[0]},{models[1]}", f"--output={merged}"),
            f"--statistics={outputs[0]},{outputs[1]}",
            *(f"--config.method={method}", "--config.mixup.alpha=None"),
        )
        assert ran.code == 0, ran.err
        recipe = m3jax.Recipe(method=method, mixup=m3jax.Mixup(alpha=None))
        expected = m3jax.merge_params(
            None,
            [m3jax.load(model) for model in models],
            recipe,
            0,
            statistics=[m3jax.load(output) for output in outputs],
        )
        jax.tree.map(np.testing.assert_array_equal, m3jax.load(merged), expected)


def test_statistics_of_the_wrong_kind_are_refused(run, folder, tmp_path):
    tensors = tiny_models.tensors(FAMILY)
    fisher = checkpoints.write(tmp_path / "fisher", tensors, {})
    name = next(n for n in tensors if "mlp.up" in n)
    inputs = tensors[name].shape[1]
    small = {name: np.eye(inputs, dtype=np.float32)}
    gram = checkpoints.write(tmp_path / "gram", small, {})
    for method, given, wanted in (
        ("regmean", fisher, f"regmean needs [{inputs}, {inputs}]"),
        ("lot", fisher, f"lot needs [{inputs}, {inputs}]"),
        ("fisher", gram, f"fisher needs {list(tensors[name].shape)}"),
    ):
        ran = run(
            *("merge", f"--models={folder}/model", f"--base={folder}/other"),
            *(f"--statistics={given}", f"--output={tmp_path}/no"),
            *(f"--config.method={method}", "--config.mixup.alpha=None", "--dry_run"),
        )
        assert ran.code == 3
        assert wanted in ran.out


@pytest.mark.parametrize("stopped", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_measurement_goes_on_to_the_same_bytes(
    folder, tmp_path, stopped, monkeypatch
):
    def parts(inputs: str) -> Accumulation[np.ndarray]:
        return Accumulation(
            start=lambda: {"sum": jax.numpy.zeros(3)},
            add=lambda state, batch: {"sum": state["sum"] * 1.1 + batch},
            batches=[np.full(3, i, np.float32) for i in range(5)],
            count=lambda batch: 1,
            finish=lambda state: state,
            record={"measured": "sums"},
            inputs=inputs,
        )

    whole = accumulate(parts("a"), tmp_path / "whole")
    cut, calls = parts("a"), []

    def add(state: Any, batch: Any) -> Any:
        calls.append(batch)
        if len(calls) == 4:
            raise stopped("enough")
        return {"sum": state["sum"] * 1.1 + batch}

    cut.add = add
    with pytest.raises(stopped) as error:
        accumulate(cut, tmp_path / "cut")
    assert "--resume" in error.value.__notes__[0]
    assert not (tmp_path / "cut").exists()
    with pytest.raises(CheckpointError, match="another measurement"):
        accumulate(parts("b"), tmp_path / "cut", resume=True)
    rest = parts("a")
    rest.start = lambda: pytest.fail("it began anew")
    resumed = accumulate(rest, tmp_path / "cut", resume=True)
    for name in ("model.safetensors", "measured.json"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()
    assert sorted(p.name for p in resumed.iterdir()) == [
        "measured.json",
        "model.safetensors",
    ]


def test_what_cannot_be_measured_is_said_in_a_line(run, folder, tmp_path):
    model = folder / "model"
    with pytest.raises(TaskError, match="kind regex does not say"):
        measure_gram(str(model), load_tasks(folder / "find.json"), tmp_path / "no")
    tasks = f"--tasks={folder}/ask.json"
    for arguments, said in (
        ((), "needs one of fisher, gram, similarity"),
        (("fish", model), "needs one of fisher"),
        (("fisher", tasks), "needs one model, not 0"),
        (("fisher", model), "needs --tasks"),
        (("gram", model, tasks, "--kind=exact"), "--kind is not for gram"),
        (("fisher", model, tasks, "--samples=0"), "--samples=0 needs 1"),
        (("similarity", model), "needs two models or more, not 1"),
        (("similarity", model, model, tasks), "--tasks is not for similarity"),
    ):
        ran = run("measure", *arguments)
        assert ran.code == 2
        assert said in ran.error
    output = f"--output={tmp_path}/taken"
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    ran = run("measure", "gram", model, tasks, output)
    assert ran.code == 3
    assert "choose another --output" in ran.error
    gpt2 = tmp_path / "gpt2"
    checkpoints.write(
        gpt2, tiny_models.tensors("gpt2"), tiny_models.config_dict("gpt2")
    )
    tiny_tokenizer.write(gpt2)
    ran = run("measure", "gram", gpt2, tasks)
    assert ran.code == 3
    assert "gpt2 stores its linear weights (in, out)" in ran.error


def test_texts_carry_each_answer_once_and_padding_counts_nothing(folder):
    asked = questions(
        load_tasks(folder / "ask.json") + load_tasks(folder / "pick.json"),
        tiny_tokenizer.Characters(),
        64,
        None,
    )
    planned = batches(asked, 64)
    index = np.concatenate([batch.index for batch in planned])
    assert sorted(index[index >= 0].tolist()) == list(range(2 * len(TEXTS)))
    for batch in planned:
        for row, i in enumerate(batch.index.tolist()):
            counted = batch.weights[row].sum(-1)
            if i < 0:
                assert not counted.any()
                assert not batch.valid[row].any()
            elif asked[i].is_choice:
                np.testing.assert_allclose(counted, 1, rtol=1e-6)
            else:
                assert counted == len(asked[i].item.completions[0])


def test_similarity_is_that_of_the_flat_vectors(run, folder, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "similar.png"
    models = [folder / "model", folder / "other"]
    base = tiny_models.tensors(FAMILY, 2)
    checkpoints.write(tmp_path / "base", base, tiny_models.config_dict(FAMILY))
    ran = run(
        *("measure", "similarity", *models, f"--base={tmp_path}/base"),
        *("--json", f"--plot={picture}"),
    )
    assert ran.code == 0, ran.err
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(ran.out)
    assert found["models"] == [str(model) for model in models]
    a, b = (tiny_models.tensors(FAMILY, seed) for seed in range(2))

    def check(entry: Any, names: list[str], start: Any) -> None:
        x, y = (
            np.concatenate([(m[n].astype(float) - start(n)).reshape(-1) for n in names])
            for m in (a, b)
        )
        norms = np.linalg.norm(x), np.linalg.norm(y)
        assert entry["elements"] == x.size
        assert entry["norms"] == pytest.approx(norms)
        assert entry["cosine"][0][1] == pytest.approx(x @ y / np.prod(norms))
        both = (x != 0) & (y != 0)
        agreed = np.sign(x) == np.sign(y)
        assert entry["sign_agreement"][1][0] == pytest.approx(agreed[both].mean())

    for of, start in (("parameters", lambda n: 0.0), ("task_vectors", base.get)):
        check(found[of]["whole"], sorted(a), start)
        inner = [n for n in a if n.startswith("model.layers.0.")]
        check(found[of]["layers"]["model.layers.0"], inner, start)
        for name, entry in found[of]["tensors"].items():
            check(entry, [name], start)


def test_similarity_says_what_it_leaves_out(run, folder, tmp_path):
    model = {"a.weight": np.ones((2, 3), np.float32), "ids": np.arange(3)}
    other = {"a.weight": np.zeros((2, 3), np.float32), "b": np.ones(2, np.float32)}
    for name, tensors in (("one", model), ("two", other)):
        checkpoints.write(tmp_path / name, tensors, {})
    ran = run("measure", "similarity", tmp_path / "one", tmp_path / "two")
    assert ran.code == 0, ran.err
    assert "—" in ran.out  # a cosine with zeros
    assert "note: 1 tensor left out, 'b': not in all models" in ran.out
    ran = run("measure", "similarity", tmp_path / "one", folder / "model")
    assert ran.code == 3
    assert "no tensor of floats of one name" in ran.error
