"""`m3jax verify` finds whatever was changed in a merge, and survives any record."""

import json
import os
import shutil

import numpy as np
import pytest
from checkpoints import BFLOAT16, ODD_SHAPES, decode, encode, random_model, write
from command_line import Run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import m3jax
from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.record.record import parse_record

INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A merge of three shards with a configuration and a tokenizer."""
    folder = tmp_path_factory.mktemp("verify")
    base = random_model(0, dtype=BFLOAT16)
    write(folder / "base", base, config={"architectures": ["LlamaForCausalLM"]})
    (folder / "base" / "tokenizer.json").write_text('{"version": "1.0"}')
    for seed, name in ((1, "a"), (2, "b")):
        write(folder / name, random_model(seed, dtype=BFLOAT16, base=base))
    models = [folder / "a", folder / "b"]
    recipe = m3jax.Recipe(max_shard_size="9KB", exclude=(r"model\.layers\.1\.",))
    m3jax.merge(folder / "base", models, folder / "merged", recipe, seed=7)
    files = sorted(path.name for path in (folder / "merged").glob("*.safetensors"))
    assert files == SHARDS
    return folder / "merged"


@pytest.fixture
def merged(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "merged")


def record(folder):
    return json.loads((folder / "m3jax.json").read_bytes())


def rewrite(folder, file, change):
    """Writes a shard anew, its tensors changed by `change(tensors)`."""
    tensors = {k: v.copy() for k, v in decode((folder / file).read_bytes()).items()}
    change(tensors)
    (folder / file).write_bytes(encode(tensors))


def test_a_merge_verifies(merged, run: Run):
    assert m3jax.verify(merged) == []
    assert m3jax.verify(str(merged), threads=1) == []
    ran = run("verify", merged)
    assert ran.code == 0
    assert ran.out == f"{merged}: every tensor and file is as m3jax.json records it\n"


def test_tensors_larger_than_a_block(merged, monkeypatch):
    monkeypatch.setattr("m3jax.checkpoints.source._HASHED", 1001)
    assert m3jax.verify(merged) == []


def test_a_merge_into_one_file_verifies(pristine, tmp_path):
    source = pristine.parent
    models = [source / "a", source / "b"]
    m3jax.merge(source / "base", models, tmp_path / "one")
    assert m3jax.verify(tmp_path / "one") == []
    shutil.copy(pristine / INDEX, tmp_path / "one")
    (problem,) = m3jax.verify(tmp_path / "one")
    assert problem == f"{INDEX}: is not recorded; the checkpoint is one file"


def test_what_is_not_part_of_a_checkpoint_is_ignored(merged):
    (merged / "notes.txt").write_text("mine")
    (merged / "logs").mkdir()
    (merged / "logs" / "x.safetensors").write_text("mine")
    assert m3jax.verify(merged) == []


@pytest.mark.parametrize(
    "name", [n for n, shape in ODD_SHAPES.items() if 0 not in shape]
)
def test_one_bit_of_any_tensor(merged, run: Run, name):
    entry = record(merged)["tensors"][name]
    shard = merged / entry["file"]
    content = bytearray(shard.read_bytes())
    length = int.from_bytes(content[:8], "little")
    offsets = json.loads(content[8 : 8 + length])[name]["data_offsets"]
    content[8 + length + offsets[1] - 1] ^= 1
    shard.write_bytes(content)
    (problem,) = m3jax.verify(merged)
    assert problem.startswith(f"{entry['file']}: tensor '{name}' has checksum ")
    assert problem.endswith(f", recorded is {entry['checksum']}")
    ran = run("verify", merged)
    assert ran.code == 1
    assert ran.out.splitlines() == [
        problem,
        f"{merged}: 1 difference from its record, m3jax.json",
    ]


def test_another_dtype_and_shape(merged):
    file = record(merged)["tensors"]["model.norm.weight"]["file"]

    def change(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)

    rewrite(merged, file, change)
    (problem,) = m3jax.verify(merged)
    assert problem == (
        f"{file}: tensor 'model.norm.weight' is F32 of shape '[3]', recorded is 'BF16' "
        "of shape '[3]'"
    ).replace("'[3]'", "[3]")

    def reshape(tensors):
        weight = tensors["model.norm.weight"].astype(BFLOAT16)
        tensors["model.norm.weight"] = weight.reshape(3, 1)

    rewrite(merged, file, reshape)
    (problem,) = m3jax.verify(merged)
    assert "is BF16 of shape [3, 1], recorded is 'BF16' of shape [3]" in problem


def test_missing_extra_and_moved_tensors(merged):
    name = "model.layers.1.scale"
    file = record(merged)["tensors"][name]["file"]
    other = next(shard for shard in SHARDS if shard != file)
    rewrite(merged, file, lambda tensors: tensors.pop(name))
    extra = {name: np.ones((), BFLOAT16), "new": np.ones(2, np.float32)}
    rewrite(merged, other, lambda tensors: tensors.update(extra))
    assert sorted(m3jax.verify(merged)) == sorted(
        [
            f"{file}: lacks tensor '{name}'",
            f"{other}: holds tensor '{name}', which is not recorded",
            f"{other}: holds tensor 'new', which is not recorded",
        ]
    )


def test_extra_files_of_tensors(merged):
    (merged / "more.safetensors").write_bytes(b"whatever")
    (problem,) = m3jax.verify(merged)
    assert problem == "'more.safetensors': a safetensors file that is not recorded"


def test_everything_at_once(merged, run: Run):
    """All problems are listed, whatever the others are."""
    (merged / SHARDS[0]).unlink()
    cut = (merged / SHARDS[1]).read_bytes()[:-1]
    (merged / SHARDS[1]).write_bytes(cut)
    rewrite(merged, SHARDS[2], lambda tensors: tensors.update(new=np.ones(1, np.int8)))
    (merged / "README.md").write_text("changed")
    (merged / "tokenizer.json").unlink()
    (merged / INDEX).write_text("{")
    problems = m3jax.verify(merged)
    found = "\n".join(problems)
    assert len(problems) == 6
    assert f"file '{SHARDS[0]}' is missing" in found
    assert f"{SHARDS[1]}: declares data through byte {len(cut) + 1}" in found
    assert f"{SHARDS[2]}: holds tensor 'new', which is not recorded" in found
    assert "README.md: has checksum" in found
    assert "file 'tokenizer.json' is missing" in found
    assert f"{INDEX}" in found
    assert not any("\n" in problem for problem in problems)
    ran = run("verify", merged)
    assert (ran.code, len(ran.out.splitlines())) == (1, 7)


def test_index(merged):
    index = json.loads((merged / INDEX).read_text())
    weight_map = index["weight_map"]
    weight_map["new"] = weight_map.pop("model.norm.weight")
    file = weight_map["lm_head.weight"]
    other = next(shard for shard in SHARDS if shard != file)
    weight_map["lm_head.weight"] = other
    (merged / INDEX).write_text(json.dumps(index))
    assert m3jax.verify(merged) == [
        f"{INDEX}: tensor 'lm_head.weight' is in '{other}', recorded is '{file}'",
        f"{INDEX}: tensor 'model.norm.weight' is in 'no file', recorded is "
        f"'{record(merged)['tensors']['model.norm.weight']['file']}'",
        f"{INDEX}: tensor 'new' is in '{weight_map['new']}', recorded is 'no file'",
    ]
    (merged / INDEX).unlink()
    assert m3jax.verify(merged) == [f"{INDEX}: is missing"]


def test_links_and_strange_files(merged, tmp_path):
    outside = tmp_path / "outside"
    shutil.move(merged / SHARDS[0], outside)
    (merged / SHARDS[0]).symlink_to(outside)
    (merged / SHARDS[1]).unlink()
    os.mkfifo(merged / SHARDS[1])
    (merged / "tokenizer.json").unlink()
    (merged / "tokenizer.json").mkdir()
    link, fifo, folder = m3jax.verify(merged)
    assert "a link that leads out of the folder" in link
    assert "is a FIFO" in fifo
    assert "is a folder" in folder


def test_without_a_record(tmp_path, run: Run):
    plain = write(tmp_path / "plain", random_model(0))
    for path in (plain, plain / "model.safetensors"):
        ran = run("verify", path)
        assert ran.code == 3
        assert f"{path}: has no m3jax.json" in ran.error
    with pytest.raises(CheckpointError, match="no such file or folder"):
        m3jax.verify(tmp_path / "nowhere")


@pytest.mark.parametrize("arguments", [(), ("a", "b")])
def test_misuse(run: Run, arguments):
    ran = run("verify", *arguments)
    assert ran.code == 2
    assert "needs one checkpoint" in ran.error


def tensor(**fields):
    def change(content):
        content["tensors"]["model.norm.weight"].update(fields)

    return change


def top(**fields):
    return lambda content: content.update(fields)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (top(format=2), "has format 2, this m3jax reads 1"),
        (top(format=True), "has format True"),
        (top(format=None), "has format None"),
        (top(seed=-1), "seed=-1 needs 0 to 2**32 - 1"),
        (top(seed=10**4000), "needs 0 to 2**32 - 1"),
        (top(seed=True), "seed=True needs"),
        (top(ratios={"": []}), "ratios={'': []} needs null, or numbers"),
        (top(ratios={"": [0.5, "0.5"]}), "ratios="),
        (top(ratios=[0.5]), "ratios="),
        (top(base={}), "base={} needs null, or path"),
        (top(models=[]), "models=[] needs a list of"),
        (top(models={}), "models={} needs a list of"),
        (top(recipe=[]), "recipe=[] needs the fields of a recipe"),
        (top(recipe={"exclude": 10**400}), "recipe="),
        (top(recipe={"method": json.loads("[" * 200 + "]" * 200)}), "recipe="),
        (top(versions={"m3jax": 1}), "versions="),
        (top(checksum="md5"), "checksum='md5' needs xxh3_128"),
        (top(tokenizer_from=3), "tokenizer_from=3 needs null"),
        (top(tensors=[]), "tensors must map names"),
        (top(files=None), "files must map names"),
        (top(files={"../../etc/passwd": "0" * 32}), "files: '../../etc/passwd' has"),
        (top(files={"/etc/passwd": "0" * 32}), "files: '/etc/passwd' has"),
        (top(files={"a\nb": "0" * 32}), "files: 'a\\nb' has"),
        (top(files={"README.md": "0" * 31}), "needs a plain file name"),
        (lambda content: content.pop("seed"), "seed is missing"),
        (tensor(file="../x.safetensors"), "'../x.safetensors'"),
        (tensor(file="..\\x.safetensors"), "needs file, dtype, shape"),
        (tensor(file="m3jax.json"), "tensors: 'model.norm.weight' has"),
        (tensor(file=None), "tensors: 'model.norm.weight' has"),
        (tensor(dtype=["BF16"]), "tensors: 'model.norm.weight' has"),
        (tensor(shape=3), "tensors: 'model.norm.weight' has"),
        (tensor(shape=[3.0]), "tensors: 'model.norm.weight' has"),
        (tensor(shape=[-3]), "tensors: 'model.norm.weight' has"),
        (tensor(shape=[True]), "tensors: 'model.norm.weight' has"),
        (tensor(shape=[2**64]), "tensors: 'model.norm.weight' has"),
        (tensor(checksum="z" * 32), "tensors: 'model.norm.weight' has"),
        (tensor(checksum=0), "tensors: 'model.norm.weight' has"),
        (tensor(more=0), "tensors: 'model.norm.weight' has"),
    ],
)
def test_a_record_that_m3jax_did_not_write(merged, run: Run, change, said):
    content = record(merged)
    change(content)
    (merged / "m3jax.json").write_text(json.dumps(content))
    ran = run("verify", merged)
    assert ran.code == 3
    assert said in ran.error
    assert "m3jax.json" in ran.error
    assert len(ran.error) < 600


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'{"format": 1, "format": 1}',
        b"[" * 10**5,
        b"1" * 9999,
    ],
)
def test_a_record_that_is_no_json(merged, run: Run, text):
    (merged / "m3jax.json").write_bytes(text)
    ran = run("verify", merged)
    assert ran.code == 3
    assert "m3jax.json" in ran.error


def test_a_record_that_is_no_file(merged, run: Run):
    (merged / "m3jax.json").unlink()
    os.mkfifo(merged / "m3jax.json")
    ran = run("verify", merged)
    assert ran.code == 3
    assert "is a FIFO" in ran.error


def test_recorded_sizes_allocate_nothing(merged):
    content = record(merged)
    entry = content["tensors"]["model.norm.weight"]
    entry["shape"] = [2**63, 2**63]
    (merged / "m3jax.json").write_text(json.dumps(content))
    (problem,) = m3jax.verify(merged)
    assert "recorded is 'BF16' of shape [9223372036854775808" in problem


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_record_is_read_or_refused(pristine, data):
    """One value anywhere in a record is replaced: no other exception may come."""
    content = record(pristine)
    place, key = {"": content}, ""
    while (
        isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans())
    ):
        place = place[key]
        keys = range(len(place)) if isinstance(place, list) else sorted(place)
        key = data.draw(st.sampled_from(keys))
    place[key] = data.draw(JSON)
    if isinstance(content, dict):
        try:
            parse_record(content, "m3jax.json")
        except CheckpointError as error:
            assert len(str(error)) < 600
            assert "\n" not in str(error)
