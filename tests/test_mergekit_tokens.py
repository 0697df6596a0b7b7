"""Tokenizers and chat templates in mergekit's YAML, beside mergekit 0.1.5.

Rows of embedding and head are compared through their tokens, since mergekit numbers
those that a union adds in another order in each process.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import read, write
from command_line import Run
from safetensors.numpy import load_file

import m3jax
from m3jax.recipe import mergekit

GOLDEN = Path(__file__).parent / "golden_mergekit"
CASES = json.loads((GOLDEN / "cases.json").read_text())
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def _cases(kind: str) -> list[Any]:
    return [pytest.param(c, id=c["name"]) for c in CASES if c["kind"] == kind]


@pytest.fixture(autouse=True)
def in_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in the configurations are relative to the models."""
    monkeypatch.chdir(GOLDEN / "models")


def _tokenizer(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def _near(case: dict[str, Any], got: np.ndarray, expected: np.ndarray) -> bool:
    away = np.abs(got.astype(np.float64) - expected.astype(np.float64))
    return bool((away <= case["atol"] + case["rtol"] * np.abs(expected)).all())


IN_MEMORY = ("tok_pad_union", "tok_ties", "tok_tokens")


@pytest.mark.parametrize(
    "case, executor",
    [
        *((case.values[0], "streamed") for case in _cases("tokenizer")),
        *((c.values[0], "sharded") for c in _cases("tokenizer") if c.id in IN_MEMORY),
    ],
    ids=lambda own: own if isinstance(own, str) else own["name"],
)
def test_tokenizer(
    case: dict[str, Any], executor: str, tmp_path: Path, run: Run
) -> None:
    flags = (f"--output={tmp_path / 'out'}", "--nofsync", f"--executor={executor}")
    ran = run("merge", f"--config={GOLDEN / case['yaml']}", *flags)
    assert ran.code == 0, ran.err
    tokenizer = _tokenizer(tmp_path / "out")
    wanted = json.loads((GOLDEN / case["tokenizer"]).read_text())
    ids = tokenizer.get_vocab()
    assert ids.keys() == wanted["vocab"].keys()
    fixed = ids.keys() - case["any_order"]
    assert all(ids[token] == wanted["vocab"][token] for token in fixed)
    added = tokenizer.added_tokens_decoder.values()
    special = {str(own) for own in added if own.special}
    assert special == set(wanted["special"])
    for own in wanted.get("encodings", ()):
        encoded = tokenizer.encode(own["text"], add_special_tokens=False)
        assert tokenizer.convert_ids_to_tokens(encoded) == own["tokens"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == wanted["vocab_size"]
    got, expected = read(tmp_path / "out"), load_file(GOLDEN / case["expected"])
    assert got.keys() == expected.keys()
    for name, own in got.items():
        theirs = expected[name]
        assert own.shape == theirs.shape and own.dtype == theirs.dtype
        if name in case["tensors_by_token"]:
            order = [wanted["vocab"][token] for token in sorted(ids)]
            assert _near(case, own[[ids[t] for t in sorted(ids)]], theirs[order]), name
            rest = max(ids.values()) + 1
            own, theirs = own[rest:], theirs[rest:]
        assert _near(case, own, theirs), name


@pytest.mark.parametrize("case", _cases("chat"))
def test_chat_template(case: dict[str, Any], tmp_path: Path, run: Run) -> None:
    config = f"--config={GOLDEN / case['yaml']}"
    ran = run("merge", config, f"--output={tmp_path / 'out'}", "--nofsync")
    assert ran.code == 0, ran.err
    tokenizer = _tokenizer(tmp_path / "out")
    for own in json.loads((GOLDEN / case["rendered"]).read_text()):
        if own["text"] is None:
            assert tokenizer.chat_template is None
            continue
        rendered = tokenizer.apply_chat_template(
            own["messages"],
            tokenize=False,
            add_generation_prompt=own["add_generation_prompt"],
        )
        assert rendered == own["text"]


def test_the_record_makes_the_same_bytes(tmp_path: Path, run: Run) -> None:
    config = GOLDEN / "yaml" / "tok_tokens.yml"
    assert run("merge", f"--config={config}", f"--output={tmp_path / 'a'}").code == 0
    record = tmp_path / "a" / "m3jax.json"
    ran = run("merge", f"--config={record}", f"--output={tmp_path / 'b'}")
    assert ran.code == 0, ran.err
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert run("verify", tmp_path / "b").code == 0


DOCUMENTS = """
name: first
merge_method: linear
base_model: t_base
models:
- {model: t_base, parameters: {weight: 1}}
- {model: t_chat, parameters: {weight: 1}}
tokenizer: {source: union}
---
merge_method: linear
base_model: first
models:
- {model: first, parameters: {weight: 1}}
- {model: t_other, parameters: {weight: 1}}
tokenizer: {source: first, tokens: {a: {source: t_other, force: true}}}
chat_template: t_other
"""


def test_documents_name_each_other(tmp_path: Path, run: Run) -> None:
    """Also where the tokenizer, the row of a token or the template is a document's."""
    (tmp_path / "own.yml").write_text(DOCUMENTS)
    config = f"--config={tmp_path / 'own.yml'}"
    ran = run("merge", config, f"--output={tmp_path / 'a'}", "--nofsync")
    assert ran.code == 0, ran.err
    row = read(Path("t_other"))[EMBEDDING][_tokenizer(Path("t_other")).get_vocab()["a"]]
    ids = _tokenizer(tmp_path / "a").get_vocab()
    got = read(tmp_path / "a")
    np.testing.assert_allclose(got[EMBEDDING][ids["a"]], row, rtol=0, atol=1e-7)
    assert ids["<tool>"] == 41 and got[HEAD].shape[0] == 42
    record = f"--config={tmp_path / 'a' / 'm3jax.json'}"
    ran = run("merge", record, f"--output={tmp_path / 'b'}", "--nofsync")
    assert ran.code == 0, ran.err
    assert all(
        own.tobytes() == read(tmp_path / "b")[n].tobytes() for n, own in got.items()
    )


def test_truncation_as_mergekit_does_it(tmp_path: Path, run: Run) -> None:
    """config.json stays, as mergekit documents it; a tokenizer has precedence."""
    rows = {}
    for name, count in (("large", 9), ("small", 7)):
        rows[name] = np.full((count, 2), count, np.float32)
        write(tmp_path / name, {EMBEDDING: rows[name]}, {"vocab_size": count})
    text = "\n".join(
        ["merge_method: linear", "models:"]
        + [f"- {{model: {tmp_path / own}, parameters: {{weight: 1}}}}" for own in rows]
    )
    (tmp_path / "own.yml").write_text(text)
    merged = ("merge", f"--config={tmp_path / 'own.yml'}", "--nofsync")
    assert "tokenizer: {source: base}" in run(*merged, f"--output={tmp_path}/0").error
    truncated = (*merged, "--config.vocabulary=truncate")
    ran = run(*truncated, f"--output={tmp_path}/1")
    assert "truncated to 7 rows" in ran.err and "keeps vocab_size=9" in ran.err
    assert np.array_equal(read(tmp_path / "1")[EMBEDDING], np.full((7, 2), 8.0))
    run(*truncated, "--config.tokenizer.config=fit", f"--output={tmp_path}/2")
    for place, wanted in ((1, 9), (2, 7)):
        config = json.loads((tmp_path / str(place) / "config.json").read_text())
        assert config["vocab_size"] == wanted
    config = f"--config={GOLDEN / 'yaml' / 'tok_union.yml'}"
    flags = (config, "--config.vocabulary=truncate", f"--output={tmp_path}/3")
    ran = run("merge", *flags)
    assert ran.code == 0 and "vocabulary=truncate has no effect" in ran.err


def test_without_a_base_it_is_the_first_model(tmp_path: Path, run: Run) -> None:
    """Where mergekit takes any of them; and its template goes along, or none does."""
    entries = "".join(
        f"- {{model: {own}, parameters: {{weight: 1}}}}\n"
        for own in ("t_other", "t_chat")
    )
    text = f"merge_method: linear\nmodels:\n{entries}tokenizer: {{source: base}}\n"
    (tmp_path / "own.yml").write_text(text)
    config = f"--config={tmp_path / 'own.yml'}"
    ran = run("merge", config, f"--output={tmp_path / 'a'}", "--nofsync")
    assert ran.code == 0, ran.err
    ours, theirs = (_tokenizer(own) for own in (tmp_path / "a", Path("t_other")))
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.chat_template == theirs.chat_template
    based = text.replace("models:", "base_model: t_base\nmodels:").replace(
        "- {model: t_other, parameters: {weight: 1}}\n", ""
    )
    (tmp_path / "own.yml").write_text(based.replace("linear", "task_arithmetic"))
    ran = run("merge", config, f"--output={tmp_path / 'b'}", "--nofsync")
    assert ran.code == 0 and "theirs go" not in ran.err
    assert _tokenizer(tmp_path / "b").chat_template is None


DOCUMENT = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n"


@pytest.mark.parametrize(
    "text, message",
    [
        ("tokenizer: {sauce: base}", "tokenizer.sauce; did you mean 'source'"),
        ("tokenizer: union", "tokenizer='union' needs keys and values"),
        ("tokenizer: {tokens: {x: {source: 3}}}", "tokens.x.source=3 needs a folder"),
        ("tokenizer: {tokens: {x: {force: true}}}", "needs a source"),
        (
            "tokenizer: {tokens: {x: {source: {kind: other}}}}",
            "kind='other' needs model_token or zero",
        ),
        (
            "tokenizer: {tokens: {x: {source: {kind: model_token, model: a}}}}",
            "either token or token_id",
        ),
        ("tokenizer: {pad_to_multiple_of: 0}", "pad_to_multiple_of=0 needs"),
    ],
)
def test_errors_name_the_key(text: str, message: str) -> None:
    with pytest.raises(m3jax.RecipeError) as error:
        mergekit.parse(DOCUMENT + text)
    assert message in str(error.value)
