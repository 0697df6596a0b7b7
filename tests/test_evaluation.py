"""Tasks, marks and scores, against transformers and against one example at a time."""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
import tiny_tokenizer
from grids import slow
from hypothesis import given, settings
from hypothesis import strategies as st

from m3jax.evaluation.evaluator import TaskEvaluator
from m3jax.evaluation.results import Result, as_json
from m3jax.evaluation.running import log_likelihoods, pad, plan_batches
from m3jax.evaluation.tasks import answers, programs
from m3jax.evaluation.tasks.examples import Example, load_examples
from m3jax.evaluation.tasks.requests import prepare
from m3jax.evaluation.tasks.task import Task, TaskError, load_tasks
from m3jax.models.generation import generate
from m3jax.models.likelihood import token_scores

assert len(tiny_tokenizer.VOCABULARY) == tiny_models.VOCABULARY
FAMILY = "one_layer"
CONFIG = tiny_models.config(FAMILY)
TOKENIZER = tiny_tokenizer.Characters()
WORDS = ["a", "to be", "what is 2+2?", "words in a row, and more", "x=1"]


def write_task(folder: Path, records: list[dict[str, Any]], **spec: Any) -> Path:
    """Writes a task and its data; returns the spec's path."""
    folder.mkdir(exist_ok=True)
    name = spec.setdefault("name", "task")
    spec.setdefault("data", f"{name}.jsonl")
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / f"{name}.jsonl").write_text(lines)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(spec))
    return path


def padded(tokens: list[int], slots: int = 64) -> tuple[jax.Array, jax.Array]:
    """A batch of one row, always of the same shape, and which tokens are valid."""
    row = jnp.asarray([tokens + [0] * (slots - len(tokens))], jnp.int32)
    return row, jnp.arange(slots)[None] < len(tokens)


def evaluator(*specs: Path, **options: Any) -> TaskEvaluator:
    tasks = [task for spec in specs for task in load_tasks(spec)]
    return TaskEvaluator(tasks, CONFIG, TOKENIZER, **options)


@pytest.fixture
def loss_task(tmp_path):
    records = [{"q": f"{word}:", "a": f" {word[::-1]}"} for word in WORDS]
    return write_task(tmp_path, records, kind="loss", prompt="{q}", completion="{a}")


@pytest.fixture
def choice_task(tmp_path):
    records = [
        {"q": word, "options": ["yes", "no way", "perhaps!"], "label": i % 3}
        for i, word in enumerate(WORDS)
    ]
    return write_task(
        tmp_path,
        records,
        name="choices",
        kind="choice",
        prompt="{q}",
        choices="{options}",
        answer="{label}",
        delimiter=" ",
    )


@pytest.fixture
def written_task(tmp_path):
    """The answer of every other example is what the model writes."""
    parameters = tiny_models.parameters(FAMILY)
    records = []
    for i, word in enumerate(WORDS):
        prompt = padded(TOKENIZER.encode(word, add_special_tokens=True))
        options = {"config": CONFIG, "max_new_tokens": 8, "stop_tokens": (1,)}
        found = generate(parameters, *prompt, **options)
        text = TOKENIZER.decode(found.tokens[0, : found.lengths[0]].tolist())
        records.append({"q": word, "a": text if i % 2 == 0 else text + "?"})
    return write_task(
        tmp_path,
        records,
        name="written",
        kind="exact_match",
        prompt="{q}",
        answer="{a}",
        max_new_tokens=8,
    )


# Log-likelihoods


def test_log_likelihoods_equal_transformers():
    torch = pytest.importorskip("torch")
    contexts = [TOKENIZER.encode(word, add_special_tokens=True) for word in WORDS]
    completions = [[5, 9, 11], [40], [17, 18], [30, 31, 32, 33], [59, 60]]
    found = log_likelihoods(
        tiny_models.parameters(FAMILY),
        contexts,
        completions,
        config=CONFIG,
        tokens_per_batch=64,
    )
    for context, completion, score in zip(contexts, completions, found, strict=True):
        tokens = torch.tensor([context + completion])
        with torch.no_grad():
            logits = tiny_models.reference(FAMILY)(tokens).logits[0]
        scores = torch.log_softmax(logits, -1)[len(context) - 1 : -1]
        expected = sum(float(scores[i, t]) for i, t in enumerate(completion))
        assert score.log_likelihood == pytest.approx(expected, abs=1e-4)
        assert score.greedy == (scores.argmax(-1).tolist() == completion)


@pytest.mark.parametrize("tokens_per_batch", [1, 40, 100_000])
@pytest.mark.slow  # a program for each shape of a batch
def test_batches_change_no_output(tokens_per_batch, written_task):
    batches_change_nothing(tokens_per_batch, written_task)


@pytest.mark.parametrize("tokens_per_batch", [slow(1), 40, slow(100_000)])
def test_batches_change_no_score(tokens_per_batch, loss_task, choice_task):
    batches_change_nothing(tokens_per_batch, loss_task, choice_task)


def batches_change_nothing(tokens_per_batch: int, *tasks: Path) -> None:
    parameters = tiny_models.parameters(FAMILY)
    plain = evaluator(*tasks).evaluate(parameters)
    other = evaluator(*tasks, tokens_per_batch=tokens_per_batch).evaluate(parameters)
    for one, two in zip(plain, other, strict=True):
        np.testing.assert_allclose(one.scores, two.scores, atol=1e-5)
        for a, b in zip(one.records, two.records, strict=True):
            assert a.get("output") == b.get("output")


def test_loss_is_the_mean_over_the_completions_tokens(loss_task):
    parameters = tiny_models.parameters(FAMILY)
    (result,) = evaluator(loss_task).evaluate(parameters)
    for word, record in zip(WORDS, result.records, strict=True):
        context = TOKENIZER.encode(f"{word}:", add_special_tokens=True)
        whole = context + TOKENIZER.encode(f" {word[::-1]}", add_special_tokens=False)
        scores = token_scores(parameters, *padded(whole), config=CONFIG)
        own = scores.log_likelihood[0, len(context) - 1 : len(whole) - 1]
        expected = -float(own.mean())
        assert record["score"] == pytest.approx(expected, abs=1e-5)
        assert record["tokens"] == len(word) + 1
    assert result.metric == "loss"
    assert result.mean == pytest.approx(result.scores.mean())


@pytest.mark.parametrize("normalise", ["bytes", "tokens", "none"])
def test_choice_is_the_likeliest_by_length(tmp_path, normalise):
    records = [
        {"q": w, "options": ["ä", "no way!", w], "label": "B"} for w in WORDS * 3
    ]
    spec = write_task(
        tmp_path,
        records,
        kind="choice",
        prompt="{q} ",
        choices="{options}",
        answer="{label}",
        normalise=normalise,
    )
    (result,) = evaluator(spec).evaluate(tiny_models.parameters(FAMILY))
    for record in result.records:
        lengths = {
            "bytes": [len(c.encode()) for c in record["choices"]],
            "tokens": [len(c) + 1 for c in record["choices"]],  # and the space
            "none": [1, 1, 1],
        }[normalise]
        best = np.argmax(np.array(record["log_likelihoods"]) / lengths)
        assert record["chosen"] == best
        assert record["score"] == (best == 1)


def test_a_broken_model_is_never_right(choice_task, loss_task):
    nan = jax.tree.map(lambda p: p * jnp.nan, tiny_models.parameters(FAMILY))
    choice, loss = evaluator(choice_task, loss_task).evaluate(nan)
    assert choice.mean == 0
    assert math.isnan(loss.mean)
    assert as_json(loss.to_dict())["mean"] is None


# Generation


def test_exact_match_of_what_the_model_writes(written_task):
    (result,) = evaluator(written_task).evaluate(tiny_models.parameters(FAMILY))
    assert [record["score"] for record in result.records] == [1, 0, 1, 0, 1]
    assert result.mean == 0.6
    assert result.standard_error == pytest.approx(math.sqrt(0.3 / 5))


def test_sampling_follows_the_key_and_not_the_batch_or_other_tasks(tmp_path, loss_task):
    spec = write_task(
        tmp_path,
        [{"q": word} for word in ("a", "to be", "x=1")],
        name="sampled",
        kind="regex",
        prompt="{q}",
        pattern="e",
        temperature=1.0,
        top_k=20,
        max_new_tokens=4,
    )

    def outputs(seed: int, *specs: Path, **options: Any) -> list[str]:
        *_, result = evaluator(*specs, **options).evaluate(
            tiny_models.parameters(FAMILY), None, jax.random.key(seed)
        )
        return [record["output"] for record in result.records]

    first = outputs(0, spec)
    assert outputs(0, loss_task, spec, tokens_per_batch=30) == first
    assert outputs(1, spec) != first


@pytest.mark.parametrize(
    ("kind", "options", "text", "answer", "expected"),
    [
        ("exact_match", {}, " Paris\n", "Paris", True),
        ("exact_match", {}, "paris", "Paris", False),
        ("exact_match", {"ignore_case": True}, "paris", "Paris", True),
        ("regex", {"pattern": r"is (\w+)\."}, "It is B. Or is C.", "B", True),
        ("regex", {"pattern": r"is (\w+)\."}, "It is C. Or is B.", "B", False),
        ("regex", {"pattern": "nothing"}, "It is B.", "B", False),
        ("regex", {"pattern": r"\d+"}, "about 12 or 13", "12", True),
        ("regex", {"pattern": r"\d+"}, "about 12", None, True),
        ("regex", {"pattern": r"\d+"}, "about", None, False),
        ("numeric", {}, "2 and 3 make 5.", "2+3=5\n#### 5", True),
        ("numeric", {}, "2 and 3 make 6.", "2+3=5\n#### 5", False),
        ("numeric", {}, "no idea", "5", False),
        ("numeric", {}, "#### 5 and then 6", "5", True),
        ("numeric", {}, "3\n#### none", "3", True),
        ("numeric", {}, "It costs $1,250.50", "1250.5", True),
        ("numeric", {}, "x = -3", "-3", True),
        ("numeric", {}, "10-5", "5", True),
        ("numeric", {}, "12 - 5 = 7.0", "#### 7", True),
        ("numeric", {}, ".5", "0.50", True),
        ("numeric", {}, "1e", "one", False),
    ],
)
def test_answers(kind, options, text, answer, expected, tmp_path):
    spec = write_task(
        tmp_path,
        [{"a": answer or ""}],
        kind=kind,
        prompt="?",
        **({} if answer is None else {"answer": "{a}"}),
        **options,
    )
    (task,) = load_tasks(spec)
    (example,) = load_examples(task)
    assert answers.is_right(answers.found(text, task), task, example) == expected


def test_until_stop_and_code():
    assert answers.until_stop("ab\ncd;", (";", "\n")) == "ab"
    assert answers.until_stop("ab", ("x",)) == "ab"
    assert answers.code("So:\n```python\nx = 1\n```\nand ```y```") == "x = 1\n"
    assert answers.code("```\nx = 2") == "x = 2"
    assert answers.code("x = 3") == "x = 3"


# Programs


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("assert 1 + 1 == 2", None),
        ("print('x')\nassert False, 'wrong sum'", "AssertionError: wrong sum"),
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(0)", "ended early"),
        ("import os; os._exit(0)", "ended early"),
        ("while True: pass", "took more than 1 s"),
        ("import time; time.sleep(60)", "took more than 1 s"),
        ("x = bytearray(1 << 31)", "MemoryError"),
        ("while True: print('x' * 10000)", ""),
        ("input()", "EOFError"),
    ],
)
def test_programs_and_their_limits(program, why):
    seconds = 1 if why and why.startswith("took") else 20
    passed, found = programs.passes(program, seconds=seconds, megabytes=512)
    assert passed == (why is None)
    assert (why or "") in found


def test_programs_reach_no_network():
    if not programs._apart():
        pytest.skip("this system does not let processes be unshared")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 5)"
        passed, why = programs.passes(program, seconds=20, megabytes=512)
    assert not passed
    assert "OSError" in why or "refused" in why or "unreachable" in why


def test_code_task_is_off_unless_allowed_and_runs_setup_and_tests(tmp_path):
    records = [
        {"tests": ["assert x == 1", "assert x < 2"], "setup": "x = 1"},
        {"tests": ["assert x == 2"], "setup": "x = 1"},
    ]
    spec = write_task(
        tmp_path,
        records,
        kind="code",
        prompt="write nothing",
        tests="{tests}",
        setup="{setup}",
        stop=list(tiny_tokenizer.ALPHABET),  # so that nothing is left of what it writes
        max_new_tokens=2,
    )
    with pytest.raises(TaskError, match="--allow_code_execution"):
        evaluator(spec)
    found = evaluator(spec, allow_code_execution=True)
    (result,) = found.evaluate(tiny_models.parameters(FAMILY))
    assert [record["score"] for record in result.records] == [1, 0]
    assert [record["problem"] for record in result.records] == ["", "AssertionError"]


# Requests and batches


def _prepare(prompt: str, completion: str, length: int = 64, **fields: Any) -> Any:
    task = Task(
        **{"name": "t", "kind": "loss", "data": Path("t"), "prompt": "", **fields}
    )
    example = Example(index=3, prompt=prompt, completion=completion)
    return prepare(example, task, TOKENIZER, length)


def _text(tokens: Any) -> str:
    return "".join(tiny_tokenizer.VOCABULARY[token] for token in tokens)


def test_requests():
    found = _prepare("what is it? ", "this")
    assert [_text(t) for t in found.contexts] == ["<s>what is it?"]
    assert [_text(t) for t in found.completions] == [" this"]
    found = _prepare("", "this", add_special_tokens=False)
    assert found.contexts == ((TOKENIZER.first_token,),)
    found = _prepare("hello", "you", chat=True, system="be kind", delimiter=" ")
    assert _text(found.contexts[0]) == "system: be kind\nuser: hello\nassistant:"
    assert _text(found.completions[0]) == " you"
    assert not found.truncated


def test_a_templates_line_break_is_no_part_of_the_answer(monkeypatch):
    monkeypatch.setattr(TOKENIZER, "chat", lambda messages: "user: hi\nassistant:\n")
    found = _prepare("hi", "you", chat=True)
    assert _text(found.contexts[0]) == "user: hi\nassistant:\n"
    assert _text(found.completions[0]) == "you"


def test_long_prompts_lose_their_beginning():
    found = _prepare("abcdefghij", "xyz", length=8)
    assert found.truncated
    assert _text(found.contexts[0]) == "efghij"  # with xy, all that the model takes
    found = _prepare("abcdefghij", "", length=8, kind="regex", max_new_tokens=3)
    assert found.truncated
    assert _text(found.contexts[0]) == "fghij"
    with pytest.raises(TaskError, match=r"example 3: .*max_new_tokens=8"):
        _prepare("abc", "", length=8, kind="regex", max_new_tokens=8)
    with pytest.raises(TaskError, match="example 3: a completion of 9 tokens"):
        _prepare("abc", "abcdefghi", length=8)
    with pytest.raises(TaskError, match="a completion of 0 tokens"):
        _prepare("abc", "")


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 500), max_size=60),
    st.integers(1, 5000),
    st.integers(0, 300),
)
def test_batches_hold_every_sequence_once(lengths, tokens_per_batch, extra):
    batches = plan_batches(lengths, tokens_per_batch, extra)
    members = [member for batch in batches for member in batch.members]
    assert sorted(members) == list(range(len(lengths)))
    for batch in batches:
        assert 1 <= len(batch.members) <= batch.rows
        assert all(lengths[member] <= batch.slots for member in batch.members)
        longest = max(lengths[member] for member in batch.members)
        assert batch.slots <= max(16, 2 * longest)
        within = batch.rows * (batch.slots + extra) <= tokens_per_batch
        assert within or batch.rows == 1
    shapes = {(batch.rows, batch.slots) for batch in batches}
    assert len(shapes) <= 11  # slots: 16, 24, 32, 48, 64, …, 512


def test_padding_is_on_the_right_and_rows_are_filled_up():
    (batch,) = plan_batches([3, 1, 2], 1000)
    tokens, valid = pad([[7, 8, 9], [5], [1, 2]], batch)
    assert tokens.shape == valid.shape == (8, 16)
    assert valid.sum(axis=1).tolist() == [3, 1, 2, 0, 0, 0, 0, 0]
    assert tokens[0, :4].tolist() == [7, 8, 9, 0]


# The evaluator


def test_other_parameters_compile_nothing(loss_task, choice_task, written_task):
    found = evaluator(loss_task, choice_task, written_task)
    key = jax.random.key(0)
    first = found(tiny_models.parameters(FAMILY), None, key)
    sizes = token_scores._cache_size(), generate._cache_size()
    second = found(tiny_models.parameters(FAMILY, seed=4), None, key)
    assert (token_scores._cache_size(), generate._cache_size()) == sizes
    assert list(first) == list(second) == ["task", "choices", "written"]
    assert first["task"] != second["task"]


def test_budget_takes_the_first_examples(loss_task):
    found = evaluator(loss_task)
    parameters = tiny_models.parameters(FAMILY)
    (every,), (few,) = found.evaluate(parameters), found.evaluate(parameters, 2)
    assert few.count == 2
    np.testing.assert_allclose(few.scores, every.scores[:2], atol=1e-5)
    with pytest.raises(ValueError, match="budget=0"):
        found.evaluate(parameters, 0)


def test_two_tasks_of_one_name_are_refused(loss_task):
    with pytest.raises(TaskError, match="two tasks are named 'task'"):
        evaluator(loss_task, loss_task)


def test_standard_error_of_one_example_is_unknown():
    one = Result("t", "loss", ({"score": 2.0},), 0)
    assert one.mean == 2.0
    assert math.isnan(one.standard_error)
    assert as_json({"a": [math.inf, (1.5, "x")]}) == {"a": [None, [1.5, "x"]]}


# Specs and data

LOSS = {"name": "t", "kind": "loss", "data": "t.jsonl", "prompt": "{q}"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nonsense", "not valid JSON"),
        ("[1]", "needs an object for each task"),
        ({"name": "t", "kind": "sing"}, "kind='sing' needs to be one of loss,"),
        (LOSS, "task 't': a loss task needs completion"),
        ({**LOSS, "completion": 1}, "completion=1 needs a text"),
        ({**LOSS, "completion": "x", "stop": "y"}, "has no field 'stop'; known: "),
        ({**LOSS, "completion": "x", "chat": 1}, "chat=1 needs true or false"),
        ({**LOSS, "completion": "x", "system": "y"}, "system needs chat: true"),
        ({**LOSS, "kind": "regex", "pattern": "("}, "no regular expression"),
        (
            {**LOSS, "kind": "numeric", "answer": "x", "max_new_tokens": 0},
            "max_new_tokens=0 needs a positive integer",
        ),
        (
            {**LOSS, "kind": "numeric", "answer": "x", "temperature": -1},
            "temperature=-1 needs a number in range",
        ),
        (
            {
                **LOSS,
                "kind": "choice",
                "choices": "{c}",
                "answer": "A",
                "normalise": "x",
            },
            "normalise='x' needs one of bytes, tokens, none",
        ),
    ],
)
def test_wrong_specs_are_refused(spec, message, tmp_path):
    path = tmp_path / "spec.json"
    path.write_text(spec if isinstance(spec, str) else json.dumps(spec))
    with pytest.raises(TaskError) as refused:
        load_tasks(path)
    assert message in str(refused.value)
    assert str(refused.value).startswith(str(path))


def test_a_missing_spec_is_refused(tmp_path):
    with pytest.raises(TaskError, match="No such file"):
        load_tasks(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"q": "x"}\n{"q": }\n', "line 2: not valid JSON"),
        (b"\n\n[1]\n", "line 3: needs an object"),
        (b'{"a": "x"}\n', "line 1: has no field 'q'; it has 'a'"),
        (b'{"q": {"x": 1}}\n', "line 1: q={'x': 1} needs to be a text"),
        (b"\n", "has no examples"),
        (b"\xff\n", "is not UTF-8"),
        (None, "No such file"),
    ],
)
def test_wrong_data_is_refused(data, message, tmp_path):
    if data is not None:
        (tmp_path / "t.jsonl").write_bytes(data)
    task = Task.from_dict({**LOSS, "completion": "y"}, tmp_path, "spec")
    with pytest.raises(TaskError) as refused:
        load_examples(task)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("record", "correct"),
    [
        ({"o": ["x", "y"], "a": 1}, 1),
        ({"o": ["x", "y"], "a": "B"}, 1),
        ({"o": ["x", "y"], "a": "y"}, 1),
        ({"o": ["x", "y"], "a": "0"}, 0),
        ({"o": ["1", "0"], "a": "0"}, 1),  # its text goes before its index
        ({"o": ["x", "y"], "a": 2}, None),
        ({"o": ["x", "y"], "a": "z"}, None),
        ({"o": ["x"], "a": 0}, None),
        ({"o": "xy", "a": 0}, None),
    ],
)
def test_the_right_choice(record, correct, tmp_path):
    fields = {"name": "t", "kind": "choice", "prompt": "q", "choices": "{o}"}
    spec = write_task(tmp_path, [record], answer="{a}", **fields)
    (task,) = load_tasks(spec)
    if correct is None:
        with pytest.raises(TaskError, match="line 1"):
            load_examples(task)
    else:
        assert load_examples(task)[0].correct == correct


def test_templates_and_several_tasks_in_a_file(tmp_path):
    record = {"q": "Why {a}?", "n": 3, "l": ["one", "two"]}
    spec = write_task(
        tmp_path,
        [record],
        kind="choice",
        prompt="{q} {n} { } {}\n{l}",
        choices=["{n}", "4"],
        answer="A",
    )
    both = {"tasks": [json.loads(spec.read_text())] * 2}
    (tmp_path / "both.json").write_text(json.dumps(both))
    tasks = load_tasks(tmp_path / "both.json")
    assert len(tasks) == 2
    (example,) = load_examples(tasks[0])
    assert example.prompt == "Why {a}? 3 { } {}\none\ntwo"
    assert example.choices == ("3", "4")
