"""lm-evaluation-harness with our model, against the same with its own HF backend."""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

import checkpoints
import pytest
import tiny_models
import tiny_tokenizer

from m3jax.evaluation.evaluator import TaskEvaluator
from m3jax.evaluation.tasks.task import load_tasks
from m3jax.models.tokenizer import Tokenizer

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("lm_eval.tasks")
hf_backend = pytest.importorskip("lm_eval.models.huggingface", exc_type=ImportError)
harness = pytest.importorskip("m3jax.evaluation.harness.model")

# The harness and what it imports warn of their own affairs.
pytestmark = pytest.mark.filterwarnings("ignore")

FAMILY = "one_layer"
WORDS = ["a", "to be ", "what is 2+2?", "seven words in a row, and more", "x=1"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.write(folder)
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def ours(tokenizer):
    config, parameters = tiny_models.config(FAMILY), tiny_models.parameters(FAMILY)
    return harness.HarnessModel(parameters, config, tokenizer, tokens_per_batch=64)


@pytest.fixture(scope="module")
def theirs(tokenizer):
    model = copy.deepcopy(tiny_models.reference(FAMILY))
    model.generation_config.eos_token_id = tokenizer.stop_tokens[0]
    return hf_backend.HFLM(
        pretrained=model, tokenizer=tokenizer.transformers, batch_size=2
    )


def _requests(kind: str, *arguments: Any) -> list[Any]:
    make = lm_eval.api.instance.Instance
    return [make(kind, {}, args, i) for i, args in enumerate(arguments)]


def test_loglikelihood(ours, theirs):
    pairs = [(word, f" {word[::-1]}") for word in WORDS]
    pairs += [("", "alone"), ("a" * 70, "cut off")]  # the model takes 64
    requests = _requests("loglikelihood", *pairs)
    expected = theirs.loglikelihood(requests)
    for found, wanted in zip(ours.loglikelihood(requests), expected, strict=True):
        assert found[0] == pytest.approx(wanted[0], abs=1e-4)
        assert found[1] == bool(wanted[1])


def test_loglikelihood_rolling(ours, theirs):
    requests = _requests("loglikelihood_rolling", *[(w,) for w in [*WORDS, "ab" * 90]])
    expected = theirs.loglikelihood_rolling(requests)
    assert ours.loglikelihood_rolling(requests) == pytest.approx(expected, abs=1e-3)


def test_generate_until(ours, theirs):
    short, long = {"until": ["q", "7"], "max_gen_toks": 12}, {"max_gen_toks": 16}
    settings = [short, long, short, long, short]
    requests = _requests("generate_until", *zip(WORDS, settings, strict=True))
    found = ours.generate_until(requests)
    assert found == theirs.generate_until(requests)
    assert len(set(found)) > 2


def test_settings_that_are_not_supported_are_refused(ours):
    request = _requests("generate_until", ("a", {"num_beams": 4}))
    with pytest.raises(ValueError, match="num_beams"):
        ours.generate_until(request)


def test_what_is_an_answer():
    answer = pytest.importorskip("m3jax.evaluation.harness.evaluator")._answer
    assert answer(["42"]) == "42"
    assert answer([(-2.5, False), (-1.5, False), (-3.0, True)]) == 1
    assert answer([(-2.5, True)]) is None  # a log-likelihood alone
    assert answer([(-2.5,)]) is None


def test_local_tasks_and_our_own_scores(ours, theirs, tokenizer, tmp_path, monkeypatch):
    """A whole evaluation by the harness; our tasks give the same numbers."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    records = [
        {"q": f"{word}?", "options": ["yes", "no way", word[::-1]], "label": i % 3}
        for i, word in enumerate(WORDS * 3)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data)},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    scores = []
    # The index of the harness's own tasks takes ten seconds to read.
    manager = lm_eval.tasks.TaskManager(include_defaults=False)
    for lm in (ours, theirs):
        found = lm_eval.simple_evaluate(
            lm, tasks=[task], task_manager=manager, bootstrap_iters=0
        )
        scores.append(found["results"]["local"])
    for metric in ("acc,none", "acc_norm,none"):
        assert scores[0][metric] == scores[1][metric]
    for normalise, metric in (("none", "acc,none"), ("bytes", "acc_norm,none")):
        spec = {
            "name": "local",
            "kind": "choice",
            "data": "data.jsonl",
            "prompt": "{q}",
            "choices": "{options}",
            "answer": "{label}",
            "delimiter": " ",
            "normalise": normalise,
        }
        (tmp_path / "spec.json").write_text(json.dumps(spec))
        evaluator = TaskEvaluator(
            load_tasks(tmp_path / "spec.json"), tiny_models.config(FAMILY), tokenizer
        )
        (result,) = evaluator.evaluate(tiny_models.parameters(FAMILY))
        assert result.mean == pytest.approx(scores[1][metric])
        assert 0 < result.mean < 1


def test_our_loss_is_the_harness_log_likelihood(theirs, tokenizer, tmp_path):
    records = [{"q": word, "a": f" {word[::-1]}"} for word in WORDS]
    data = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "data.jsonl").write_text(data)
    spec = {"name": "loss", "kind": "loss", "data": "data.jsonl"}
    spec |= {"prompt": "{q}", "completion": "{a}"}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    (result,) = TaskEvaluator(
        load_tasks(tmp_path / "spec.json"), tiny_models.config(FAMILY), tokenizer
    ).evaluate(tiny_models.parameters(FAMILY))
    pairs = [(record["q"], record["a"]) for record in records]
    expected = theirs.loglikelihood(_requests("loglikelihood", *pairs))
    found = [record["log_likelihood"] for record in result.records]
    assert found == pytest.approx([score for score, _ in expected], abs=1e-4)


TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    train: {data}
    test: {data}
test_split: test
fewshot_split: train
output_type: {kind}
doc_to_text: "{{{{q}}}}"
doc_to_target: "{target}"
metric_list:
  - metric: {metric}
"""
CHOICE = 'doc_to_choice: "{{options}}"\nnum_fewshot: 2\n'
WRITTEN = "generation_kwargs:\n  until: ['q']\n  max_gen_toks: 6\n"


@pytest.fixture
def local_tasks(tmp_path, monkeypatch):
    """A folder of YAML tasks: of choices, and of text that is written."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    records = [
        {"q": f"{word}?", "options": ["yes", "no way"], "label": i % 2, "a": "?"}
        for i, word in enumerate(WORDS * 3)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    folder = tmp_path / "yaml"
    folder.mkdir()
    choice = {"name": "m3_choice", "kind": "multiple_choice"}
    choice |= {"target": "label", "metric": "acc"}
    written = {"name": "m3_written", "kind": "generate_until"}
    written |= {"target": "{{a}}", "metric": "exact_match"}
    for fields, more in ((choice, CHOICE), (written, WRITTEN)):
        text = TASK.format(data=data, **fields) + more
        (folder / f"{fields['name']}.yaml").write_text(text)
    return folder


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    tensors, config = tiny_models.tensors(FAMILY), tiny_models.config_dict(FAMILY)
    checkpoints.write(folder, tensors, config)
    tiny_tokenizer.write(folder)
    return folder


def test_the_command_runs_tasks_by_name(run, theirs, model, local_tasks, tmp_path):
    names = ["m3_choice", "m3_written"]
    output = tmp_path / "records.jsonl"
    ran = run(
        *("evaluate", model, f"--tasks={','.join(names)}", "--json", "--seed=3"),
        *(f"--harness_tasks_path={local_tasks}", "--limit=12", f"--output={output}"),
    )
    assert ran.code == 0, ran.err
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed")
    expected = lm_eval.simple_evaluate(
        theirs,
        tasks=names,
        task_manager=lm_eval.tasks.TaskManager(
            include_path=str(local_tasks), include_defaults=False
        ),
        limit=12,
        bootstrap_iters=0,
        fewshot_random_seed=3,
        **dict.fromkeys(seeds, 3),
    )["results"]
    found = json.loads(ran.out[ran.out.index("[") :])
    assert [(e["task"], e["metric"], e["n"]) for e in found] == [
        ("m3_choice", "acc", 12),
        ("m3_written", "exact_match", 12),
    ]
    assert found[0]["mean"] == pytest.approx(expected["m3_choice"]["acc,none"])
    assert 0 < found[0]["mean"] < 1
    wanted = expected["m3_written"]["exact_match,none"]
    assert found[1]["mean"] == pytest.approx(wanted)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["task"] for record in records] == ["m3_choice"] * 12 + [
        "m3_written"
    ] * 12
    assert sum(r["acc"] for r in records[:12]) / 12 == pytest.approx(found[0]["mean"])


def test_a_name_that_the_harness_does_not_know(run, model, local_tasks, monkeypatch):
    tasks = pytest.importorskip("m3jax.evaluation.harness.tasks")
    known = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", known)
    ran = run(
        "evaluate", model, "--tasks=m3_choic", f"--harness_tasks_path={local_tasks}"
    )
    assert ran.code == 2
    assert "did you mean m3_choice?" in ran.error
