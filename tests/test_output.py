"""The output folder: the safetensors library's bytes, side files, record, its place."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import xxhash

import m3jax
from m3jax import CheckpointError, Recipe
from m3jax.engine.execution import Execution
from m3jax.engine.progress import Progress

KEEP_BASE = Recipe(method="task_arithmetic", scaling=0.0, mixup=m3jax.Mixup(alpha=None))
TENSORS = {
    **checkpoints.random_model(0),
    **checkpoints.random_model(1, {"half.weight": (33,)}, np.float16),
    **checkpoints.random_model(2, {"brain.weight": (5, 13)}, checkpoints.BFLOAT16),
    **checkpoints.random_model(3, {"double.weight": (3, 1)}, np.float64),
    "position_ids": np.arange(17)[None],
    "steps": np.array(3, np.int32),
    "mask": np.array([True, False, True]),
    "bytes": np.arange(7, dtype=np.uint8),
    "modèle.層.weight": np.float32([1, 2]),
    'quoted".weight\\': np.float32([3]),
}
# The merge writes float64 from float32: these values have to be exact in both.
TENSORS["double.weight"] = TENSORS["double.weight"].astype(np.float32).astype(float)

SIDE_FILES = {
    "config.json": '{"vocab_size": 131, "architectures": ["LlamaForCausalLM"]}',
    "generation_config.json": '{"do_sample": true}',
    "tokenizer.json": '{"version": "1.0"}',
    "tokenizer_config.json": '{"model_max_length": 7}',
    "tokenizer.model": "\x00binary",
    "special_tokens_map.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "vocab.json": "{}",
    "merges.txt": "a b",
}
OVERWRITE = Execution(overwrite=True)
LAYERS = ("0.norm.weight", "1.scale", "10.mlp.up_proj.weight")
NOT_COPIED = ["modeling_llama.py", "pytorch_model.bin", "training_args.bin", ".env"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "model"
    checkpoints.write(folder, TENSORS)
    for name in [*SIDE_FILES, *NOT_COPIED]:
        (folder / name).write_text(SIDE_FILES.get(name, "not this"))
    return folder


@pytest.fixture
def other(tmp_path: Path) -> Path:
    folder = checkpoints.write(tmp_path / "other", TENSORS, {"vocab_size": 131})
    (folder / "tokenizer.json").write_text('{"version": "other"}')
    return folder


def test_one_file_is_the_librarys(model: Path, tmp_path: Path):
    m3jax.merge(model, [model, model], tmp_path / "merged", KEEP_BASE)
    written = (tmp_path / "merged" / "model.safetensors").read_bytes()
    assert written == checkpoints.encode(TENSORS)
    assert not list((tmp_path / "merged").glob("*.index.json"))


@pytest.mark.parametrize("limit", [1000, "9KB", 17_000])
def test_shards_are_the_librarys(limit: int | str, model: Path, tmp_path: Path):
    recipe = dataclasses.replace(KEEP_BASE, max_shard_size=limit)
    m3jax.merge(model, [model], tmp_path / "merged", recipe)
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    count = len(files)
    assert [file.name for file in files] == [
        f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
    ]
    assert count > 1
    weight_map = {}
    for file in files:
        tensors = checkpoints.decode(file.read_bytes())
        originals = {name: TENSORS[name] for name in tensors}
        assert file.read_bytes() == checkpoints.encode(originals)
        weight_map.update(dict.fromkeys(tensors, file.name))
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert len(tensors) == 1 or size <= m3jax.recipe.parse_size(limit)
    index_file = tmp_path / "merged" / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    assert index == {
        "metadata": {"total_size": sum(t.nbytes for t in TENSORS.values())},
        "weight_map": weight_map,
    }
    assert list(index["weight_map"]) == sorted(weight_map)
    layers = [weight_map[f"model.layers.{name}"] for name in LAYERS]
    assert layers == sorted(layers), "layer 10 stands behind layer 1"


def test_a_single_file_as_input(model: Path, tmp_path: Path):
    m3jax.merge(None, [model / "model.safetensors"], tmp_path / "merged")
    merged = checkpoints.read(tmp_path / "merged")
    assert merged["brain.weight"].tobytes() == TENSORS["brain.weight"].tobytes()


def test_side_files_are_the_bases(model: Path, other: Path, tmp_path: Path):
    m3jax.merge(model, [other, other], tmp_path / "merged", KEEP_BASE)
    files = {path.name for path in (tmp_path / "merged").iterdir()}
    assert files == {*SIDE_FILES, "model.safetensors", "m3jax.json", "README.md"}
    for name, content in SIDE_FILES.items():
        assert (tmp_path / "merged" / name).read_text() == content


def test_tokenizer_from_a_model(model: Path, other: Path, tmp_path: Path):
    """Its tokenizer files and no other's; config.json stays the base's."""
    execution = Execution(tokenizer_from=str(other))
    m3jax.merge(
        model, [other, model], tmp_path / "merged", KEEP_BASE, execution=execution
    )
    files = {path.name for path in (tmp_path / "merged").iterdir()}
    known = {"config.json", "model.safetensors", "m3jax.json", "README.md"}
    assert files == {"tokenizer.json", *known}
    for folder, name in ((other, "tokenizer.json"), (model, "config.json")):
        written = (tmp_path / "merged" / name).read_text()
        assert written == (folder / name).read_text()
    with pytest.raises(CheckpointError, match="tokenizer_from=nobody needs 'base' or"):
        m3jax.merge(
            model,
            [model],
            tmp_path / "no",
            KEEP_BASE,
            execution=Execution(tokenizer_from="nobody"),
        )


def test_without_a_base_the_first_model_gives_the_side_files(
    model: Path, other: Path, tmp_path: Path
):
    m3jax.merge(None, [other, model], tmp_path / "merged")
    written = (tmp_path / "merged" / "tokenizer.json").read_text()
    assert written == '{"version": "other"}'


@pytest.mark.parametrize("limit", ["5GB", "9KB"])
def test_record(limit: str, model: Path, other: Path, tmp_path: Path):
    recipe = Recipe(
        method="ties",
        mixup=m3jax.Mixup(alpha=0.4, granularity="layer"),
        dare=m3jax.Dare(drop_rate=(0.1, 0.2)),
        exclude=("mask",),
        max_shard_size=limit,
    )
    output = tmp_path / "merged"
    result = m3jax.merge(model, [model, other], output, recipe, seed=9)
    record = json.loads((output / "m3jax.json").read_text())
    assert Recipe.from_dict(record["recipe"]) == recipe
    assert record["seed"] == 9
    assert record["format"] == 1
    assert record["ratios"]["model.layers.10"] == list(result.ratios["model.layers.10"])
    assert set(record["versions"]) == {"m3jax", "python", "jax", "jaxlib", "numpy"}
    assert record["versions"]["m3jax"] == m3jax.__version__
    assert [record["base"]["path"], *(m["path"] for m in record["models"])] == [
        str(model),
        str(model),
        str(other),
    ]
    size = (model / "model.safetensors").stat().st_size
    assert record["base"]["files"] == {"model.safetensors": size}
    assert record["checksum"] == "xxh3_128"
    tensors = checkpoints.read(output)
    assert set(record["tensors"]) == set(tensors)
    for name, tensor in tensors.items():
        entry = record["tensors"][name]
        assert entry["checksum"] == xxhash.xxh3_128(tensor.tobytes()).hexdigest()
        assert entry["checksum"] == result.checksums[name]
        assert tuple(entry["shape"]) == tensor.shape
        file = output / entry["file"]
        assert name in checkpoints.decode(file.read_bytes())
    side = {*SIDE_FILES, "README.md"}
    assert set(record["files"]) == side
    for name in side:
        content = (output / name).read_bytes()
        assert record["files"][name] == xxhash.xxh3_128(content).hexdigest()


def test_record_of_inputs_tells_them_apart(model: Path, tmp_path: Path):
    """The checksum of what was read changes with a bit of it."""
    changed = {name: tensor.copy() for name, tensor in TENSORS.items()}
    changed["brain.weight"][4, 12] *= -1
    checkpoints.write(tmp_path / "changed", changed)
    recipe = Recipe(method="task_arithmetic")
    models = [model, tmp_path / "changed", model]
    m3jax.merge(model, models, tmp_path / "merged", recipe)
    record = json.loads((tmp_path / "merged" / "m3jax.json").read_text())
    first, second, third = (entry["checksum"] for entry in record["models"])
    assert first == third != second


def test_model_card(model: Path, other: Path, tmp_path: Path):
    yaml = pytest.importorskip("yaml")
    recipe = Recipe(mixup=m3jax.Mixup(alpha=0.3), scaling=0.25)
    m3jax.merge(model, [model, other], tmp_path / "merged", recipe, seed=77)
    card = (tmp_path / "merged" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "tags": ["merge", "m3jax", "average"],
    }
    record = json.loads((tmp_path / "merged" / "m3jax.json").read_text())
    for ratio in record["ratios"][""]:
        assert f"{ratio:.9g}" in body
    assert "Seed 77." in body
    block = body.split("```json\n")[1].split("```")[0]
    assert Recipe.from_dict(json.loads(block)) == recipe
    assert str(other) in body


def test_nothing_has_the_final_name_before_it_is_complete(model: Path, tmp_path: Path):
    output = tmp_path / "merged"
    seen = []

    class Watch(Progress):
        def stage(self, label: str, total: int) -> None:
            seen.append((label, output.exists()))

        def advance(self, count: int) -> None:
            seen.append(("advance", output.exists()))

    recipe = Recipe(method="ties")
    m3jax.merge(model, [model, model], output, recipe, progress=Watch())
    labels = {label for label, _ in seen}
    assert {"merging", "advance", "measuring, pass 1"} <= labels
    assert not any(exists for _, exists in seen)
    assert sorted(tmp_path.iterdir()) == [output]


def test_progress_adds_up(model: Path, tmp_path: Path):
    """Each stage advances by exactly the bytes it announced."""
    announced: list[list[int]] = []

    class Count(Progress):
        def stage(self, label: str, total: int) -> None:
            announced.append([total, 0])

        def advance(self, count: int) -> None:
            announced[-1][1] += count

    recipe = Recipe(method="ties", max_shard_size="9KB", exclude=("bytes",))
    execution = Execution(threads=3, chunk_size=1024)
    m3jax.merge(
        model,
        [model, model],
        tmp_path / "merged",
        recipe,
        execution=execution,
        progress=Count(),
    )
    assert all(total == done > 0 for total, done in announced), announced


class TestPlace:
    """What stands where the output is to go."""

    def test_exists(self, model: Path, tmp_path: Path):
        output = tmp_path / "merged"
        m3jax.merge(None, [model], output)
        before = checkpoints.digest(output)
        with pytest.raises(CheckpointError, match=r"exists already; pass --overwrite"):
            m3jax.merge(None, [model], output, seed=1)
        assert checkpoints.digest(output) == before
        m3jax.merge(None, [model], output, seed=1, execution=OVERWRITE)
        assert json.loads((output / "m3jax.json").read_text())["seed"] == 1
        assert sorted(tmp_path.iterdir()) == [output]

    def test_overwrite_removes_what_is_not_part_of_the_new_output(
        self, model, tmp_path
    ):
        output = tmp_path / "merged"
        m3jax.merge(None, [model], output, Recipe(max_shard_size="5KB"))
        assert len(list(output.glob("*.safetensors"))) > 2
        m3jax.merge(None, [model], output, execution=OVERWRITE)
        assert [path.name for path in output.glob("*.safetensors*")] == [
            "model.safetensors"
        ]

    def test_empty(self, model: Path, tmp_path: Path):
        (tmp_path / "merged").mkdir()
        m3jax.merge(None, [model], tmp_path / "merged", execution=OVERWRITE)
        assert (tmp_path / "merged" / "m3jax.json").exists()

    @pytest.mark.parametrize("execution", [Execution(), OVERWRITE])
    def test_foreign(self, execution: Execution, model: Path, tmp_path: Path):
        output = tmp_path / "thesis"
        output.mkdir()
        (output / "chapter.txt").write_text("years of work")
        with pytest.raises(CheckpointError, match="choose another"):
            m3jax.merge(None, [model], output, execution=execution)
        assert (output / "chapter.txt").read_text() == "years of work"
        assert sorted(tmp_path.iterdir()) == [output]

    @pytest.mark.parametrize("execution", [Execution(), OVERWRITE])
    def test_a_file(self, execution: Execution, model: Path, tmp_path: Path):
        (tmp_path / "merged").write_text("a file")
        with pytest.raises(CheckpointError, match="exists and is not a folder"):
            m3jax.merge(None, [model], tmp_path / "merged", execution=execution)

    @pytest.mark.parametrize("where", ["", "merged", "a/b/merged"])
    def test_in_an_input(self, where: str, tmp_path: Path):
        source = checkpoints.write(tmp_path / "in", {"a": np.ones(3)})
        names = sorted(path.name for path in source.iterdir())
        for execution in (Execution(), OVERWRITE):
            with pytest.raises(CheckpointError):
                m3jax.merge(None, [source], source / where, execution=execution)
        assert sorted(path.name for path in source.iterdir()) == names

    def test_around_an_input(self, tmp_path: Path):
        """An earlier output that holds an input is not replaced."""
        m3jax.merge(None, [write_small(tmp_path / "a")], tmp_path / "out")
        source = write_small(tmp_path / "out" / "kept")
        with pytest.raises(CheckpointError, match="kept"):
            m3jax.merge(None, [source], tmp_path / "out", execution=OVERWRITE)
        assert (source / "model.safetensors").exists()

    def test_in_folders_that_do_not_exist(self, model: Path, tmp_path: Path):
        m3jax.merge(None, [model], tmp_path / "a" / "b" / "merged")
        assert (tmp_path / "a" / "b" / "merged" / "m3jax.json").exists()


def write_small(folder: Path) -> Path:
    return checkpoints.write(folder, {"a": np.ones(3)})
