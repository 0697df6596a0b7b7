"""The models and tasks that the package carries: what they are said to be, they are."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import m3jax
from m3jax.evaluation.evaluator import TaskEvaluator
from m3jax.evaluation.tasks.examples import Example, load_examples
from m3jax.evaluation.tasks.task import load_tasks
from m3jax.models.parameters import load_model
from m3jax.models.tokenizer import Tokenizer

DATA = Path(m3jax.__file__).parent / "demo_data"
EXPERTS = ("maths", "code", "words")
PARTS = {"validation": 0, "test": 1}


def examples(part: str) -> dict[str, list[Example]]:
    tasks = load_tasks(DATA / "tasks" / f"{part}.json")
    return {task.name: load_examples(task) for task in tasks}


def closing(brackets: str) -> str:
    """What closes them, found by taking closed pairs out of the text."""
    before = None
    while before != brackets:
        before = brackets
        for pair in ("()", "[]", "{}", "<>"):
            brackets = brackets.replace(pair, "")
    return brackets[::-1].translate(str.maketrans("([{<", ")]}>"))


@pytest.mark.parametrize("part", ["train", *PARTS])
def test_answers_are_right(part):
    found = examples(part)
    assert set(found) == set(EXPERTS)
    for example in found["maths"]:
        numbers = example.prompt.removeprefix("add ").removesuffix("=").split("+")
        assert sum(map(int, numbers)) == int(example.answer)
    for example in found["words"]:
        letters = example.prompt.removeprefix("sort ").removesuffix("=")
        assert sorted(letters) == list(example.answer)
    for example in found["code"]:
        brackets = example.prompt.removeprefix("close ").removesuffix("=")
        assert closing(brackets) == example.answer


def test_no_prompt_is_in_two_parts_or_could_have_been_trained_on():
    everything = []
    for part, place in PARTS.items():
        for own in examples(part).values():
            assert len(own) >= 200
            for example in own:
                digest = hashlib.sha256(example.prompt.encode()).digest()
                assert int.from_bytes(digest[:8], "little") % 20 == place
                everything.append(example.prompt)
    assert len(set(everything)) == len(everything)


def test_every_model_has_the_same_tokenizer_of_single_characters():
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert len({(DATA / m / name).read_bytes() for m in ("base", *EXPERTS)}) == 1
    fields = json.loads((DATA / "base" / "tokenizer.json").read_text())
    vocabulary = fields["model"]["vocab"]
    tokenizer = Tokenizer(DATA / "base")
    texts = [e.prompt + e.answer for own in examples("test").values() for e in own[:20]]
    for text in texts:
        tokens = [vocabulary[character] for character in text]
        assert tokenizer.encode(text, add_special_tokens=False) == tokens
        assert tokenizer.encode(text, add_special_tokens=True) == [0, *tokens]
        assert tokenizer.decode([0, *tokens, 1]) == text
    assert tokenizer.encode("A\n", add_special_tokens=False) == [2, 2]
    assert (tokenizer.first_token, tokenizer.stop_tokens) == (0, (1,))


@pytest.mark.parametrize("chosen", [None, "LlamaTokenizer"])
def test_a_tokenizer_without_a_class_of_its_own_is_what_any_loader_gives(
    chosen, tmp_path
):
    """The short way to the library's plain class is AutoTokenizer's result."""
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((DATA / "base" / name).read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    plain, auto = Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(plain.transformers) is type(auto)
    for text in ("add 1+2=3", "", "A\n<s> é</s></s", "<unk>"):
        for special in (True, False):
            tokens = auto.encode(text, add_special_tokens=special)
            assert plain.encode(text, add_special_tokens=special) == tokens
    # A model's own class is AutoTokenizer's to find.
    del settings["tokenizer_class"]
    if chosen:
        settings["tokenizer_class"] = chosen
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    auto = AutoTokenizer.from_pretrained(tmp_path)
    assert type(Tokenizer(tmp_path).transformers) is type(auto)


def test_the_tokenizers_files_are_followed(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((DATA / "base" / name).read_bytes())
    fields = json.loads((tmp_path / "tokenizer.json").read_text())
    fields["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    upper = Tokenizer(tmp_path).encode("ADD", add_special_tokens=False)
    lower = Tokenizer(DATA / "base").encode("add", add_special_tokens=False)
    assert upper == lower


def test_each_expert_is_good_at_its_skill_alone():
    tasks = load_tasks(DATA / "tasks" / "test.json")
    base = load_model(str(DATA / "base"))
    evaluator = TaskEvaluator(tasks, base.config, Tokenizer(base.folder))

    def accuracies(name: str) -> dict[str, float]:
        found = evaluator.evaluate(m3jax.load(DATA / name), budget=100)
        return {result.task: result.mean for result in found}

    found = {name: accuracies(name) for name in ("base", *EXPERTS)}
    for skill in EXPERTS:
        others = [found[name][skill] for name in found if name != skill]
        assert found[skill][skill] > 0.8
        assert found[skill][skill] > max(others) + 0.2


def test_the_record_says_how_they_were_made():
    record = json.loads((DATA / "training.json").read_text())
    assert record["settings"]["seed"] == 0
    assert set(record["validation_accuracy"]) == {"base", *EXPERTS}
    size = sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file())
    assert size < 3_000_000


@pytest.mark.slow
def test_learning_without_labels_beats_equal_ratios(run, tmp_path):
    """By tensor, on held-out tests, with a 95 % interval that excludes 0."""
    models = ",".join(str(DATA / name) for name in EXPERTS)
    lists = {
        f"--{flag}={DATA}/tasks/{part}.json"
        for flag, part in (
            *(("tasks", "train"), ("validation_tasks", "validation")),
            ("test_tasks", "test"),
        )
    }
    ran = run(
        *("learn", "--config=distil", f"--base={DATA}/base", f"--models={models}"),
        *(*lists, f"--output={tmp_path}/out"),
    )
    assert ran.code == 0, ran.err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    mean = summary["test"][-1]
    assert mean["task"] == "mean"
    assert mean["start"] == pytest.approx(0.768, abs=0.005)  # equal ratios
    assert mean["interval"][0] > 0
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())["recipe"]
    assert len(recipe["task_arithmetic"]["weights"]["rules"]) > 10  # by tensor
