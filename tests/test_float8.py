"""Float8 weights times their scales, against NumPy; what is strange is refused."""

import contextlib
import json
import math
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from checkpoints import decode
from hypothesis import given
from hypothesis import strategies as st
from test_sources import InMemory, check_run

import m3jax
from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.folder import open_checkpoint
from m3jax.checkpoints.formats.dtypes import of_numpy
from m3jax.checkpoints.formats.safetensors import layout
from m3jax.checkpoints.source import read_whole
from m3jax.checkpoints.sources import float8
from m3jax.checkpoints.sources.float8 import Dequantised, dequantise

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E5M2 = np.dtype(ml_dtypes.float8_e5m2)
BF16 = np.dtype(ml_dtypes.bfloat16)
SCALE_DTYPES = [np.dtype(np.float32), BF16, np.dtype(np.float16), np.dtype(np.float64)]


def codes_of(shape, dtype=E4M3, seed=0):
    """Codes of finite values: the top exponent's are left out."""
    generator = np.random.default_rng(seed)
    codes = generator.integers(0, 0x78, shape) | generator.integers(0, 2, shape) << 7
    return codes.astype(np.uint8).view(dtype)


def scales_of(shape, dtype=np.float32, seed=1):
    return np.random.default_rng(seed).uniform(0.01, 2, shape).astype(dtype)


def expanded(scales, shape, block):
    """Each scale repeated over its block; blocks at the edges are cut off."""
    scales = scales.astype(np.float32).reshape(-(-shape[0] // block[0]), -1)
    by_row = np.repeat(scales, block[0], axis=0)[: shape[0]]
    return np.repeat(by_row, block[1], axis=1)[:, : shape[1]]


def dequantised(codes, scales, config=None, suffix="_scale"):
    """What becomes of a layer's weight and its scales."""
    tensors = {"l.weight": InMemory(codes), f"l.weight{suffix}": InMemory(scales)}
    result = dequantise(tensors, config)
    assert list(result) == ["l.weight"]
    assert result["l.weight"].output_dtype.code == "BF16"
    return read_whole(result["l.weight"])


def deepseek(rows, columns):
    return {"quantization_config": {"weight_block_size": [rows, columns]}}


def compressed(**weights):
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quantization_config": {"quant_method": "x", "config_groups": groups}}


@given(
    shape=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    block=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    dtype=st.sampled_from([E4M3, E5M2]),
    scale_dtype=st.sampled_from(SCALE_DTYPES),
    part=st.sampled_from([1, 7, 40, 1000]),
    data=st.data(),
)
def test_any_run_of_any_block(shape, block, dtype, scale_dtype, part, data):
    grid = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    codes, scales = codes_of(shape, dtype), scales_of(grid, scale_dtype)
    expected = codes.astype(np.float32) * expanded(scales, shape, block)
    source = Dequantised(InMemory(codes), InMemory(scales), block)
    assert (source.dtype.code, source.shape) == ("F32", shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(float8, "_PART", part)
        check_run(source, expected, data)


@pytest.mark.parametrize("suffix", ["_scale", "_scale_inv"])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=str)
def test_scales_are_factors(suffix, dtype, scale_dtype):
    codes, shape = codes_of((6, 10), dtype), (6, 10)
    for scale_shape in ((), (1,), (1, 1)):
        scales = scales_of(scale_shape, scale_dtype)
        expected = codes.astype(np.float32) * np.float32(scales.reshape(()))
        np.testing.assert_array_equal(
            dequantised(codes, scales, None, suffix), expected
        )
    for scale_shape in ((6,), (6, 1)):
        scales = scales_of(scale_shape, scale_dtype)
        expected = codes.astype(np.float32) * expanded(scales, shape, (1, 10))
        np.testing.assert_array_equal(
            dequantised(codes, scales, None, suffix), expected
        )
    scales = scales_of((2, 3), scale_dtype)
    expected = codes.astype(np.float32) * expanded(scales, shape, (4, 4))
    for config in (
        deepseek(4, 4),
        compressed(strategy="block", block_structure=[4, 4]),
    ):
        np.testing.assert_array_equal(
            dequantised(codes, scales, config, suffix), expected
        )


def test_groups_of_columns():
    codes, scales = codes_of((6, 12)), scales_of((6, 3))
    expected = codes.astype(np.float32) * expanded(scales, (6, 12), (1, 4))
    config = compressed(strategy="group", group_size=4, block_structure=None)
    np.testing.assert_array_equal(dequantised(codes, scales, config), expected)


def test_one_scale_for_any_number_of_dimensions():
    for shape in ((7,), (2, 3, 5)):
        codes, scales = codes_of(shape), scales_of(())
        np.testing.assert_array_equal(
            dequantised(codes, scales), codes.astype(np.float32) * scales
        )


def test_every_code_is_what_torch_says():
    torch = pytest.importorskip("torch")
    every = np.arange(256, dtype=np.uint8)
    for dtype, theirs in ((E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)):
        ours = dequantised(every.view(dtype).reshape(1, 256), np.float32([1]))
        their = torch.from_numpy(every.copy()).view(theirs).to(torch.float32).numpy()
        np.testing.assert_array_equal(ours[0], their)


def test_a_wide_row_needs_no_wide_scales():
    """A tensor of few, immense rows is dequantised in parts of a row."""
    columns = 5_000_000
    codes = np.full((2, columns), 0x38, np.uint8).view(E4M3)  # 1.0
    scales = np.array([[2.0], [3.0]], np.float32)
    source = Dequantised(InMemory(codes), InMemory(scales), (1, columns))
    out = np.empty(4, np.float32)
    tracemalloc.start()
    source.read_into(out, columns - 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(out, [2, 2, 3, 3])
    assert peak < 1_000_000


F32 = np.dtype(np.float32)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
keys = st.sampled_from(
    [
        "quantization_config",
        "weight_block_size",
        "config_groups",
        "weights",
        "group_size",
    ]
)

PROBLEMS = {
    "no scale": ({}, None, "has no scale tensor, needs one of NAME_scale"),
    "both scales": (
        {"_scale": ((), F32), "_scale_inv": ((), F32)},
        None,
        r"has 'l\.weight_scale', 'l\.weight_scale_inv', needs one of",
    ),
    "zero points": (
        {"_scale": ((), F32), "_zero_point": ((), F32)},
        None,
        r"has 'l\.weight_zero_point'",
    ),
    "a second scale": (
        {"_scale": ((), F32), "_scale_2": ((), F32)},
        None,
        r"has 'l\.weight_scale_2'",
    ),
    "integer scales": (
        {"_scale_inv": ((2, 3), np.dtype(np.uint8))},
        deepseek(4, 4),
        r"has a scale of U8, shape \[2, 3\], needs a floating-point dtype",
    ),
    "float8 scales": (
        {"_scale": ((1,), E4M3)},
        None,
        "has a scale of F8_E4M3",
    ),
    "one scale per column": (
        {"_scale": ((1, 10), F32)},
        None,
        r"has a scale of F32, shape \[1, 10\], needs one number, one per row, or one "
        r"per block of config\.json's quantization_config \(blocks known: none\)",
    ),
    "blocks that config.json does not know": (
        {"_scale_inv": ((2, 3), F32)},
        {},
        "blocks known: none",
    ),
    "blocks of another size": (
        {"_scale_inv": ((2, 3), F32)},
        deepseek(5, 5),
        "blocks known: 5 x 5",
    ),
    "two sizes that both fit": (
        {"_scale": ((2, 3), F32)},
        {
            "quantization_config": {
                "config_groups": {
                    "a": {"weights": {"block_structure": [4, 4]}},
                    "b": {"weights": {"block_structure": [5, 4]}},
                }
            }
        },
        "blocks known: 4 x 4, 5 x 4",
    ),
    "no scales": ({"_scale": ((0,), F32)}, None, r"shape \[0\]"),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_scales_that_are_not_understood(case):
    scales, config, expected = PROBLEMS[case]
    tensors = {"l.weight": InMemory(codes_of((6, 10)))}
    for suffix, (shape, dtype) in scales.items():
        tensors["l.weight" + suffix] = InMemory(np.ones(shape, dtype))
    with pytest.raises(CheckpointError, match=expected) as caught:
        dequantise(tensors, config)
    message = str(caught.value)
    assert "'l.weight' (F8_E4M3, shape [6, 10])" in message
    assert message.endswith("; dequantise the checkpoint to bfloat16 first")


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (4, 0)])
def test_no_scalar_and_no_empty_tensor(shape):
    with pytest.raises(CheckpointError, match="needs to hold elements and have a dim"):
        dequantised(np.zeros(shape, E4M3), np.ones((), np.float32))


def by_hand(codes, scales, block):
    """Scales of experts, each repeated over its block, expert by expert."""
    grid = np.broadcast_to(scales.astype(np.float32), scales.shape)
    whole = [expanded(own, codes.shape[1:], block) for own in grid]
    return codes.astype(np.float32) * np.stack(whole)


@pytest.mark.parametrize(
    ("scales", "block", "config"),
    [
        ((3, 5, 1), (1, 7), None),  # one per row
        ((3, 1, 7), (5, 1), None),  # one per column, as Llama 4's experts
        ((3, 1, 1), (5, 7), None),
        ((3,), (5, 7), None),
        ((3, 2, 3), (4, 3), deepseek(4, 3)),
        ((3, 3, 2), (2, 4), deepseek(2, 4)),
    ],
)
@pytest.mark.parametrize("part", [1, 8, 1 << 18])
def test_experts_of_three_dimensions(scales, block, config, part, monkeypatch):
    monkeypatch.setattr(float8, "_PART", part)
    codes, factors = codes_of((3, 5, 7)), scales_of(scales)
    found = dequantised(codes, factors, config)
    each = factors.reshape(3, 1, 1) if len(scales) == 1 else factors
    expected = by_hand(codes, each, block)
    np.testing.assert_array_equal(found, expected)


def test_blocks_of_experts_that_nobody_speaks_of_are_refused():
    for scales, config in (((2, 3), None), ((2, 2, 2), None), ((1, 2), deepseek(3, 2))):
        with pytest.raises(CheckpointError, match="needs one number"):
            dequantised(np.zeros((2, 3, 4), E4M3), np.ones(scales, np.float32), config)


def test_scales_that_are_powers_of_two():
    """DeepSeek's F8_E8M0, under the name that its own code gives them."""
    codes = codes_of((6, 10))
    powers = np.array([[120, 127, 130], [0, 254, 128]], np.uint8)
    powers = powers.view(ml_dtypes.float8_e8m0fnu)
    tensors = {"l.weight": InMemory(codes), "l.scale": InMemory(powers)}
    result = dequantise(tensors, deepseek(4, 4))
    assert list(result) == ["l.weight"]
    factors = np.exp2(np.array([[-7, 0, 3], [-127, 127, 1]], np.float64))
    with np.errstate(over="ignore"):
        expected = codes.astype(np.float64) * np.repeat(
            np.repeat(factors, 4, axis=0)[:6], 4, axis=1
        )[:, :10].astype(np.float32)
        np.testing.assert_array_equal(
            read_whole(result["l.weight"]), expected.astype(np.float32)
        )


def test_powers_of_two_that_scale_nothing_are_refused():
    powers = np.zeros(3, np.uint8).view(ml_dtypes.float8_e8m0fnu)
    with pytest.raises(CheckpointError, match="is the scale of no float8 tensor"):
        dequantise({"x": InMemory(powers)}, None)


def test_many_problems_are_counted():
    tensors = {f"l{i}.weight": InMemory(codes_of((2, 2))) for i in range(5)}
    with pytest.raises(CheckpointError, match=r"l0.*l1.*l2.*; and 2 more; dequantise"):
        dequantise(tensors, None)


@pytest.mark.parametrize(
    "quantization",
    [None, [], "fp8", {}]
    + [
        {"weight_block_size": size}
        for size in (4, "4", [4], [4, 4, 4], [0, 4], [-1, 4])
    ]
    + [{"weight_block_size": size} for size in ([True, 4], [4.0, 4], [4, 10**30])]
    + [{"config_groups": groups} for groups in ([], {"a": []}, {"a": {"weights": 1}})]
    + [{"config_groups": {"a": {"weights": {"group_size": "4"}}}}],
)
def test_strange_configs_are_no_blocks(quantization):
    with pytest.raises(CheckpointError, match="blocks known: none"):
        dequantised(
            codes_of((6, 10)), scales_of((2, 3)), {"quantization_config": quantization}
        )


@given(
    st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(keys, inner))
)
def test_any_config_is_understood_or_refused(config):
    codes, scales = InMemory(codes_of((6, 10))), InMemory(scales_of((2, 3)))
    config = config if isinstance(config, dict) else {"quantization_config": config}
    with contextlib.suppress(CheckpointError):
        dequantise({"l.weight": codes, "l.weight_scale": scales}, config)


def test_scales_of_activations_are_dropped():
    names = [
        "l.input_scale",
        "l.output_scale",
        "l.activation_scale",
        "l.input_scale_ub",
    ]
    names += ["self_attn.k_scale", "self_attn.v_scale", "self_attn.q_scale"]
    kept = {
        name: InMemory(np.ones(3, BF16))
        for name in (
            "norm.weight",
            "l.bias",
            "logit_scale",
            "l.weight_scales",
            "k_scale_",
        )
    }
    tensors = {**kept, **{name: InMemory(scales_of((1,))) for name in names}}
    assert dequantise(tensors, None) == tensors  # where nothing is float8
    tensors["l.weight"] = InMemory(codes_of((2, 2)))
    tensors["l.weight_scale"] = InMemory(scales_of((1,)))
    assert set(dequantise(tensors, None)) == {*kept, "l.weight"}


def write_checkpoint(folder, arrays, config):
    """Written by hand, since safetensors' NumPy frontend does not know float8."""
    folder.mkdir()
    header, entries = layout(
        [(name, of_numpy(array.dtype), array.shape) for name, array in arrays.items()]
    )
    content = bytearray(max(entry.stop for entry in entries.values()))
    content[: len(header)] = header
    for name, entry in entries.items():
        content[entry.start : entry.stop] = arrays[name].tobytes()
    (folder / "model.safetensors").write_bytes(content)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_mixed_checkpoint_is_merged(tmp_path):
    """Float8 and bfloat16 in one, bfloat16 alone in the other, as one would expect."""
    codes, scales = codes_of((40, 30)), scales_of((3, 2))
    norm = np.random.default_rng(2).normal(size=30).astype(BF16)
    mixed = write_checkpoint(
        tmp_path / "mixed",
        {"l.weight": codes, "l.weight_scale_inv": scales, "norm.weight": norm}
        | {"l.input_scale": np.float32([3])},
        {"vocab_size": 40, **deepseek(16, 16)},
    )
    weight = codes.astype(np.float32) * expanded(scales, (40, 30), (16, 16))
    other = np.random.default_rng(3).normal(size=(40, 30)).astype(BF16)
    plain = write_checkpoint(
        tmp_path / "plain", {"l.weight": other, "norm.weight": norm + norm}, {}
    )
    with open_checkpoint(str(mixed)) as checkpoint:
        assert [*checkpoint.tensors] == ["l.weight", "norm.weight"]
        assert len(checkpoint.stored) == 4
    with open_checkpoint(str(mixed), mergeable=False) as checkpoint:
        assert checkpoint.tensors == checkpoint.stored
        assert checkpoint.tensors["l.weight"].dtype.code == "F8_E4M3"
    recipe = m3jax.Recipe(mixup=m3jax.Mixup(ratios=(0.25, 0.75)))
    m3jax.merge(None, [mixed, plain], tmp_path / "out", recipe)
    merged = decode((tmp_path / "out" / "model.safetensors").read_bytes())
    expected = np.float32(0.25) * weight + np.float32(0.75) * other.astype(np.float32)
    assert set(merged) == {"l.weight", "norm.weight"}
    np.testing.assert_allclose(
        merged["l.weight"].astype(np.float32), expected, rtol=2**-8, atol=1e-30
    )
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert config == {"vocab_size": 40}


def test_a_checkpoint_that_is_not_understood_is_named(tmp_path):
    folder = write_checkpoint(tmp_path / "model", {"l.weight": codes_of((2, 2))}, {})
    with pytest.raises(
        CheckpointError, match=rf"^{folder}: float8 tensors whose scales"
    ):
        open_checkpoint(str(folder))
    with open_checkpoint(str(folder), mergeable=False) as checkpoint:
        assert math.prod(checkpoint.tensors["l.weight"].shape) == 4
