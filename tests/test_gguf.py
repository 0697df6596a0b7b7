"""GGUF's Llamas as transformers has them; headers that lie are refused."""

import json
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from checkpoints import random_model, read, write
from hypothesis import given
from hypothesis import strategies as st

import m3jax
from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.folder import open_checkpoint
from m3jax.checkpoints.formats import gguf
from m3jax.checkpoints.places.files import open_file
from m3jax.checkpoints.source import read_whole

HEADS, KEY_VALUE_HEADS, WIDTH, ROWS, HIDDEN = 4, 2, 16, 8, 6
TYPES = {np.dtype("f4"): 0, np.dtype("f2"): 1, np.dtype(ml_dtypes.bfloat16): 30}
FIELDS = {
    "general.architecture": "llama",
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KEY_VALUE_HEADS,
    "tokenizer.ggml.tokens": ["a", "bc"],
    "tokenizer.ggml.scores": [0.5, 1.0],
    "general.file_type": 1,
}
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "blk.0.attn_norm.weight": "model.layers.0.input_layernorm.weight",
    "blk.0.ffn_norm.weight": "model.layers.0.post_attention_layernorm.weight",
    "blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj.weight",
    "blk.0.attn_k.weight": "model.layers.0.self_attn.k_proj.weight",
    "blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj.weight",
    "blk.0.attn_output.weight": "model.layers.0.self_attn.o_proj.weight",
    "blk.0.ffn_gate.weight": "model.layers.0.mlp.gate_proj.weight",
    "blk.0.ffn_up.weight": "model.layers.0.mlp.up_proj.weight",
    "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
}
SHAPES = {
    "model.embed_tokens.weight": (ROWS, WIDTH),
    "model.norm.weight": (WIDTH,),
    "lm_head.weight": (ROWS, WIDTH),
    "model.layers.0.input_layernorm.weight": (WIDTH,),
    "model.layers.0.post_attention_layernorm.weight": (WIDTH,),
    "model.layers.0.self_attn.q_proj.weight": (WIDTH, WIDTH),
    "model.layers.0.self_attn.k_proj.weight": (WIDTH // 2, WIDTH),
    "model.layers.0.self_attn.v_proj.weight": (WIDTH // 2, WIDTH),
    "model.layers.0.self_attn.o_proj.weight": (WIDTH, WIDTH),
    "model.layers.0.mlp.gate_proj.weight": (HIDDEN, WIDTH),
    "model.layers.0.mlp.up_proj.weight": (HIDDEN, WIDTH),
    "model.layers.0.mlp.down_proj.weight": (WIDTH, HIDDEN),
}


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def field(value):
    """A value with its type before it, as the format has it."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, list):
        kinds = b"".join(field(one)[4:] for one in value)
        return struct.pack("<I", 9) + field(value[0])[:4] + _count(value) + kinds
    return struct.pack("<II", 4, value)


def _count(value):
    return struct.pack("<Q", len(value))


def file_of(tensors, fields=FIELDS, *, version=3, count=None):
    """A file's bytes; tensors are arrays, or (type, shape, bytes)."""
    head = b"GGUF" + struct.pack("<I", version)
    head += struct.pack("<QQ", len(tensors) if count is None else count, len(fields))
    for name, value in fields.items():
        head += text(name) + field(value)
    data = b""
    for name, values in tensors.items():
        if isinstance(values, np.ndarray):
            values = TYPES[values.dtype], values.shape, values.tobytes()
        kind, shape, content = values
        head += text(name) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += struct.pack("<IQ", kind, len(data))
        data += content + bytes(-len(content) % 32)
    return head + bytes(-len(head) % 32) + data


def paired(weight, heads):
    """As llama.cpp turns the halves of each head into pairs."""
    return np.ascontiguousarray(
        weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2)
    ).reshape(weight.shape)


def as_gguf(model):
    heads = {"attn_q": HEADS, "attn_k": KEY_VALUE_HEADS}
    tensors = {}
    for name, ours in NAMES.items():
        kind = name.split(".")[2:3]
        own = model[ours]
        tensors[name] = (
            paired(own, heads[kind[0]]) if kind and kind[0] in heads else own
        )
    return tensors


def tensors_of(path):
    with open_file(path) as file:
        found, notes, _ = gguf.read_tensors(file)
        return {name: read_whole(source) for name, source in found.items()}, notes


def refusal(content, path):
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        tensors_of(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "gguf_file=NAME" in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("version", [2, 3])
def test_the_tensors_are_those_of_the_checkpoint(dtype, version, tmp_path):
    model = random_model(0, SHAPES, dtype)
    path = tmp_path / "m.gguf"
    path.write_bytes(
        file_of(
            {**as_gguf(model), "rope_freqs.weight": np.ones(2, "f4")}, version=version
        )
    )
    found, notes = tensors_of(path)
    assert not notes
    assert found.keys() == model.keys()
    for name, values in model.items():
        assert found[name].dtype == dtype
        np.testing.assert_array_equal(found[name], values)


def test_any_run_of_rows_that_are_reordered(tmp_path):
    model = random_model(1, SHAPES)
    path = tmp_path / "m.gguf"
    path.write_bytes(file_of(as_gguf(model)))
    name = "model.layers.0.self_attn.q_proj.weight"
    with open_file(path) as file:
        source = gguf.read_tensors(file)[0][name]
        for start, count in ((0, 1), (3, 40), (15, 1), (200, 56)):
            out = np.empty(count, np.float32)
            source.read_into(out, start)
            expected = model[name].reshape(-1)[start : start + count]
            np.testing.assert_array_equal(out, expected)


def test_a_file_merges_with_checkpoints_of_transformers(tmp_path):
    base, a, b = (random_model(seed, SHAPES) for seed in range(3))
    for name, model in (("base", base), ("a", a), ("b", b)):
        write(tmp_path / name, model, {"model_type": "llama"})
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "a.gguf", tmp_path / "folder" / "model.gguf"):
        place.write_bytes(file_of(as_gguf(a)))
    outputs = []
    for i, first in enumerate(("a", "a.gguf", "folder")):
        outputs.append(tmp_path / f"o{i}")
        m3jax.merge(tmp_path / "base", [tmp_path / first, tmp_path / "b"], outputs[-1])
    made = [(output / "model.safetensors").read_bytes() for output in outputs]
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q5_1"])
def test_quantised_tensors_are_what_the_package_makes_of_them(kind, tmp_path):
    library = pytest.importorskip("gguf")
    kind = library.GGMLQuantizationType[kind]
    weights = random_model(2, {"w": (6, 64)})["w"]
    codes = library.quantize(weights, kind)
    path = tmp_path / "m.gguf"
    path.write_bytes(
        file_of({"token_embd.weight": (int(kind), (6, 64), codes.tobytes())})
    )
    found, notes = tensors_of(path)
    expected = library.dequantize(codes, kind)
    np.testing.assert_array_equal(found["model.embed_tokens.weight"], expected)
    assert f"1 in {kind.name} of 1 tensors are dequantised" in notes[0]
    with open_file(path) as file:
        source = gguf.read_tensors(file)[0]["model.embed_tokens.weight"]
        out = np.empty(70, np.float32)
        source.read_into(out, 45)
    np.testing.assert_array_equal(out, expected.reshape(-1)[45:115])


def test_the_way_out_leads_out(tmp_path):
    """A Gemma, whose values llama.cpp changes: transformers converts it."""
    message = refusal(
        file_of({}, {"general.architecture": "gemma"}), tmp_path / "m.gguf"
    )
    assert "has architecture 'gemma', read are llama, qwen2, qwen3" in message


X = np.ones((2, 4), np.float32)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "in the middle of its header; fetch it again, or convert it"),
        (b"GGUF\3", "in the middle of its header"),
        (b"PK\3\4" + bytes(40), "does not start as a GGUF file does"),
        (file_of({}, version=4), "has version 4 of GGUF"),
        (file_of({}, version=3 << 24), "has version"),
        (file_of({}, count=2**60), "counts too many"),
        (file_of({}, count=1000), "in the middle of its header"),
        (file_of({}, {}), "has architecture None"),
        (
            file_of({}, {**FIELDS, "split.count": 3}),
            "before it come 0 of 3 parts, and here 0 of 1 do; give the folder of all",
        ),
        (file_of({"blk.0.ffn_gate_exps.weight": X}), "of unknown meaning"),
        (file_of({"token_embd.weight": X})[:-40], "it was cut off: fetch it again"),
        (file_of({"token_embd.weight": (0, (2**62, 4), b"")}), "it was cut off"),
        (file_of({"token_embd.weight": (0, (1,) * 9, b"1234")}), "of 9 axes"),
        (
            file_of({"blk.0.attn_q.weight": np.ones((6, 4), np.float32)}),
            "has 4 heads for",
        ),
        (file_of({}, {"n" * 5000: 1}), "has a name of 5000 bytes"),
    ],
)
def test_files_that_are_not_read(content, expected, tmp_path):
    tracemalloc.start()
    message = refusal(content, tmp_path / "m.gguf")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert expected in message
    assert peak < 5_000_000


@given(data=st.data())
def test_no_damage_does_more_than_refuse_or_read_what_is_there(data, tmp_path_factory):
    content = bytearray(file_of({"token_embd.weight": X, "output_norm.weight": X[0]}))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "m.gguf"
    path.write_bytes(content)
    try:
        found, _ = tensors_of(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
        return
    assert all(values.nbytes <= len(content) for values in found.values())


def test_the_parts_of_a_split_file(tmp_path):
    """The first part alone says what model it is, as llama.cpp writes them."""
    base, a = (random_model(seed, SHAPES) for seed in range(2))
    write(tmp_path / "base", base, config={"model_type": "llama"})
    (tmp_path / "parts").mkdir()
    names = sorted(as_gguf(a))
    for i, own in enumerate((names[::2], names[1::2])):
        said = FIELDS if i == 0 else {}
        content = file_of(
            {name: as_gguf(a)[name] for name in own},
            {**said, "split.no": i, "split.count": 2, "split.tensors.count": 12},
        )
        (tmp_path / "parts" / f"m-0000{i + 1}-of-00002.gguf").write_bytes(content)
    with open_checkpoint(str(tmp_path / "parts")) as opened:
        assert opened.tensors.keys() == SHAPES.keys()
        for name, source in opened.tensors.items():
            np.testing.assert_array_equal(read_whole(source), a[name])
    part = tmp_path / "parts" / "m-00002-of-00002.gguf"
    with pytest.raises(CheckpointError, match="give the folder of all parts"):
        open_checkpoint(str(part))
    part.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"m-00002-of-00002\.gguf' is missing"):
        open_checkpoint(str(tmp_path / "parts"))


METADATA = {
    **FIELDS,
    "llama.block_count": 1,
    "llama.embedding_length": WIDTH,
    "llama.feed_forward_length": HIDDEN,
    "llama.context_length": 32,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 500000.0,
    "tokenizer.ggml.eos_token_id": 2,
}


def test_a_config_is_made_of_the_metadata(tmp_path):
    model = random_model(1, SHAPES)
    path = tmp_path / "m.gguf"
    path.write_bytes(file_of(as_gguf(model), METADATA))
    m3jax.merge(None, [path, path], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert (config["num_key_value_heads"], config["eos_token_id"]) == (2, 2)
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float32
    )
    assert not (info["missing_keys"] or info["unexpected_keys"])
    assert loaded.model.rotary_emb.config.rope_parameters["rope_theta"] == 500000.0
    for name, own in loaded.state_dict().items():
        np.testing.assert_allclose(own.numpy(), model[name], rtol=1e-6)


def test_metadata_that_say_too_little_make_none(tmp_path):
    model = as_gguf(random_model(1, SHAPES))
    scaled = {**model, "rope_freqs.weight": np.ones(2, np.float32)}
    for content, lacking in (
        (file_of(scaled, METADATA), "lack the scaling of its rope"),
        (file_of(model), "lack embedding_length; copy the original model's"),
    ):
        (tmp_path / "m.gguf").write_bytes(content)
        with open_checkpoint(str(tmp_path / "m.gguf")) as opened:
            assert opened.config is None
            assert lacking in opened.notes[0]


def test_a_merge_of_files_alone(tmp_path):
    for seed, name in enumerate("ab"):
        model = random_model(seed, SHAPES)
        (tmp_path / f"{name}.gguf").write_bytes(file_of(as_gguf(model)))
    m3jax.merge(None, [tmp_path / "a.gguf", tmp_path / "b.gguf"], tmp_path / "out")
    assert read(tmp_path / "out").keys() == SHAPES.keys()
