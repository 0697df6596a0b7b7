"""What stands beside the tensors goes along: what is named, or what models agree on."""

import contextlib
import json

import numpy as np
import pytest
from checkpoints import encode, random_model, write

import m3jax
from m3jax.checkpoints import side_files
from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.folder import open_checkpoint
from m3jax.engine import differences
from m3jax.engine.verify import verify

PLAIN = m3jax.Recipe(mixup=m3jax.Mixup(alpha=None))
TENSORS = {"w": np.ones((2, 2), np.float32)}
CODE = {
    "modeling_x.py": "from .configuration_x import XConfig\nfrom .ops import f\n",
    "configuration_x.py": "import torch\nraise RuntimeError('is run')\n",
    "ops.py": "  from .deep import g\n",
    "deep.py": "",
    "tokenization_x.py": "from os import system\n",
}
NOT_NAMED = {"train.py": "", "os.py": "", ".env": "SECRET", "optimizer.pt": "x"}
ENCODER = {
    "modules.json": json.dumps(
        [
            {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.P"},
            {"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
            {"idx": 3, "path": "3_Normalize", "type": "sentence_transformers.models.N"},
        ]
    ),
    "config_sentence_transformers.json": "{}",
    "sentence_bert_config.json": '{"max_seq_length": 64}',
    "1_Pooling/config.json": '{"pooling_mode_cls_token": true}',
    "2_Dense/config.json": "{}",
    "2_Dense/model.safetensors": "not looked at",
}


def put(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.fixture
def merge(tmp_path):
    """Merges a and b; the files of each are given. Returns the output's files."""

    def run(base, a=None, b=None, config=None, **execution):
        for name, files in (("base", base), ("a", a or {}), ("b", b or {})):
            if files is not None:
                write(tmp_path / name, TENSORS, config)
                put(tmp_path / name, files)
        output = tmp_path / "out"
        m3jax.merge(
            None if base is None else tmp_path / "base",
            [tmp_path / "a", tmp_path / "b"],
            output,
            PLAIN,
            execution=m3jax.engine.execution.Execution(**execution),
        )
        assert verify(output) == []
        return {
            str(path.relative_to(output)): path.read_bytes()
            for path in output.rglob("*")
            if path.is_file()
        }

    return run


OURS = {"model.safetensors", "README.md", "m3jax.json"}


def test_code_that_is_named_goes_along_and_never_runs(merge):
    config = {
        "auto_map": {
            "AutoConfig": "configuration_x.XConfig",
            "AutoModel": "modeling_x.X",
            "AutoModelForCausalLM": "other/repo--modeling_y.Y",
        }
    }
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_x.T", None]}}
    files = {
        **CODE,
        "tokenizer_config.json": json.dumps({**tokenizer, "vocab_file": "odd.vocab"}),
        "odd.vocab": "a",
        "qwen.tiktoken": "aGk= 0",
        "tiktoken.model": "aGk= 0",
    }
    made = merge({**files, **NOT_NAMED, "modeling_y.py": ""}, config=config)
    assert made.keys() == {*OURS, *files, "config.json"}
    assert all(made[name] == content.encode() for name, content in files.items())


def test_json_that_is_none_is_refused(merge):
    files = {"tokenizer_config.json": "{oops", "tokenizer.json": "{}"}
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: is not valid"):
        merge(files)


def test_a_dense_layer_of_another_is_not_merged_in_silence(tmp_path):
    modules = json.dumps([{"path": ""}, {"path": "2_Dense"}])
    for i, name in enumerate(("base", "a", "b")):
        write(tmp_path / name, random_model(i, {"w.weight": (2, 2)}))
        (tmp_path / name / "modules.json").write_text(modules)
        (tmp_path / name / "2_Dense").mkdir()
        weights = encode({"linear.weight": np.full(2, i // 2, np.float32)})
        (tmp_path / name / "2_Dense" / "model.safetensors").write_bytes(weights)
    folders = [str(tmp_path / name) for name in ("base", "a", "b")]
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(open_checkpoint(own)) for own in folders]
        (line,) = differences.found(opened, (), opened[0])
    assert line == (
        f"2_Dense/model.safetensors is another in {folders[2]}; it is not merged, the "
        f"output has that of {folders[0]}"
    )


def test_nothing_outside_the_folder_is_named(merge, tmp_path):
    (tmp_path / "secret.py").write_text("private")
    config = {
        "auto_map": {
            "a": "../secret.X",
            "b": "/etc/passwd",
            "c": f"{tmp_path}/secret.X",
            "d": "sub/secret.X",
            "e": [["deep", {"f": "..secret.X"}]],
            "g": 3,
        }
    }
    files = {"tokenizer_config.json": json.dumps({"vocab_file": "../secret.py"})}
    assert merge(files, config=config).keys() == {*OURS, *files, "config.json"}


def test_code_that_is_a_link_out_of_the_folder_is_refused(merge, tmp_path):
    write(tmp_path / "base", TENSORS, {"auto_map": {"a": "secret.X"}})
    (tmp_path / "secret").write_text("private")
    (tmp_path / "base" / "secret.py").symlink_to(tmp_path / "secret")
    for name in "ab":
        write(tmp_path / name, TENSORS)
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        m3jax.merge(tmp_path / "base", [tmp_path / "a", tmp_path / "b"], tmp_path / "o")


@pytest.mark.parametrize("inner", ["1_Pooling", "additional_chat_templates"])
def test_a_folder_that_is_a_link_is_refused(inner, tmp_path):
    write(tmp_path / "m", TENSORS)
    put(tmp_path / "m", {"modules.json": ENCODER["modules.json"]})
    put(tmp_path / "elsewhere", {"config.json": "private", "x.jinja": "private"})
    (tmp_path / "m" / inner).symlink_to(tmp_path / "elsewhere")
    owners = dict.fromkeys(side_files.names_of(tmp_path / "m"), tmp_path / "m")
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        side_files.check_side_files(owners)


def test_the_modules_of_sentence_transformers_go_along(merge, tmp_path):
    more = {"additional_chat_templates/tools.jinja": "{{ x }}", "LICENSE": "Apache"}
    made = merge({**ENCODER, **more, "4_Other/config.json": "{}"})
    assert made.keys() == {*OURS, *ENCODER, *more}
    again = m3jax.engine.execution.Execution(overwrite=True)
    models = [tmp_path / "a", tmp_path / "b"]
    out = tmp_path / "out"
    m3jax.merge(tmp_path / "base", models, out, PLAIN, execution=again)
    (out / "1_Pooling" / "mine.txt").write_text("a user's")
    with pytest.raises(CheckpointError, match="'1_Pooling/mine"):
        m3jax.merge(tmp_path / "base", models, out, PLAIN, execution=again)


CHAT = {"chat_template.jinja": "{{ messages }}", "NOTICE": "n"}


class TestTheirs:
    """Where the base has none and the models agree."""

    def test_what_all_models_have_goes_along(self, merge):
        made = merge({}, CHAT, CHAT)
        assert made.keys() == {*OURS, *CHAT}

    def test_what_they_differ_in_does_not(self, merge):
        made = merge({}, CHAT, {**CHAT, "chat_template.jinja": "other"})
        assert made.keys() == {*OURS, "NOTICE"}

    def test_what_one_of_them_has_does_not(self, merge):
        assert merge({}, CHAT, {}).keys() == OURS

    def test_the_bases_own_stays(self, merge):
        made = merge({"chat_template.jinja": "base's"}, CHAT, CHAT)
        assert made["chat_template.jinja"] == b"base's"

    def test_a_template_within_the_configuration_is_one(self, merge):
        own = {"tokenizer_config.json": '{"chat_template": "base\'s"}'}
        made = merge(own, CHAT, CHAT)
        assert made.keys() == {*OURS, *own, "NOTICE"}

    def test_no_part_of_a_tokenizer_beside_another(self, merge):
        theirs = {"tokenizer.model": "m", "added_tokens.json": "{}"}
        made = merge({"tokenizer.json": "{}"}, theirs, theirs)
        assert made.keys() == {*OURS, "tokenizer.json"}

    def test_no_part_of_a_tokenizer_that_they_differ_in(self, merge):
        a = {"tokenizer.json": "{}", "tokenizer_config.json": "{}"}
        made = merge({}, a, {**a, "tokenizer_config.json": '{"x": 1}'})
        assert made.keys() == OURS

    def test_sentence_transformers_of_a_plain_base(self, merge):
        made = merge({}, ENCODER, ENCODER)
        assert made.keys() == {*OURS, *ENCODER}

    def test_other_poolings_leave_no_half(self, merge):
        made = merge({}, ENCODER, {**ENCODER, "1_Pooling/config.json": "{}"})
        assert made.keys() == OURS

    def test_without_a_base_the_first_models_are_written(self, merge):
        made = merge(
            None, {"tokenizer.json": "{}"}, {"tokenizer.json": "[]", "NOTICE": ""}
        )
        assert made.keys() == {*OURS, "tokenizer.json"}


def test_another_models_tokenizer_comes_with_its_code(merge, tmp_path):
    theirs = {
        "tokenizer.json": '{"theirs": 1}',
        "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["tok.T", null]}}',
        "tok.py": "",
    }
    made = merge(
        {"tokenizer.json": "{}", "LICENSE": "base's", "merges.txt": "base's"},
        {**theirs, "LICENSE": "a's"},
        tokenizer_from=str(tmp_path / "a"),
    )
    assert made.keys() == {*OURS, *theirs, "LICENSE"}
    assert made["LICENSE"] == b"base's"
    assert made["tokenizer.json"] == theirs["tokenizer.json"].encode()


def test_a_byte_order_mark_is_left_out(merge):
    """Editors write it, and transformers refuses it."""
    made = merge({"config.json": "\ufeff{}", "tokenizer.json": "\ufeff{}"})
    assert made["config.json"] == made["tokenizer.json"] == b"{}"


def test_a_folder_of_links_to_the_hubs_blobs(tmp_path):
    """As older versions of the hub's library made them, and within a snapshot."""
    write(tmp_path / "real", TENSORS, {"a": 1})
    blobs = tmp_path / "hub" / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    old, snapshot = tmp_path / "old", blobs.parent / "snapshots" / "c" / "transformer"
    for folder in (old, snapshot):
        folder.mkdir(parents=True)
    for path in (tmp_path / "real").iterdir():
        (blobs / f"sha-{path.name}").write_bytes(path.read_bytes())
        (old / path.name).symlink_to(blobs / f"sha-{path.name}")
        (snapshot / path.name).symlink_to(f"../../../blobs/sha-{path.name}")
    m3jax.merge(old, [old, snapshot], tmp_path / "out", PLAIN)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"a": 1}
