"""PyTorch's files, read without PyTorch and without running anything in them.

golden/torch was written by torch.save of PyTorch 2.13; every tensor there is
0.5 · (0, 1, 2, ...) minus a constant, in its own shape, before it was transposed or
sliced.
"""

import io
import json
import os
import pickle
import pickletools
import struct
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import random_model, write
from hypothesis import given
from hypothesis import strategies as st

import m3jax
from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.folder import open_checkpoint
from m3jax.checkpoints.formats import pickled, torch_file
from m3jax.checkpoints.places.files import open_file
from m3jax.checkpoints.source import read_whole

GOLDEN = Path(__file__).parent / "golden" / "torch"
FILES = sorted(GOLDEN.iterdir())


def steps(shape, dtype, minus):
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) * 0.5 - minus
    return values.astype(dtype)


BIG = steps((4, 6), np.float32, 3)
EXPECTED = {
    "model.embed_tokens.weight": steps((8, 4), ml_dtypes.bfloat16, 1),
    "model.a.weight": steps((3, 5), np.float16, 2),
    "model.b.weight": steps((5, 3), np.float32, 2).T,
    "model.c.weight": BIG[1:3],
    "model.d.weight": BIG[:, 2:4],
    "model.norm.weight": steps((4,), np.float32, 0),
    "model.ids": np.arange(6),
    "model.flag": np.array(True),
    "model.none": np.zeros((0, 4), np.float32),
    "model.scalar": np.array(1.5),
    "lm_head.weight": steps((8, 4), ml_dtypes.bfloat16, 1),
}


def tensors_of(path):
    with open_file(Path(path)) as file:
        found = torch_file.read_tensors(file).tensors
        return {name: read_whole(source) for name, source in found.items()}


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        tensors_of(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["archive.bin", "before_1_6.bin"])
def test_the_tensors_are_those_that_were_saved(name):
    found = tensors_of(GOLDEN / name)
    assert found.keys() == EXPECTED.keys()
    for tensor, values in EXPECTED.items():
        assert found[tensor].dtype == values.dtype
        assert found[tensor].shape == values.shape
        assert found[tensor].tobytes() == values.tobytes(), tensor


def test_runs_of_a_transposed_tensor():
    with open_file(GOLDEN / "archive.bin") as file:
        contents = torch_file.read_tensors(file)
        source = contents.tensors["model.b.weight"]
        out = np.empty(4, np.float32)
        source.read_into(out, 5)
    assert np.array_equal(out, EXPECTED["model.b.weight"].reshape(-1)[5:9])
    assert contents.memory == 2 * (15 + 8) * 4  # model.b and model.d are put in order


def test_dtypes_that_have_no_storage_of_their_own():
    found = tensors_of(GOLDEN / "untyped.bin")
    assert found["w"].dtype == ml_dtypes.float8_e4m3fn
    assert np.array_equal(found["w"].astype(np.float32), steps((2, 8), np.float32, 1))
    assert found["u"].dtype == np.uint16
    assert found["u"].tolist() == [0, 1, 2, 3]


def test_of_a_trainers_checkpoint_the_model_is_read_and_the_rest_is_named():
    with open_file(GOLDEN / "trainer.pth") as file:
        contents = torch_file.read_tensors(file)
        found = {name: read_whole(source) for name, source in contents.tensors.items()}
    assert found.keys() == {"weight", "bias"}
    assert np.array_equal(found["weight"], steps((2, 2), np.float32, 1))
    assert [note.partition(": ")[2] for note in contents.notes] == [
        "its 'state_dict' is read; 'epoch', 'optimizer' passed over"
    ]


def pickled_tensors(tensors):
    """An archive of torch.save, its pickle put together opcode by opcode."""
    text = io.BytesIO()
    text.write(b"\x80\x02}")
    storages = {}
    for i, (name, (values, offset, shape, strides)) in enumerate(tensors.items()):
        storages[f"data/{i}"] = values.tobytes()
        text.write(_text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n((")
        text.write(_text("storage") + b"ctorch\nFloatStorage\n" + _text(str(i)))
        text.write(_text("cpu") + _number(len(values)) + b"tQ" + _number(offset))
        for sizes in (shape, strides):
            text.write(b"(" + b"".join(map(_number, sizes)) + b"t")
        text.write(b"\x89ccollections\nOrderedDict\n)RtRs")
    return archived(text.getvalue() + b".", storages)


def archived(text, storages=None, **more):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("model/data.pkl", text)
        for name, values in {**(storages or {}), **more}.items():
            archive.writestr(f"model/{name}", values)
    return content.getvalue()


def _text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _number(value):
    packed = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(packed)]) + packed


ROW = np.arange(12, dtype=np.float32)


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (3, 4), (4, 1)),
        (2, (5,), (2,)),
        (1, (2, 3), (1, 2)),
        (3, (1, 3), (77, 1)),  # of one row the stride is of no matter
        (0, (2, 3, 2), (2, 4, 1)),
        (12, (0, 3), (3, 1)),
        (4, (), ()),
    ],
)
def test_views_are_what_numpy_makes_of_their_strides(offset, shape, strides, tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(pickled_tensors({"x": (ROW, offset, shape, strides)}))
    expected = np.lib.stride_tricks.as_strided(
        ROW[offset:], shape, [4 * stride for stride in strides]
    )
    assert np.array_equal(tensors_of(path)["x"], expected)


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (3, 5), (5, 1)),
        (9, (2, 2), (2, 1)),
        (0, (12,), (0,)),  # expanded: 12 elements of one
        (0, (2**40,), (0,)),
        (0, (2**62, 2**62), (1, 1)),
        (2**62, (1,), (1,)),
        (0, (13,), (1,)),
    ],
)
def test_views_beyond_their_storage_are_refused(offset, shape, strides, tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(pickled_tensors({"x": (ROW, offset, shape, strides)}))
    if shape == (12,):  # as many elements as there are, all the same: harmless
        assert np.array_equal(tensors_of(path)["x"], np.zeros(12))
    else:
        assert "lies in a storage of 12 elements" in refusal(path)


@given(st.data())
def test_a_random_archive_reads_as_numpy_has_it(data):
    size = data.draw(st.integers(0, 30))
    shape = tuple(data.draw(st.lists(st.integers(0, 4), max_size=3)))
    strides = tuple(data.draw(st.integers(0, 5)) for _ in shape)
    offset = data.draw(st.integers(0, 4))
    values = np.arange(size, dtype=np.float32)
    content = pickled_tensors({"x": (values, offset, shape, strides)})
    reach = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
    fits = offset + (reach if np.prod(shape) else 0) <= size >= np.prod(shape)
    found = outcome(content)
    assert (found is not None) == fits
    if found is not None:
        steps = [4 * stride for stride in strides]
        view = np.lib.stride_tricks.as_strided(values[offset:], shape, steps)
        assert np.array_equal(found["x"], view)


def outcome(content):
    """The tensors of a file of these bytes, None where one line refuses it."""
    fd = os.memfd_create("torch")
    try:
        os.pwrite(fd, content, 0)
        return tensors_of(f"/proc/self/fd/{fd}")
    except CheckpointError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 1000
        return None
    finally:
        os.close(fd)


class TestNothingRuns:
    @pytest.mark.parametrize(
        "text",
        [
            b"cos\nsystem\n(X\x04\x00\x00\x00echotR.",
            b"cbuiltins\neval\n(X\x01\x00\x00\x001tR.",
            b"cposix\nsystem\n.",
            b"cnumpy.core.multiarray\n_reconstruct\n.",
            b"ctorch\nload\n.",
            b"ctorch.hub\nload\n.",
            b"ctorch._utils\n_rebuild_wrapper_subclass\n.",
            b"ccollections\nCounter\n.",
            b"\x8c\x02os\x8c\x06system\x93.",
            b"(X\x02\x00\x00\x00idios\nsystem\n.",  # INST
            b"(ccollections\nOrderedDict\no.",  # OBJ
            b"ccollections\nOrderedDict\n)\x81.",  # NEWOBJ
            b"ccollections\nOrderedDict\n)}\x92.",  # NEWOBJ_EX
            b"\x82\x01.",  # EXT1
            b"Pid\n.",  # PERSID
            b"I1\n.",
            b"S'x'\n.",
            b"]q\x00ccollections\nOrderedDict\n(h\x00tR.",
            b"ctorch\nFloatStorage\n)R.",
            b"ctorch.nn.parameter\nParameter\n)R.",
        ],
    )
    def test_what_tensors_are_not_made_of_is_named(self, text, tmp_path):
        path = tmp_path / "x.bin"
        path.write_bytes(archived(b"\x80\x02" + text))
        message = refusal(path)
        assert "none of it was run; if you trust it, load it with torch" in message

    @given(
        st.recursive(
            st.none() | st.integers() | st.text(max_size=4) | st.binary(max_size=4),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.text(max_size=3), inner, max_size=3)
                | st.tuples(inner, inner)
                | st.builds(lambda argument: Trap(argument), inner)
            ),
            max_leaves=6,
        ),
        st.integers(0, 5),
    )
    def test_no_pickle_of_python_springs_its_trap(self, value, protocol):
        text = pickle.dumps({"x": value, "trap": Trap(1)}, protocol)
        assert outcome(archived(text)) is None
        assert outcome(text) is None
        assert not Trap.sprung

    @given(st.sampled_from(FILES), st.data())
    def test_no_damage_does_more_than_refuse_or_read_what_is_there(self, path, data):
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, len(content) - 1))
            content[at] = data.draw(st.integers(0, 255))
        found = outcome(bytes(content[: data.draw(st.integers(1, len(content)))]))
        for values in (found or {}).values():
            assert values.nbytes <= len(content)

    @given(st.binary(max_size=60))
    def test_any_bytes_as_a_pickle(self, text):
        try:
            value = pickled.load(text).value
        except CheckpointError:
            return
        made = (str, int, float, dict, list, tuple, type(None))
        assert isinstance(value, made) or type(value).__module__ == pickled.__name__


class Trap:
    """What runs code when Python unpickles it."""

    sprung = False

    def __init__(self, argument):
        self.argument = argument

    def __reduce__(self):
        return (spring, (self.argument,))


def spring(argument):
    Trap.sprung = True


@pytest.mark.parametrize(
    "text",
    [
        b"]" * 300_000,
        b"}q\x000" * 20_000,
        b"](" + b"}" * 30_000 + b"e.",
        b"X\xff\xff\xff\xff",
        b"T\xff\xff\xff\xff",
        b"X\x01\x00\x00\x00a" + b"\x85" * 40_000 + b".",
        b")q\x00" + b"h\x00h\x00\x86q\x00" * 9_000 + b".",  # 2**9000 leaves
        b"K\x01r\xff\xff\xff\xff.",
    ],
    ids=["lists", "dicts", "many", "long", "long too", "deep", "laughs", "memo"],
)
def test_bombs_stay_small(text, tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(archived(b"\x80\x02" + text))
    tracemalloc.start()
    message = refusal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(message) < 1000
    assert peak < 130 * len(text) + 1_000_000


def _zip(**options):
    def build(path):
        with zipfile.ZipFile(path, "w", **options) as archive:
            archive.writestr("m/data.pkl", b"\x80\x02}.")

    return build


def _twice(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", b"\x80\x02}.")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("m/data.pkl", b"\x80\x02].")


def _edited(before, after):
    def build(path):
        content = (GOLDEN / "archive.bin").read_bytes()
        assert before in content
        path.write_bytes(content.replace(before, after))

    return build


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (_zip(compression=zipfile.ZIP_DEFLATED), "compressed or encrypted"),
        (_twice, "holds 'm/data.pkl' twice"),
        (lambda p: p.write_bytes(archived(b"\x80\x02}.")[:-1]), "it was cut off"),
        (lambda p: p.write_bytes(archived(b"\x80\x02}.") + b"x"), "it was cut off"),
        (lambda p: p.write_bytes(b"PK\3\4"), "it was cut off; fetch it again"),
        (lambda p: p.write_bytes(archived(b"\x80\x02}.")), "holds no tensors under"),
        (
            lambda p: p.write_bytes(archived(b"\x80\x02].")),
            "holds a list, needs a dict",
        ),
        (
            lambda p: p.write_bytes(archived(b"\x80\x02}.", byteorder=b"big")),
            "another order of bytes",
        ),
        (
            lambda p: p.write_bytes(archived(b"\x80\x02}.", **{"code/x.py": b"1"})),
            "is a program of TorchScript",
        ),
        (
            lambda p: p.write_bytes(pickle.dumps({"a": 1}, 2)),
            "is a pickle, but not one of torch.save",
        ),
        (_edited(b"FloatStorage", b"QInt8Storage"), "names 'torch.QInt8Storage'"),
        (_edited(b"archive/data/0", b"archive/data/9"), "damaged|nothing for storage"),
    ],
)
def test_files_that_are_no_models(build, expected, tmp_path):
    path = tmp_path / "x.bin"
    build(path)
    message = refusal(path)
    assert any(part in message for part in expected.split("|")), message


def test_a_state_dict_saved_as_the_refusal_says_is_read(tmp_path):
    """Two models in one file: the way out is followed to its end."""
    torch = pytest.importorskip("torch")
    a, b = torch.ones(2), torch.zeros(2)
    path = tmp_path / "x.pt"
    torch.save({"model": {"w": a}, "state_dict": {"w": b}}, path)
    message = refusal(path)
    assert "torch.save(torch.load(FILE)['state_dict'], NEW_FILE)" in message
    torch.save(torch.load(path)["state_dict"], tmp_path / "new.pt")
    assert tensors_of(tmp_path / "new.pt")["w"].tolist() == [0, 0]


def test_every_pickle_of_the_golden_files_ends_where_python_says():
    with zipfile.ZipFile(GOLDEN / "archive.bin") as archive:
        text = archive.read("archive/data.pkl")
    *_, last = pickletools.genops(text)
    assert pickled.load(text + b"more").stop == last[2] + 1


class TestFolders:
    def test_pickles_merge_as_the_same_tensors_in_safetensors(self, tmp_path):
        base, a, b = (random_model(seed) for seed in range(3))
        for name, tensors in (("base", base), ("a", a), ("b", b)):
            write(tmp_path / name, tensors, {"model_type": "llama"})
        folder = tmp_path / "pickled"
        folder.mkdir()
        names = sorted(a)
        files = {
            f"pytorch_model-0000{i}-of-00002.bin": names[i - 1 :: 2] for i in (1, 2)
        }
        for file, own in files.items():
            described = {
                name: (a[name].reshape(-1), 0, a[name].shape, _strides(a[name].shape))
                for name in own
            }
            (folder / file).write_bytes(pickled_tensors(described))
        for index in (True, False):
            if index:
                weight_map = {name: f for f, own in files.items() for name in own}
                (folder / "pytorch_model.bin.index.json").write_text(
                    json.dumps({"weight_map": weight_map})
                )
            else:
                (folder / "pytorch_model.bin.index.json").unlink()
            out = tmp_path / f"out{index}"
            m3jax.merge(tmp_path / "base", [folder, tmp_path / "b"], out)
        m3jax.merge(tmp_path / "base", [tmp_path / "a", tmp_path / "b"], tmp_path / "o")
        expected = (tmp_path / "o" / "model.safetensors").read_bytes()
        for index in (True, False):
            made = (tmp_path / f"out{index}" / "model.safetensors").read_bytes()
            assert made == expected

    def test_what_trainers_leave_beside_is_not_read(self, tmp_path):
        content = pickled_tensors({"x": (ROW, 0, (12,), (1,))})
        (tmp_path / "model.pth").write_bytes(content)
        for name in ("training_args.bin", "optimizer.pt", "rng_state.pth"):
            (tmp_path / name).write_bytes(b"")
        with open_checkpoint(str(tmp_path)) as checkpoint:
            assert checkpoint.format == "torch"
            assert list(checkpoint.tensors) == ["x"]

    def test_safetensors_have_precedence(self, tmp_path):
        write(tmp_path / "m", {"a": ROW})
        (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"")
        with open_checkpoint(str(tmp_path / "m")) as checkpoint:
            assert checkpoint.format == "safetensors"


def _strides(shape):
    return tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
