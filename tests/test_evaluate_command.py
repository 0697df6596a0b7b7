"""`m3jax evaluate`, from a checkpoint's files to a table."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys

import checkpoints
import jax
import pytest
import tiny_models
import tiny_tokenizer

import m3jax
from m3jax.engine.load import load
from m3jax.evaluation.evaluator import TaskEvaluator
from m3jax.evaluation.tasks.task import load_tasks
from m3jax.models.parameters import load_model
from m3jax.models.tokenizer import Tokenizer

FAMILY = "smollm2"
# Short, so that their chats are of one length, in slots, and compile once.
TEXTS = ["is 2+2?", "hello!", "x = [1]", " a  b\n", ""]
GENERATED = {"max_new_tokens": 4, "temperature": 1.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    checkpoints.write(
        folder, tiny_models.tensors(FAMILY), tiny_models.config_dict(FAMILY)
    )
    tiny_tokenizer.write(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 60]}')
    return folder


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    records = [{"q": text, "a": text[:3] or "none"} for text in TEXTS]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "data.jsonl").write_text(lines)
    common = {"data": "data.jsonl", "prompt": "{q}"}
    tasks = [
        {"name": "loss", "kind": "loss", "completion": "{a}", **common},
        {"name": "chat", "kind": "regex", "pattern": "a", **GENERATED, **common}
        | {"chat": True},
    ]
    code = {"name": "code", "kind": "code", "tests": "", **common}
    ask = {"name": "ask", "kind": "choice", "data": "data.jsonl"}
    ask |= {"prompt": "say {q} or", "choices": ["yes", "no way"], "answer": "A"}
    for name, spec in (("tasks", tasks), ("code", code), ("ask", ask)):
        (folder / f"{name}.json").write_text(json.dumps(spec))
    return folder


def test_table_json_and_records(run, model, specs, tmp_path):
    output = tmp_path / "records.jsonl"
    tasks = f"--tasks={specs}/tasks.json"
    ran = run("evaluate", model, tasks, "--json", f"--output={output}")
    assert ran.code == 0
    expected = TaskEvaluator(
        load_tasks(specs / "tasks.json"),
        tiny_models.config(FAMILY),
        Tokenizer(model),
    ).evaluate(tiny_models.parameters(FAMILY))
    found = json.loads(ran.out)
    assert [entry["task"] for entry in found] == ["loss", "chat"]
    for entry, result in zip(found, expected, strict=True):
        assert entry["mean"] == pytest.approx(result.mean)
        assert entry["standard_error"] == pytest.approx(result.standard_error)
        assert entry["n"] == len(TEXTS)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["task"] for line in lines] == ["loss"] * 5 + ["chat"] * 5
    scores = [line["score"] for line in lines[:5]]
    assert sum(scores) / 5 == pytest.approx(expected[0].mean)
    assert lines[5]["prompt"] == TEXTS[0]
    assert list(tmp_path.iterdir()) == [output]

    ran = run("evaluate", model, tasks, "--limit=2")
    assert ran.code == 0
    header, loss, chat = ran.out.splitlines()
    assert header.split() == ["task", "metric", "mean", "n"]
    mean = sum(scores[:2]) / 2
    error = abs(scores[0] - scores[1]) / 2
    assert loss.split() == ["loss", "loss", f"{mean:.4f}", "±", f"{error:.4f}", "2"]
    assert chat.split()[:2] == ["chat", "accuracy"]
    assert "m3jax: 2 of 2 tasks: chat" in ran.err


def test_a_model_split_over_devices_scores_alike(run, model, specs, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        m3jax, "load", lambda *given: loaded.append(load(*given)) or loaded[-1]
    )
    means = []
    for mesh in ([], ["--mesh=rows=2,columns=2"]):
        ran = run("evaluate", model, f"--tasks={specs}/tasks.json", "--json", *mesh)
        assert ran.code == 0, ran.err
        loss, _ = json.loads(ran.out)  # the other samples
        means.append(loss["mean"])
    assert means[1] == pytest.approx(means[0], abs=1e-4)
    heads = [tree["model"]["embed_tokens"]["weight"] for tree in loaded]
    assert [len(head.devices()) for head in heads] == [1, 4]


def test_one_example_has_no_standard_error(run, model, specs):
    ran = run("evaluate", model, f"--tasks={specs}/tasks.json", "--limit=1")
    assert ran.out.splitlines()[1].split()[3:] == ["—", "1"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "needs one model, not 0"),
        (["{model}"], 2, "needs --tasks"),
        (["{model}", "--tasks={specs}/none.json"], 2, "No such file"),
        (["{model}", "--tasks={specs}/code.json"], 2, "--allow_code_execution"),
        (["{model}", "--tasks={specs}/tasks.json", "--limit=0"], 2, "--limit=0"),
        (["{model}", "--tasks={specs}/tasks.json", "--seed=-1"], 2, "seed=-1"),
        (["{model}", "--tasks={specs}/ask.json", "--mesh=rows=9"], 2, "there are 8"),
        (["{model}", "--tasks={specs}/ask.json", "--mesh=pods=2"], 2, "rows and col"),
        (["{model}", "--tasks={specs}/tasks.json", "--output=/no/where"], 2, "/no is"),
        (["{model}", "--tasks={specs}/ask.json", "--output={specs}"], 2, "is a folder"),
        (["{specs}", "--tasks={specs}/tasks.json"], 3, "neither model.safetensors"),
        (["{model}", "--tasks={specs}/ask.json", "--attacks=dog"], 2, "known: deepw"),
        (["{model}", "--tasks={specs}/tasks.json", "--attacks=words"], 2, "has a loss"),
        (["{model}", "--tasks={specs}/ask.json", "--attacks=words"], 2, "no token"),
        (["{model}", "--tasks=gsm8k", "--attacks=words"], 2, "not gsm8k"),
        (["{model}", "--tasks={specs}/ask.json", "--attack_examples=0"], 2, "=0"),
    ],
)
def test_errors_are_one_line(run, model, specs, arguments, code, message):
    ran = run("evaluate", *[a.format(model=model, specs=specs) for a in arguments])
    assert ran.code == code
    assert message in ran.error


DEEP = "[" * 100_000
HOSTILE = {
    "FIFO as a task": ("tasks.json", None, 2, "is a FIFO"),
    "FIFO as its data": ("data.jsonl", None, 2, "is a FIFO"),
    "FIFO as a tokenizer": ("tokenizer.json", None, 3, "is a FIFO"),
    "deep task": ("tasks.json", DEEP, 2, "not valid JSON"),
    "deep data": ("data.jsonl", DEEP, 2, "line 1: not valid JSON"),
    "data cut off": ("data.jsonl", '{"q": "a", "a": "b"}\n{"q": "', 2, "line 2: not"),
    "stop tokens": ("generation_config.json", "[1]", 3, "is not a JSON object"),
    "a trillion layers": ("config.json", '{"num_hidden_layers": 1000000000000}', 3, ""),
    "odd quantisation": ("config.json", '{"quantization_config": "fp8"}', 3, "unknown"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(case, run, model, specs, tmp_path):
    name, content, code, message = HOSTILE[case]
    here = tmp_path / "all"
    shutil.copytree(model, here)
    shutil.copytree(specs, here, dirs_exist_ok=True)
    if name == "config.json":
        config = json.loads((here / name).read_text())
        content = json.dumps({**config, **json.loads(content)})
    (here / name).unlink()
    if content is None:
        os.mkfifo(here / name)
    else:
        (here / name).write_text(content)
    ran = run("evaluate", here, f"--tasks={here}/tasks.json")
    assert (ran.code, message in ran.error) == (code, True), ran.err
    assert name in ran.error


def test_a_full_disk_costs_no_result(run, model, specs, tmp_path, monkeypatch):
    def fails(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("m3jax.evaluation.results.as_json", fails)
    output = tmp_path / "records.jsonl"
    ran = run("evaluate", model, f"--tasks={specs}/ask.json", f"--output={output}")
    assert ran.code == 4
    assert f"{output}: No space left on device; the disk is full" in ran.error
    assert "accuracy" in ran.out
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_supported(run, specs, tmp_path):
    config = {**tiny_models.config_dict(FAMILY), "hidden_act": "relu"}
    folder = checkpoints.write(tmp_path / "m", tiny_models.tensors(FAMILY), config)
    ran = run("evaluate", folder, f"--tasks={specs}/tasks.json")
    assert ran.code == 3
    assert "config.json: hidden_act = 'relu': only 'silu' is supported" in ran.error


def test_a_model_without_tokenizer_or_config(run, model, specs, tmp_path):
    tensors = tiny_models.tensors(FAMILY)
    bare = checkpoints.write(tmp_path / "bare", tensors)
    ran = run("evaluate", bare, f"--tasks={specs}/tasks.json")
    assert (ran.code, "no config.json" in ran.error) == (3, True)
    for family in (FAMILY, "qwen3"):  # without files some kinds have an empty one
        config, tensors = tiny_models.config_dict(family), tiny_models.tensors(family)
        mute = checkpoints.write(tmp_path / family, tensors, config)
        ran = run("evaluate", mute, f"--tasks={specs}/tasks.json")
        assert (ran.code, "its tokenizer cannot be used" in ran.error) == (3, True)


def test_folder_tokenizer_is_the_one_that_tests_use(model):
    ours, theirs = tiny_tokenizer.Characters(), Tokenizer(model)
    for text in TEXTS:
        for special in (True, False):
            tokens = ours.encode(text, add_special_tokens=special)
            assert theirs.encode(text, add_special_tokens=special) == tokens
        assert theirs.decode(tokens) == ours.decode(tokens)
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    assert theirs.chat(messages) == ours.chat(messages)
    assert theirs.first_token == ours.first_token
    assert theirs.stop_tokens == (1, 60)


def test_a_merge_in_memory_is_evaluated_as_it_is(model, specs, tmp_path):
    """No renaming: merged parameters go straight into the evaluator."""
    other = checkpoints.write(
        tmp_path / "other",
        tiny_models.tensors(FAMILY, seed=1),
        tiny_models.config_dict(FAMILY),
    )
    recipe = m3jax.Recipe(mixup=m3jax.Mixup(ratios=(0.25, 0.75)))
    evaluator = TaskEvaluator(
        load_tasks(specs / "tasks.json"),
        load_model(str(model)).config,
        Tokenizer(model),
    )
    parents = [m3jax.load(model), m3jax.load(other)]
    merged = m3jax.merge_params(None, parents, recipe)
    m3jax.merge(None, [str(model), str(other)], tmp_path / "merged", recipe)
    exported = load_model(str(tmp_path / "merged")).parameters
    key = jax.random.key(0)
    scores = evaluator(merged, None, key)
    assert evaluator(exported, None, key) == scores
    assert evaluator(parents[0], None, key) != scores
    assert all(map(math.isfinite, scores.values()))


def test_attacks(run, model, specs):
    arguments = (model, f"--tasks={specs}/ask.json", "--attacks=deepwordbug,stresstest")
    ran = run("evaluate", *arguments, "--attack_examples=3", "--json", "--seed=1")
    assert ran.code == 0
    clean, *attacked = json.loads(ran.out)
    assert [found["attack"] for found in attacked] == ["deepwordbug", "stresstest"]
    for found in attacked:
        assert found["clean"] == clean["mean"] > 0
        drop = (found["clean"] - found["attacked"]) / found["clean"]
        assert found["drop_rate"] == pytest.approx(drop)
        assert found["prompt"] != "say {q} or"
    assert "{q} and " in attacked[1]["prompt"]
    assert "m3jax: 2 of 2 attacks: stresstest on ask" in ran.err

    ran = run("evaluate", *arguments, "--attack_examples=3", "--seed=1")
    *_, header, deepwordbug, _ = ran.out.splitlines()
    assert header.split()[:4] == ["task", "attack", "clean", "attacked"]
    drop = f"{attacked[0]['drop_rate']:.1%}"
    assert deepwordbug.split()[:2] == ["ask", "deepwordbug"]
    assert deepwordbug.split()[4] == drop


def test_a_task_of_the_harness_without_the_harness(run, model, monkeypatch):
    for name in ("m3jax.evaluation.harness.model", "m3jax.evaluation.harness.tasks"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    ran = run("evaluate", model, "--tasks=gsm8k")
    assert ran.code == 2
    assert "gsm8k: no file of that name" in ran.error
    assert "pip install '.[harness]'" in ran.error
