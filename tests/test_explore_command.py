"""`m3jax explore`, from checkpoints and tasks to a winner that is exported."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import checkpoints
import jax
import numpy as np
import pytest
import tiny_models
import tiny_tokenizer

import m3jax
from m3jax.checkpoints.formats import tree
from m3jax.exploration.merger import Merger
from m3jax.models.parameters import load_model

FAMILY = "one_layer"
EXAMPLES = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, two models, and a loss and a choice task in three lists."""
    here = tmp_path_factory.mktemp("explore")
    generator = np.random.default_rng(5)
    base = tiny_models.tensors(FAMILY)
    for name, change in (("base", 0), ("a", 0.2), ("b", 0.2)):
        tensors = {}
        for key, tensor in base.items():
            noise = generator.standard_normal(tensor.shape).astype(np.float32)
            tensors[key] = tensor + np.float32(change * tensor.std()) * noise
        checkpoints.write(here / name, tensors, tiny_models.config_dict(FAMILY))
        tiny_tokenizer.write(here / name)
    for name in ("validation", "test", "ood"):
        write_tasks(here, name, generator)
    return here


def write_tasks(here, name, generator):
    letters = list("abcdefgh")
    records = [
        {
            "question": "".join(generator.choice(letters, 6)),
            "answer": "".join(generator.choice(letters, 3)),
            "right": int(generator.integers(2)),
        }
        for _ in range(EXAMPLES)
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (here / f"{name}.jsonl").write_text(lines)
    common = {"data": f"{name}.jsonl", "prompt": "{question}"}
    tasks = [
        {"name": "copy", "kind": "loss", "completion": "{answer}", **common},
        {"name": "pick", "kind": "choice", "choices": ["ab", "cd"], **common}
        | {"answer": "{right}"},
    ]
    (here / f"{name}.json").write_text(json.dumps(tasks))


def command(folder, where, **flags):
    given = {
        "base": folder / "base",
        "models": f"{folder}/a,{folder}/b",
        "output": where,
        "validation_tasks": folder / "validation.json",
        "test_tasks": folder / "test.json",
        "draws": 4,
        "seed": 3,
        **flags,
    }
    return ["explore", *(f"--{k}={v}" for k, v in given.items() if v is not None)]


@pytest.fixture
def explored(folder, tmp_path, run):
    """An exploration whose winner is exported: its output, export and table."""
    flags = {"ood_tasks": folder / "ood.json", "export": tmp_path / "best"}
    recipe = ["--config=ties_m3_dare", "--config.dtype=float32"]
    ran = run(*command(folder, tmp_path / "out", **flags), *recipe)
    assert ran.code == 0, ran.err
    return tmp_path / "out", tmp_path / "best", ran.out


def test_the_export_is_the_draw_and_scores_as_it_did(folder, explored, tmp_path, run):
    output, export, _ = explored
    winner = json.loads((output / "winner.json").read_text())
    summary = json.loads((output / "summary.json").read_text())
    lines = (output / "trials.jsonl").read_text().splitlines()[1:]
    trials = [json.loads(line) for line in lines]
    best = max(trials, key=lambda trial: trial["objective"])
    assert summary["winner"] == best
    assert (winner["recipe"], winner["seed"]) == (best["recipe"], best["seed"])

    # Replayed by `merge`, which finds paths, recipe and seed in the file.
    ran = run("merge", f"--config={output}/winner.json", f"--output={tmp_path}/again")
    assert ran.code == 0, ran.err
    exported = checkpoints.digest(export)
    assert checkpoints.digest(tmp_path / "again") == exported

    # The draw itself, as it stood in memory.
    recipe = m3jax.Recipe.from_dict(best["recipe"])
    trees = [m3jax.load(folder / name) for name in ("base", "a", "b")]
    drawn = Merger(trees[0], trees[1:], recipe)(recipe, best["seed"])
    stored, _ = tree.flatten(m3jax.load(export))
    for name, array in tree.flatten(drawn)[0].items():
        assert np.array_equal(np.asarray(array), np.asarray(stored[name])), name

    # And what was written down of it.
    for tasks, scores in (
        ("validation", best["scores"]),
        ("test", {k: v["mean"] for k, v in row(summary, "test").items()}),
    ):
        evaluator = m3jax.TaskEvaluator.of_checkpoint(
            str(export), [folder / f"{tasks}.json"]
        )
        parameters = load_model(str(export)).parameters
        found = evaluator(parameters, None, jax.random.key(3))
        assert found == {name: scores[name] for name in found}


def row(summary, name):
    rows = summary[name]["rows"]
    (winner,) = (own for title, own in rows.items() if title.startswith("winner"))
    return winner


def test_table_and_parents(folder, explored, run):
    output, _, printed = explored
    summary = json.loads((output / "summary.json").read_text())
    titles = ["base", "a", "b", "equal ratios", "plain ties"]
    assert list(summary["test"]["rows"])[:5] == titles
    ran = run("evaluate", folder / "a", f"--tasks={folder}/test.json", "--json")
    for entry in json.loads(ran.out):
        cell = summary["test"]["rows"]["a"][entry["task"]]
        assert cell["mean"] == pytest.approx(entry["mean"])
        low, high = cell["interval"]
        error = entry["standard_error"]
        assert low <= cell["mean"] <= high
        assert (high - low) / error == pytest.approx(2 * 1.96, rel=0.3)
    text = (output / "summary.md").read_text()
    for line in ("out of distribution", "4 draws, mean", "plain ties"):
        assert line in printed
        assert line in text
    assert all(len(line) <= 80 for line in printed.splitlines() if "/" not in line)
    assert "4 draws, mean ± deviation" in text
    assert text.startswith("# 4 draws of ties, a + b\n")
    page = (output / "report.html").read_text()
    intervals = re.findall(r"\[-?\d\.\d{4}, -?\d\.\d{4}\]", text)
    assert len(intervals) > 10
    assert all(interval in page for interval in intervals)
    assert len((output / "times.jsonl").read_text().splitlines()) == 4


def test_paired_interval_is_narrower_than_that_of_either(explored):
    test = json.loads((explored[0] / "summary.json").read_text())["test"]
    gain = test["winner_less"]["equal ratios"]
    row_of = test["rows"]["equal ratios"]["objective"]
    width = np.diff(gain["interval"])
    assert width < np.diff(row_of["interval"])
    (winner,) = (r for n, r in test["rows"].items() if n.startswith("winner"))
    difference = winner["objective"]["mean"] - row_of["mean"]
    assert gain["mean"] == pytest.approx(difference)


def test_validation_and_test_must_differ(folder, tmp_path, run):
    same = folder / "validation.json"
    ran = run(*command(folder, tmp_path / "out", test_tasks=same))
    assert (ran.code, "have the same data" in ran.error) == (2, True)
    link = tmp_path / "link.jsonl"
    link.symlink_to(folder / "validation.jsonl")
    shutil.copy(folder / "validation.jsonl", tmp_path / "copy.jsonl")
    lines = (folder / "validation.jsonl").read_text().splitlines()
    shuffled = "\n".join([*lines[1:], lines[0], ""])
    (tmp_path / "shuffled.jsonl").write_text(shuffled)
    (tmp_path / "part.jsonl").write_text("\n".join(lines[:2]))
    for data in ("link", "copy", "shuffled"):
        tasks = (folder / "validation.json").read_text()
        tasks = tasks.replace("validation.jsonl", f"{data}.jsonl")
        (tmp_path / "tasks.json").write_text(tasks)
        ran = run(
            *command(folder, tmp_path / "out", test_tasks=tmp_path / "tasks.json")
        )
        assert (ran.code, "have the same data" in ran.error) == (2, True), data
    assert not (tmp_path / "out").exists()
    tasks = (folder / "validation.json").read_text()
    (tmp_path / "tasks.json").write_text(tasks.replace("validation.j", "part.j"))
    ran = run(*command(folder, tmp_path / "out", test_tasks=tmp_path / "tasks.json"))
    assert ran.code == 0
    assert "have 2 of 2 test lines in common" in ran.err


def test_halving_by_the_command(folder, tmp_path, run):
    weights = "copy=2,pick=0"
    flags = {"halving": 2, "sampler": "sobol", "weights": weights, "limit": 4}
    ran = run(*command(folder, tmp_path, **flags))
    assert ran.code == 0, ran.err
    lines = (tmp_path / "trials.jsonl").read_text().splitlines()[1:]
    trials = [json.loads(line) for line in lines]
    assert [trial["budget"] for trial in trials] == [1] * 4 + [2] * 2 + [4]
    assert all(t["objective"] == pytest.approx(-t["scores"]["copy"]) for t in trials)
    assert "at a budget of 1" in ran.out


SCORE = """
import json, sys
from safetensors.numpy import load_file
folder, budget = sys.argv[1:]
assert json.load(open(folder + "/config.json"))["model_type"]
weight = load_file(folder + "/model.safetensors")["model.norm.weight"]
print("loading")
print(json.dumps({"norm": float(weight.sum()), "budget": int(budget)}))
"""


def test_a_program_of_the_users_chooses(folder, tmp_path, run):
    """It sees the bytes that the winner's recipe makes again."""
    script = tmp_path / "score.py"
    script.write_text(SCORE)
    ran = run(
        *command(
            folder,
            tmp_path / "out",
            validation_tasks=None,
            test_tasks=None,
            limit=3,
            evaluator_command=f"{sys.executable} {script} {{checkpoint}} {{budget}}",
            export=tmp_path / "best",
        )
    )
    assert ran.code == 0, ran.err
    lines = (tmp_path / "out/trials.jsonl").read_text().splitlines()[1:]
    trials = [json.loads(line) for line in lines]
    best = max(trials, key=lambda trial: trial["objective"])
    weight = checkpoints.read(tmp_path / "best")["model.norm.weight"]
    assert best["scores"] == {"norm": float(weight.sum()), "budget": 3.0}
    assert len({trial["scores"]["norm"] for trial in trials}) > 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("score.py", "needs {checkpoint} in the place of the folder"),
        ("nowhere-to-be-found {checkpoint}", "nowhere-to-be-found: No such file"),
        ("false {checkpoint}", "ended with 1, saying nothing"),
        ("echo {checkpoint}", "last; needs a JSON object of numbers"),
        ("echo '{checkpoint", "No closing quotation"),
    ],
)
def test_a_program_that_does_not_score_is_named(folder, tmp_path, run, words, message):
    flags = {"validation_tasks": None, "evaluator_command": words}
    ran = run(*command(folder, tmp_path / "out", **flags))
    assert (ran.code, message in ran.error) == (2, True), ran.err


@pytest.mark.slow  # test_harness evaluates by the same names
def test_tasks_of_the_harness_choose(folder, tmp_path, run):
    pytest.importorskip("lm_eval.tasks")
    yaml = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "validation.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{right}}",
        "doc_to_choice": ["ab", "cd"],
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tiny.yaml").write_text(json.dumps(yaml))
    tasks = f"tiny,{folder}/test.json"
    flags = {"validation_tasks": tasks, "harness_tasks_path": tmp_path, "limit": 4}
    flags |= {"test_tasks": folder / "ood.json", "selector": "answers"}
    ran = run(*command(folder, tmp_path / "out", **flags))
    assert ran.code == 0, ran.err
    lines = (tmp_path / "out/trials.jsonl").read_text().splitlines()[1:]
    for trial in map(json.loads, lines):
        assert set(trial["scores"]) == {"tiny", "copy", "pick"}
        assert trial["scores"]["tiny"] in (0, 0.25, 0.5, 0.75, 1)
        tiny, copy, pick = (trial["scores"][n] for n in ("tiny", "copy", "pick"))
        assert trial["objective"] == pytest.approx((tiny - copy + pick) / 3)
        answers = trial["answers"]
        assert {name: len(own) for name, own in answers.items()} == {
            "tiny": 4,
            "pick": 4,
        }
        assert set(answers["tiny"]) <= {"0", "1"}
    assert "chosen by its answers on validation" in ran.out


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ({"models": None}, 2, "--models is missing"),
        ({"test_tasks": None}, 2, "--test_tasks is missing"),
        ({"output": None}, 2, "--output is missing"),
        ({"weights": "copy"}, 2, "--weights='copy' needs TASK=NUMBER"),
        ({"weights": "paste=1"}, 2, "'paste' is no validation task"),
        ({"limit": 0}, 2, "--limit=0 needs 1 or more"),
        ({"at_once": 0}, 2, "at_once=0 needs 1 or more"),
        ({"evaluator_command": "a {checkpoint}"}, 2, "one of the two chooses"),
        ({"mesh": "rows"}, 2, "--mesh=rows needs AXIS=SIZE"),
        ({"mesh": "rows=9"}, 2, "mesh=rows=9 has 9 devices, there are 8"),
        ({"mesh": "rows=2", "at_once": 2}, 2, "at_once=2 needs to be 1 with a mesh"),
        ({"seed": -1}, 2, "seed=-1"),
        ({"tokenizer_from": "c"}, 2, "--tokenizer_from=c needs base or one of"),
        ({"search": "all", "sampler": "grid"}, 2, "search='all' needs"),
        ({"export": "{folder}/a"}, 3, "exists already"),
        ({"output": "memory://bucket/out"}, 3, "written to a folder of this machine"),
        ({"output": "{folder}/test.json/out"}, 3, "is not a folder"),
    ],
)
def test_errors_are_one_line(folder, tmp_path, run, flags, code, message):
    flags = {
        name: value.replace("{folder}", str(folder))
        if isinstance(value, str)
        else value
        for name, value in flags.items()
    }
    ran = run(*command(folder, tmp_path / "out", **flags))
    assert (ran.code, message in ran.error) == (code, True), ran.err


def test_models_that_compute_differently_are_refused(folder, tmp_path, run):
    config = {**tiny_models.config_dict(FAMILY), "rms_norm_eps": 0.1}
    other = checkpoints.write(tmp_path / "c", tiny_models.tensors(FAMILY), config)
    models = f"{folder}/a,{other}"
    ran = run(*command(folder, tmp_path / "out", models=models))
    assert ran.code == 3
    assert "its config.json says rms_norm_eps = 0.1, that of" in ran.error


def test_what_others_wrote_stays(folder, tmp_path, run):
    (tmp_path / "summary.json").write_text("mine")
    ran = run(*command(folder, tmp_path), "--overwrite")
    assert ran.code == 3
    assert "holds summary.json, but no trials.jsonl, so it is not m3jax's" in ran.error
    assert (tmp_path / "summary.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device", "/x"), 4, "/x: No space left"),
        (MemoryError(), 4, "out of memory; a smaller --tokens_per_batch and fewer"),
    ],
)
def test_it_says_how_to_resume(error, code, text, folder, tmp_path, run, monkeypatch):
    def fails(*arguments, **options):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("m3jax.exploration.run.score", fails)
        ran = run(*command(folder, tmp_path))
    assert (ran.code, text in ran.error) == (code, True), ran.err
    assert ran.error.endswith(
        f"what is done so far is kept in {tmp_path}; the same command with --resume "
        "goes on from there"
    )
    assert run(*command(folder, tmp_path), "--resume").code == 0


def test_draws_at_once_change_no_file(folder, tmp_path, run):
    names = ("trials.jsonl", "scores.jsonl", "summary.md", "winner.json", "report.html")
    files = []
    for flags in ({}, {"at_once": 2}):
        output = tmp_path / str(len(files))
        ran = run(*command(folder, output, draws=6, **flags), "--test_all_draws")
        assert ran.code == 0, ran.err
        files.append([(output / name).read_bytes() for name in names])
    assert files[0] == files[1]


def test_models_split_over_devices_score_alike(folder, tmp_path, run):
    trials = []
    for flags in ({}, {"mesh": "rows=2,columns=2"}):
        output = tmp_path / str(len(trials))
        ran = run(*command(folder, output, **flags))
        assert ran.code == 0, ran.err
        lines = (output / "trials.jsonl").read_text().splitlines()
        trials.append([json.loads(line) for line in lines[1:]])
    for whole, split in zip(*trials, strict=True):
        assert split["ratios"] == whole["ratios"]
        assert split["scores"] == pytest.approx(whole["scores"], abs=1e-4)
    summaries = [
        json.loads((tmp_path / name / "summary.json").read_text()) for name in "01"
    ]
    assert summaries[0]["winner"]["index"] == summaries[1]["winner"]["index"]


def test_a_preset_chooses_by_answers(folder, tmp_path, run):
    ran = run(*command(folder, tmp_path / "out", preset="adamms"))
    assert ran.code == 0, ran.err
    lines = (tmp_path / "out" / "trials.jsonl").read_text().splitlines()[1:]
    trials = [json.loads(line) for line in lines]
    assert len(trials) == 7
    assert all(list(own["answers"]) == ["pick"] for own in trials)
    assert all(len(own["answers"]["pick"]) == EXAMPLES for own in trials)
    alphas = [own["recipe"]["mixup"]["ratios"][0] for own in trials]
    answers = [own["answers"]["pick"] for own in trials]
    winner = json.loads((tmp_path / "out" / "winner.json").read_text())
    best = m3jax.search.response_stability(answers, alphas).best[0]
    assert winner["recipe"]["mixup"]["ratios"][0] == best
    assert "chosen by its answers on validation" in ran.out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--sampler=grid"], "sampler='grid' does not go with it"),
        (["--search=ratios"], "takes no search=['ratios']"),
        (["--config.method=ties"], "leave out method ties"),
    ],
)
def test_what_a_preset_does_not_take_is_said(more, said, folder, tmp_path, run):
    ran = run(*command(folder, tmp_path / "out", preset="greedy_soup"), *more)
    assert ran.code == 2
    assert said in ran.error
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_killed_at_random_and_resumed(how, at_once, folder, tmp_path):
    def start(output, *more):
        flags = {"draws": 20, "sampler": "tpe", "at_once": at_once, "generation": 3}
        arguments = command(folder, output, **flags)
        return subprocess.Popen(
            [sys.executable, "-m", "m3jax", *arguments, *more],
            env={**os.environ, "XLA_FLAGS": ""},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    names = ("trials.jsonl", "scores.jsonl", "summary.json", "winner.json")
    assert start(tmp_path / "whole").wait() == 0
    expected = {name: (tmp_path / "whole" / name).read_bytes() for name in names}
    generator = np.random.default_rng()
    for attempt in range(3):
        output = tmp_path / str(attempt)
        wanted = generator.integers(20)
        process = start(output)
        while not (output / "trials.jsonl").exists() or (
            len((output / "trials.jsonl").read_bytes().splitlines()) < wanted
        ):
            time.sleep(0.005)
        process.send_signal(how)
        code = {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[how]
        assert process.wait(timeout=10) in (code, 0)
        assert start(output, "--resume").wait() == 0
        assert {name: (output / name).read_bytes() for name in names} == expected
