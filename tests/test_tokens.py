"""Merges by token, beside a NumPy oracle, transformers' own numbering and misuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import read, write
from command_line import Run
from hypothesis import given, settings
from hypothesis import strategies as st

import m3jax
from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.formats.dtypes import of_numpy
from m3jax.checkpoints.source import Array
from m3jax.checkpoints.sources.token_rows import TokenRows
from m3jax.checkpoints.tokens import generation
from m3jax.checkpoints.tokens.vocabulary import read_vocabulary
from m3jax.engine.journal import fingerprint
from m3jax.engine.prepare import prepare

EMBEDDING, HEAD, NORM = (
    "model.embed_tokens.weight",
    "lm_head.weight",
    "model.norm.weight",
)
WIDTH = 4
PLAIN = m3jax.Mixup(alpha=None)


def added_token(token: str, number: int, *, special: bool = False) -> dict[str, Any]:
    return {
        "id": number,
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def word_level(ids: dict[str, int], added: dict[str, int] | None = None) -> str:
    """A tokenizer.json of words."""
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [added_token(*own) for own in (added or {}).items()],
            "normalizer": None,
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": None,
            "decoder": None,
            "model": {"type": "WordLevel", "vocab": ids, "unk_token": "a"},
        }
    )


def make(
    folder: Path,
    ids: dict[str, int],
    seed: int,
    *,
    added: dict[str, int] | None = None,
    padding: int = 0,
    dtype: Any = np.float32,
    files: dict[str, str] | None = None,
    **config: Any,
) -> dict[str, np.ndarray]:
    """A checkpoint with a word-level tokenizer, and rows of padding beyond it."""
    rng = np.random.default_rng(seed)
    rows = max([*ids.values(), *(added or {}).values()]) + 1 + padding
    tensors = {
        EMBEDDING: rng.normal(size=(rows, WIDTH)).astype(dtype),
        HEAD: rng.normal(size=(rows, WIDTH)).astype(dtype),
        NORM: rng.normal(size=WIDTH).astype(dtype),
    }
    shutil.rmtree(folder, ignore_errors=True)
    write(folder, tensors)
    (folder / "config.json").write_text(json.dumps({"vocab_size": rows, **config}))
    (folder / "tokenizer.json").write_text(word_level(ids, added))
    for name, text in (files or {}).items():
        (folder / name).write_text(text)
    return tensors


def aligned(
    tensors: list[np.ndarray],
    ids: list[dict[str, int]],
    whole: dict[str, int],
    rows: int,
    missing: str,
    base: int | None,
) -> list[np.ndarray]:
    """What each model's tensor is, token by token, in float64."""
    found = []
    for tensor, own in zip(tensors, ids, strict=True):
        out = np.full((rows, WIDTH), np.nan)
        for token, place in whole.items():
            having = [
                t[i[token]].astype(np.float64)
                for t, i in zip(tensors, ids, strict=True)
                if i.get(token, len(t)) < len(t)
            ]
            if own.get(token, len(tensor)) < len(tensor):
                out[place] = tensor[own[token]]
            elif missing == "base" and base is not None and token in ids[base]:
                out[place] = tensors[base][ids[base][token]]
            elif having:
                out[place] = np.mean(having, axis=0)
        lacking = np.isnan(out).any(axis=1)
        out[lacking] = out[~lacking].mean(axis=0)
        found.append(out)
    return found


words = st.lists(st.sampled_from("abcdefgh"), min_size=1, unique=True)


@settings(max_examples=25)
@given(
    vocabularies=st.lists(words, min_size=2, max_size=4),
    padding=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    by=st.sampled_from(["union", "base", "2"]),
    missing=st.sampled_from(["base", "mean"]),
    multiple=st.sampled_from([None, 1, 4, 16]),
    half=st.booleans(),
)
def test_random_vocabularies(
    vocabularies, padding, by, missing, multiple, half, tmp_path_factory
):
    """A linear merge of every row, beside NumPy."""
    root = tmp_path_factory.mktemp("random")
    dtype = ml_dtypes.bfloat16 if half else np.float32
    ids = [{w: i for i, w in enumerate(own)} for own in vocabularies]
    models = [
        make(root / str(i), own, i, padding=padding[i], dtype=dtype)
        for i, own in enumerate(ids)
    ]
    paths = [str(root / str(i)) for i in range(len(ids))]
    recipe = m3jax.Recipe(
        method=m3jax.TaskArithmetic(scaling=0.7),
        mixup=PLAIN,
        vocabulary=paths[1] if by == "2" else by,
        tokenizer=m3jax.TokenizerConfig(missing=missing, pad_to_multiple_of=multiple),
        dtype="float32",
    )
    m3jax.merge(paths[0], paths[1:], root / "out", recipe)
    whole = dict(ids[1 if by == "2" else 0])
    for own in ids[1:] if by == "union" else ():
        for token in own:
            whole.setdefault(token, len(whole))
    multiple = multiple or 1
    rows = -(-len(whole) // multiple) * multiple
    got = read(root / "out")
    for name in (EMBEDDING, HEAD):
        base, *others = aligned([m[name] for m in models], ids, whole, rows, missing, 0)
        expected = base + 0.7 * sum(own - base for own in others)
        np.testing.assert_allclose(got[name], expected, rtol=0, atol=3e-6)
    config = json.loads((root / "out" / "config.json").read_text())
    assert config["vocab_size"] == rows
    written = read_vocabulary("out", root / "out")
    assert written is not None and written.ids == whole


@given(
    widths=st.sampled_from([(), (1,), (3,), (2, 2), (0,)]),
    table=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_rows_by_table(widths, table, data):
    """Any run of elements of rows that come from several tensors."""
    rng = np.random.default_rng(table)
    arrays = [rng.normal(size=(rows, *widths)).astype(np.float32) for rows in (5, 1, 9)]
    count = int(rng.integers(1, 12))
    numbers = np.stack([rng.integers(-2, len(own), count) for own in arrays])
    numbers = np.where(numbers < 0, -1, numbers)
    filled = (numbers < 0).all(axis=0) & (rng.random(count) < 0.5)
    sources = tuple(Array(own, "") for own in arrays)
    rows = TokenRows(sources, numbers, filled, of_numpy(np.dtype(np.float32)))
    expected = np.zeros((count, *widths))
    for i in range(count):
        own = [a[n] for a, n in zip(arrays, numbers[:, i], strict=True) if n >= 0]
        expected[i] = np.mean(own, axis=0, dtype=np.float64) if own else 0
    if filled.any():
        rest = expected[~filled]
        expected[filled] = rest.sum(axis=0) / max(1, len(rest))
    flat = expected.reshape(-1).astype(np.float32)
    start = data.draw(st.integers(0, flat.size))
    out = np.empty(data.draw(st.integers(0, flat.size - start)), np.float32)
    rows.read_into(out, start)
    np.testing.assert_allclose(out, flat[start : start + len(out)], 3e-7, 1e-8)
    assert rows.shape == expected.shape


def test_large_tables_are_read_row_by_row(monkeypatch: pytest.MonkeyPatch):
    from m3jax.checkpoints.sources import token_rows

    monkeypatch.setattr(token_rows, "_SMALL", 0)
    monkeypatch.setattr(token_rows, "_BLOCK", 32)
    array = np.arange(4096, dtype=np.float32).reshape(512, 8)
    order = np.random.default_rng(0).permutation(512)[None]
    source = TokenRows(
        (Array(array, ""),),
        order,
        np.zeros(512, bool),
        of_numpy(np.dtype(np.float32)),
    )
    out = np.empty(4000, np.float32)
    source.read_into(out, 90)
    np.testing.assert_array_equal(out, array[order[0]].reshape(-1)[90:4090])


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "named": {"pad_token": "[PAD]", "eos_token": "b"},
    "decoder": {
        "added_tokens_decoder": {
            "5": {"content": "<x>", "special": True},
            "4": {"content": "<y>", "normalized": False},
        },
        "eos_token": "<x>",
    },
    "extra": {"additional_special_tokens": ["<e>", "a", "<f>"], "cls_token": "<c>"},
}


@pytest.mark.parametrize("added", [None, {"<t>": 4, "a": 0}])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_tokens_are_numbered_as_transformers_does(config, added, tmp_path: Path):
    from transformers import PreTrainedTokenizerFast

    ids = dict(zip("abcd", range(4), strict=True))
    (tmp_path / "tokenizer.json").write_text(word_level(ids, added))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "added_tokens.json").write_text('{"<beside>": 4}')
    found = read_vocabulary("", tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path).get_vocab()
    assert found is not None and found.ids == theirs


def sentencepiece(pieces: list[str]) -> bytes:
    """A SentencePiece model with these pieces, and a score each."""
    parts = []
    for piece in pieces:
        text = piece.encode()
        own = b"\n" + bytes([len(text)]) + text + b"\x15\0\0\0\0\x18\x01"
        parts.append(b"\n" + bytes([len(own)]) + own)
    return b"".join(parts)


def test_sentencepiece_alone(tmp_path: Path):
    """Its pieces are read, and tokens that a union adds stand beside them."""
    pieces = {"base": ["<unk>", "\u2581a", "b"], "a": ["<unk>", "b", "\u2581c"]}
    for i, (name, own) in enumerate(pieces.items()):
        make(tmp_path / name, dict.fromkeys(own, 2), i)
        (tmp_path / name / "tokenizer.json").unlink()
        (tmp_path / name / "tokenizer.model").write_bytes(sentencepiece(own))
    (tmp_path / "base" / "added_tokens.json").write_text("{}")
    recipe = m3jax.Recipe(mixup=PLAIN, vocabulary="union")
    base, model, out = (str(tmp_path / name) for name in ("base", "a", "out"))
    m3jax.merge(base, [model], out, recipe)
    found = read_vocabulary("out", Path(out))
    assert found is not None
    assert found.ids == {"<unk>": 0, "\u2581a": 1, "b": 2, "\u2581c": 3}
    assert json.loads((Path(out) / "added_tokens.json").read_text()) == {"\u2581c": 3}
    (tmp_path / "base" / "tokenizer.model").write_bytes(b"\n\xff\xff\x03")
    with pytest.raises(CheckpointError, match="is no SentencePiece model"):
        read_vocabulary("", tmp_path / "base")


def bpe(vocab: list[str], merges: list[str], kind: str = "BPE") -> str:
    document = json.loads(word_level({}))
    document["pre_tokenizer"] = {"type": "Metaspace", "replacement": "\u2581"} | {
        "prepend_scheme": "always",
        "split": True,
    }
    document["model"] = {"type": "BPE", "vocab": {w: i for i, w in enumerate(vocab)}}
    document["model"] |= {"merges": merges, "unk_token": None}
    if kind == "Unigram":
        scored = [[word, -1.0 - i] for i, word in enumerate(vocab)]
        document["model"] = {"type": "Unigram", "vocab": scored, "unk_id": 0}
    return json.dumps(document)


@pytest.mark.parametrize("kind", ["BPE", "Unigram"])
def test_a_union_can_be_written_by_its_tokenizer(kind: str, tmp_path: Path):
    """What the base's tokenizer makes of a text is merged further, nothing else."""
    from tokenizers import Tokenizer

    texts = {
        "base": bpe(["<u>", "\u2581", "a", "b", "ab"], ["a b"], kind),
        "a": bpe(
            ["<u>", "\u2581", "b", "a", "ab", "c", "ca", "abc"],
            ["a b", "c a", "ab c"],
            kind,
        ),
    }
    for i, (name, text) in enumerate(texts.items()):
        make(tmp_path / name, {"a": 0}, i, padding=7, files={"tokenizer.json": text})
    recipe = m3jax.Recipe(mixup=PLAIN, vocabulary="union")
    base, model, out = (str(tmp_path / name) for name in ("base", "a", "out"))
    m3jax.merge(base, [model], out, recipe)
    made = Tokenizer.from_file(out + "/tokenizer.json")
    tokens = ["<u>", "\u2581", "a", "b", "ab", "c", "ca", "abc"]
    assert made.get_vocab() == {token: i for i, token in enumerate(tokens)}
    assert made.encode("ab").tokens == ["\u2581", "ab"]
    assert made.encode("abca").tokens[-1] in ("a", "ca")
    assert read(Path(out))[EMBEDDING].shape == (8, WIDTH)


AB = {"a": 0, "b": 1}


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base and a model with a token more and ids of its own."""
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "base", AB, 0, eos_token_id=1)
    make(tmp_path / "a", {"b": 0, "a": 1, "c": 2}, 1, eos_token_id=2)
    return tmp_path


MERGE = (
    "merge",
    "--base=base",
    "--models=a",
    "--output=out",
    "--config.mixup.alpha=None",
)


@pytest.mark.parametrize(
    "flags, message",
    [
        ((), "lm_head.weight' has shape [2, 4] in base, [3, 4] in a (vocabulary"),
        (
            ("--config.vocabulary=untion",),
            "vocabulary='untion' needs one of error, mean, truncate, union, base, or",
        ),
        (
            ("--config.vocabulary=union", "--config.tokenizer.missing=c"),
            "tokenizer.missing='c' needs one of the models: base, a",
        ),
        (
            ("--config.vocabulary=union", "--tokenizer_from=a"),
            "tokenizer_from='a' and vocabulary='union', which has base's; leave one",
        ),
        (
            (
                "--config.vocabulary=union",
                "--config.tokenizer.tokens=(('x','base','c'),)",
            ),
            "tokenizer.tokens: x: base has no row for 'c', among its 2",
        ),
        (("--chat_template=nonsense",), "chat_template='nonsense' needs auto, alpaca"),
        (("--chat_template=no.jinja",), "--chat_template=no.jinja: No such file"),
        (("--chat_template={{ a",), "chat_template: not a Jinja template"),
        (
            ("--chat_template=chatml", "--copy_tokenizer=false"),
            "tokenizer.copy=False needs True, or no chat_template",
        ),
    ],
)
def test_misuse(flags: tuple[str, ...], message: str, pair: Path, run: Run):
    if "chat" in str(flags):
        flags = (*flags, "--config.vocabulary=union")
    ran = run(*MERGE, *flags)
    assert ran.code in (2, 3) and message in ran.error, ran.err
    assert not (pair / "out").exists()


def test_without_a_tokenizer_there_is_no_union(pair: Path, run: Run):
    (pair / "a" / "tokenizer.json").unlink()
    ran = run(*MERGE, "--config.vocabulary=union")
    assert ran.code == 3 and "a: has no tokenizer (tokenizer.json" in ran.error


def test_a_broken_tokenizer_is_one_line(pair: Path, run: Run):
    (pair / "a" / "tokenizer.json").write_text('{"model": {"vocab": {"a": []}}}')
    ran = run(*MERGE, "--config.vocabulary=union")
    assert ran.code == 3 and "a/tokenizer.json cannot be read (" in ran.error


def test_other_tokens_of_the_same_ids_are_refused(pair: Path, run: Run):
    """And merged by row where that is asked for, or where few differ: with a line."""
    ids = {f"w{i}": i for i in range(20)}
    make(pair / "base", ids, 0)
    make(pair / "a", {f"x{i}": i for i in range(20)}, 1)
    ran = run(*MERGE)
    assert ran.code == 3
    assert "differ in 20 of 20 tokens (id 0 is 'w0' in base and 'x0' in a)" in ran.error
    assert "set vocabulary to union, base or" in ran.error
    for policy in ("union", "base", "a", "mean", "truncate"):
        ran = run(*MERGE, f"--config.vocabulary={policy}", "--overwrite")
        assert ran.code == 0, ran.err
    assert "differ in 20 of 20 tokens" in ran.err
    make(pair / "a", {**{f"w{i}": i for i in range(19)}, "renamed": 19}, 1)
    ran = run(*MERGE, "--overwrite")
    assert ran.code == 0 and "differ in 1 of 20 tokens" in ran.err
    excluded = "--config.exclude=('lm_head.*','.*embed_tokens.*')"
    ran = run(*MERGE, "--overwrite", excluded)
    assert ran.code == 0 and "tokens" not in ran.err


def test_config_of_a_model_with_parts(pair: Path, run: Run):
    """vocab_size changes where it stands; the owner's ids of tokens come along."""
    config = {"text_config": {"vocab_size": 2, "eos_token_id": 1}, "eos_token_id": 1}
    (pair / "base" / "config.json").write_text(json.dumps(config))
    ran = run(*MERGE, "--config.vocabulary=a")
    assert ran.code == 0, ran.err
    assert json.loads((pair / "out" / "config.json").read_text()) == {
        "text_config": {"vocab_size": 3, "eos_token_id": 2},
        "eos_token_id": 2,
    }


def test_truncation_is_said(pair: Path, run: Run):
    config = {"vocab_size": 3, "pad_token_id": 2}
    (pair / "a" / "config.json").write_text(json.dumps(config))
    flags = ("--base=a", "--models=base", "--config.vocabulary=truncate")
    ran = run("merge", "--output=out", "--config.mixup.alpha=None", *flags)
    assert ran.code == 0, ran.err
    assert "lm_head.weight, model.embed_tokens.weight: truncated to 2 rows" in ran.err
    assert "a's tokenizer has tokens up to id 2, the output 2 rows" in ran.err
    written = json.loads((pair / "out" / "config.json").read_text())
    assert written == {"vocab_size": 2}


def test_excluded_tensors_have_the_same_rows(pair: Path, run: Run):
    ran = run(*MERGE, "--config.vocabulary=union", "--config.exclude=('lm_head.*',)")
    assert ran.code == 0, ran.err
    got, base, model = (read(pair / name) for name in ("out", "base", "a"))
    expected = np.concatenate([base[HEAD], model[HEAD][2:]])
    np.testing.assert_array_equal(got[HEAD], expected)


END = "{% for m in messages %}{{ m.content }}c{% endfor %}"


@pytest.fixture
def chatty(pair: Path) -> Path:
    """The model has a chat template, ends with its c, and says so in three files."""
    make(pair / "base", AB, 0, padding=1, eos_token_id=1)
    make(pair / "a", {**AB, "c": 2}, 1, eos_token_id=2)
    (pair / "a" / "chat_template.jinja").write_text(END)
    fields = {"eos_token_id": [1, 2], "temperature": 0.6}
    (pair / "a" / "generation_config.json").write_text(json.dumps(fields))
    return pair


def _written(folder: Path, name: str) -> Any:
    file = folder / "out" / name
    return json.loads(file.read_text()) if file.exists() else None


def test_what_does_not_go_along_is_said(chatty: Path, run: Run):
    make(chatty / "b", AB, 2, padding=1, eos_token_id=1)  # the models do not agree
    ran = run(*MERGE, "--models=b")
    assert ran.code == 0, ran.err
    for told in (
        "end token is [1] in base, b; [1, 2] in a",
        "chat template is none in",
    ):
        assert told in ran.err
    assert "the output has that of base; --tokenizer_from takes another" in ran.err
    ran = run(*MERGE, "--models=b", "--copy_tokenizer=false", "--overwrite")
    assert ran.code == 0 and "note" not in ran.err
    assert not (chatty / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize("name", ["a", "a/"])
def test_tokenizer_from(name: str, chatty: Path, run: Run):
    ran = run(*MERGE, f"--tokenizer_from={name}")
    assert ran.code == 0 and "--tokenizer_from" not in ran.err
    assert _written(chatty, "config.json")["eos_token_id"] == 2
    generated = {"eos_token_id": [1, 2], "temperature": 0.6, "do_sample": True}
    assert _written(chatty, "generation_config.json") == generated
    assert "temperature=0.6 without do_sample" in ran.err
    assert (chatty / "out" / "chat_template.jinja").read_text() == END


def test_chat_template_from_a_model(chatty: Path, run: Run):
    """Its end tokens come along, by the output's ids of them."""
    make(chatty / "base", {"b": 0, "a": 1}, 0, eos_token_id=0)
    ran = run(*MERGE, "--chat_template=a", "--config.vocabulary=union")
    assert ran.code == 0, ran.err
    assert _written(chatty, "generation_config.json")["eos_token_id"] == [0, 2]
    assert _written(chatty, "config.json")["eos_token_id"] == [0, 2]
    assert (chatty / "out" / "chat_template.jinja").read_text() == END


def test_named_chat_templates_end(chatty: Path, run: Run):
    ids = {**AB, "<|im_end|>": 2}
    settings = {"tokenizer_config.json": '{"chat_template": "old"}'}
    make(chatty / "base", ids, 0, eos_token_id=1, files=settings)
    make(chatty / "a", ids, 1, eos_token_id=1)
    ran = run(*MERGE, "--chat_template=chatml")
    assert ran.code == 0, ran.err
    assert _written(chatty, "config.json")["eos_token_id"] == [1, 2]
    assert _written(chatty, "tokenizer_config.json") == {}
    ran = run(*MERGE, "--chat_template=llama3", "--overwrite")
    assert ran.code == 0 and "<|eot_id|>, which is no token of" in ran.err


@pytest.mark.parametrize(
    "fields, mended",
    [
        ({"temperature": 0.6}, {"temperature": 0.6, "do_sample": True}),
        ({"do_sample": False, "top_k": 50, "temperature": 1.0}, None),
        ({"pad_token_id": -1, "eos_token_id": 2}, {"eos_token_id": 2}),
        ({"max_new_tokens": 0}, {}),
        ({"early_stopping": True}, {}),
        ({"num_beams": 4, "early_stopping": True, "length_penalty": 2.0}, None),
        ({"num_return_sequences": 3}, {}),
        ({"num_return_sequences": 3, "do_sample": True}, None),
        ({"num_return_sequences": 3, "num_beams": 2}, {"num_beams": 2}),
    ],
)
def test_generation_config_is_mended(fields, mended):
    text = json.dumps(fields).encode()
    made, notes = generation.mended(text)
    assert made is not None
    assert json.loads(made) == (fields if mended is None else mended)
    assert (made == text) == (not notes) == (mended is None)
    from transformers import GenerationConfig

    GenerationConfig(**json.loads(made)).validate(strict=True)


def test_a_generation_config_that_is_no_json_is_left_out():
    made, (note,) = generation.mended(b'{"eos_token_id": ')
    assert made is None and note.endswith("it is left out")


def test_resuming_looks_at_the_tokenizers(pair: Path):
    """An interrupted merge goes on only with the rows that it began with."""
    recipe = m3jax.Recipe(mixup=PLAIN, vocabulary="union")

    def now() -> str:
        with prepare("base", ["a"], recipe, 0, m3jax.Execution()) as prepared:
            return fingerprint(prepared)

    before = now()
    assert now() == before
    (pair / "a" / "tokenizer.json").write_text(word_level({"c": 0, "b": 1, "a": 2}))
    assert now() != before


def test_pytrees_have_no_tokens():
    tree = {"lm_head": {"weight": np.ones((2, 2), np.float32)}}
    with pytest.raises(m3jax.RecipeError, match="pytrees have no tokenizers"):
        m3jax.merge_params(tree, [tree], m3jax.Recipe(vocabulary="union"))
