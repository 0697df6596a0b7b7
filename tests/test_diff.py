"""`m3jax diff` against NumPy, and with everything that can differ or be wrong."""

import json
import math
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from checkpoints import BFLOAT16, ODD_SHAPES, encode, random_model, write
from command_line import Run
from matplotlib.text import Text

from m3jax.checkpoints.folder import open_checkpoint
from m3jax.engine.compare import TILE, Comparison, compare

FLOAT8 = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}


def compared(a, b, **options) -> Comparison:
    with (
        open_checkpoint(str(a), mergeable=False) as first,
        open_checkpoint(str(b), mergeable=False) as second,
    ):
        return compare(first, second, **options)


def write_float8(folder, code, tensors):
    """Writes float8 (which the library's NumPy interface cannot) and float32."""
    header, data = {}, b""
    for name, values in tensors.items():
        stop = len(data) + values.nbytes
        header[name] = {
            "dtype": code if values.dtype == FLOAT8[code] else "F32",
            "shape": list(values.shape),
            "data_offsets": [len(data), stop],
        }
        data += values.tobytes()
    text = json.dumps(header).encode()
    folder.mkdir()
    file = len(text).to_bytes(8, "little") + text + data
    (folder / "model.safetensors").write_bytes(file)
    return folder


def strict_json(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def oracle(a, b):
    """The definitions of the module's docstring, word by word."""
    x, y = (side.reshape(-1).astype(np.float64) for side in (a, b))
    bits = f"u{a.itemsize}"
    equal = np.mean(a.reshape(-1).view(bits) == b.reshape(-1).view(bits))
    norms = np.linalg.norm(x), np.linalg.norm(y)
    return {
        "relative_distance": np.linalg.norm(x - y) / norms[0],
        "cosine": x @ y / (norms[0] * norms[1]),
        "equal_share": equal,
        "largest_difference": np.abs(x - y).max(),
    }


@pytest.mark.parametrize(
    "dtype", [np.float64, np.float32, np.float16, BFLOAT16, np.int64, np.uint8]
)
def test_agrees_with_numpy(tmp_path, run: Run, dtype):
    shapes = {**ODD_SHAPES, "model.layers.2.large.weight": (3 * TILE + 17, 7)}
    scale = 1 if np.issubdtype(dtype, np.integer) else 0.02
    models = []
    for seed in (0, 1):
        generator = np.random.default_rng(seed)
        models.append(
            {
                name: np.asarray(scale * generator.integers(0, 100, shape)).astype(
                    dtype
                )
                for name, shape in shapes.items()
            }
        )
    a, b = (write(tmp_path / n, m) for n, m in zip("ab", models, strict=True))
    ran = run("diff", a, b, "--json")
    assert ran.code == 0
    found = strict_json(ran.out)
    assert found["tensors"].keys() == shapes.keys()
    for name, facts in found["tensors"].items():
        if math.prod(shapes[name]):
            expected = oracle(models[0][name], models[1][name])
            for field, value in expected.items():
                assert facts[field] == pytest.approx(value, rel=1e-12), (name, field)
    empty = found["tensors"]["model.layers.1.nothing.weight"]
    assert (empty["relative_distance"], empty["cosine"], empty["equal_share"]) == (
        0,
        None,
        None,
    )
    whole = [np.concatenate([v.reshape(-1) for v in m.values()]) for m in models]
    for field, value in oracle(*whole).items():
        assert found["total"][field] == pytest.approx(value, rel=1e-12), field


def test_neither_chunks_nor_threads_change_a_bit(tmp_path):
    shapes = {"large": (37 * TILE + 5,), "model.layers.0.w": (TILE,), "small": (3,)}
    a = random_model(0, shapes, BFLOAT16)
    b = random_model(1, shapes, BFLOAT16, base=a)
    a["large"][5 * TILE] = np.nan
    folders = write(tmp_path / "a", a), write(tmp_path / "b", b)
    expected = compared(*folders, threads=1)
    assert expected.total.nonfinite == 1
    for chunk_size in (1, 16 * TILE, 17 * TILE, 37 * TILE):
        for threads in (1, 4):
            found = compared(*folders, threads=threads, chunk_size=chunk_size)
            assert found == expected


def test_equal_checkpoints(tmp_path, run: Run):
    model = random_model(0, dtype=BFLOAT16)
    model["model.norm.weight"][:] = [np.nan, np.inf, 0]
    names = list(model)
    a = write(tmp_path / "a", model)
    b = write(tmp_path / "b", model, shards=[names[:2], names[2:]])
    ran = run("diff", a, b, "--exit_code")
    assert ran.code == 0
    assert "A and B are equal: the same tensors with the same bits" in ran.out
    assert compared(a, b).same


def test_one_bit_is_a_difference(tmp_path, run: Run):
    a = random_model(0)
    b = {name: values.copy() for name, values in a.items()}
    a["model.norm.weight"][1], b["model.norm.weight"][1] = 0.0, -0.0
    folders = write(tmp_path / "a", a), write(tmp_path / "b", b)
    assert run("diff", *folders).code == 0
    ran = run("diff", *folders, "--exit_code", "--json")
    assert ran.code == 1
    norm = strict_json(ran.out)["tensors"]["model.norm.weight"]
    assert (norm["relative_distance"], norm["equal"]) == (0, 2)
    shown = run("diff", *folders).out
    assert "99.99 %" in shown  # not 100: that is said of all alone


def test_nonfinite_entries_are_counted_and_left_out(tmp_path, run: Run):
    a = {"w": np.array([1, np.nan, 3, np.inf, 5], np.float32)}
    b = {"w": np.array([2, np.nan, -np.inf, np.inf, 5], np.float32)}
    folders = write(tmp_path / "a", a), write(tmp_path / "b", b)
    facts = strict_json(run("diff", *folders, "--json").out)["tensors"]["w"]
    assert facts["nonfinite"] == 3
    assert facts["equal"] == 3
    assert facts["relative_distance"] == pytest.approx(1 / math.sqrt(26))
    assert facts["largest_difference"] == 1
    assert "w: 3 entries are NaN or infinite in A or B" in run("diff", *folders).out


def test_squares_that_overflow(tmp_path, run: Run):
    a = {"w": np.array([1e300, -1e300], np.float64)}
    b = {"w": np.array([1e300, 1.7e308], np.float64)}
    folders = write(tmp_path / "a", a), write(tmp_path / "b", b)
    facts = strict_json(run("diff", *folders, "--json").out)["tensors"]["w"]
    assert facts["relative_distance"] is None
    assert (facts["nonfinite"], facts["equal"]) == (0, 1)
    assert "—" in run("diff", *folders).out


def test_a_picture_of_extreme_numbers(tmp_path, run: Run):
    a = {"w": np.array([1e-160]), "zero": np.zeros(3), "none": np.zeros(0)}
    b = {"w": np.array([1.3e154]), "zero": np.ones(3), "none": np.zeros(0)}
    b["nan"] = a["nan"] = np.full(3, np.nan)
    folders = write(tmp_path / "a", a), write(tmp_path / "b", b)
    ran = run("diff", *folders, f"--plot={tmp_path / 'p.png'}")
    assert (ran.code, ran.err.count("\n")) == (0, 1)


def test_zero_on_a_side(tmp_path, run: Run):
    a = {"both": np.zeros(3, np.float32), "one": np.zeros(3, np.float32)}
    b = {"both": np.zeros(3, np.float32), "one": np.ones(3, np.float32)}
    folders = write(tmp_path / "a", a), write(tmp_path / "b", b)
    found = strict_json(run("diff", *folders, "--json").out)["tensors"]
    both, one = found["both"], found["one"]
    assert (both["relative_distance"], both["cosine"]) == (0, None)
    assert (one["relative_distance"], one["cosine"]) == (None, None)
    assert (one["norm_a"], one["norm_b"]) == (0, pytest.approx(math.sqrt(3)))


def test_other_dtypes_are_compared_by_value(tmp_path, run: Run):
    a = random_model(
        0, {"model.layers.0.w": (5, 7), "model.layers.1.w": (9,)}, BFLOAT16
    )
    b = {name: values.astype(np.float32) for name, values in a.items()}
    b["model.layers.1.w"][0] += 1
    folders = write(tmp_path / "a", a), write(tmp_path / "b", b)
    ran = run("diff", *folders, "--exit_code")
    assert ran.code == 1
    assert "model.layers.0–1.w (2 tensors): dtype is BF16 in A, F32 in B" in ran.out
    tensors = {tensor.name: tensor.sums for tensor in compared(*folders).tensors}
    assert tensors["model.layers.0.w"].equal == 35
    assert tensors["model.layers.1.w"].equal == 8


def test_tensors_without_a_partner_are_listed(tmp_path, run: Run):
    a = random_model(0, {f"h.{i}.w": (4,) for i in range(12)} | {"e": (5, 2)})
    b = random_model(0, {f"h.{i}.w": (4,) for i in range(10)} | {"e": (6, 2), "s": ()})
    ran = run("diff", write(tmp_path / "a", a), write(tmp_path / "b", b), "--exit_code")
    assert ran.code == 1
    assert "h.10–11.w (2 tensors): only in A: F32, 4\n" in ran.out
    assert "s: only in B: F32, scalar\n" in ran.out
    assert "e: shape is 5 × 2 in A, 6 × 2 in B\n" in ran.out
    found = strict_json(run("diff", tmp_path / "a", tmp_path / "b", "--json").out)
    assert found["only_a"].keys() == {"h.10.w", "h.11.w"}
    assert found["only_b"] == {"s": {"dtype": "F32", "shape": []}}
    assert found["shapes"] == {"e": [[5, 2], [6, 2]]}
    assert found["total"]["elements"] == 40


def test_nothing_in_common(tmp_path, run: Run):
    a = write(tmp_path / "a", random_model(0, {"x": (3,)}))
    b = write(tmp_path / "b", random_model(0, {"y": (3,)}))
    ran = run("diff", a, b)
    assert ran.code == 0
    assert "no tensor has one shape in A and B" in ran.out
    ran = run("diff", a, b, f"--plot={tmp_path / 'p.png'}")
    assert ran.code == 3
    assert "nothing to draw" in ran.error


@pytest.mark.parametrize("code", FLOAT8)
def test_float8_is_compared_dequantised(tmp_path, run: Run, code):
    weight = np.random.default_rng(0).normal(0, 0.02, (6, 10)).astype(np.float32)
    scale = np.float32(np.abs(weight).max() / 400)
    codes = (weight / scale).astype(FLOAT8[code])
    a = write(tmp_path / "a", {"m.weight": weight.astype(BFLOAT16)})
    b = write_float8(
        tmp_path / "b", code, {"m.weight": codes, "m.weight_scale": scale.reshape(1)}
    )
    comparison = compared(a, b)
    (tensor,) = comparison.tensors
    expected = codes.astype(np.float32) * scale
    distance = np.linalg.norm(weight.astype(BFLOAT16).astype(np.float64) - expected)
    assert tensor.sums.distance == pytest.approx(distance, rel=1e-6)
    assert tensor.dtypes == ("BF16", code)
    assert comparison.unpaired == {"m.weight_scale": (None, ("F32", (1,)))}
    # The same codes with other scales are other weights.
    c = write_float8(
        tmp_path / "c",
        code,
        {"m.weight": codes, "m.weight_scale": 2 * scale.reshape(1)},
    )
    sums = {t.name: t.sums for t in compared(b, c).tensors}
    assert sums["m.weight"].relative_distance == pytest.approx(1)
    assert sums["m.weight_scale"].equal == 0


def test_float8_without_scales_is_compared_as_codes(tmp_path, run: Run):
    codes = np.arange(8, dtype=np.uint8).view(FLOAT8["F8_E4M3"])
    a = write_float8(tmp_path / "a", "F8_E4M3", {"w": codes})
    b = write_float8(tmp_path / "b", "F8_E4M3", {"w": codes[::-1].copy()})
    ran = run("diff", a, b)
    assert ran.code == 0
    assert ran.out.count("compared as codes") == 2


def test_grouped_by_layer_and_kind(tmp_path, run: Run):
    shapes = {
        "model.embed_tokens.weight": (11, 4),
        **{
            f"model.layers.{layer}.{name}.weight": (4, 4)
            for layer in range(11)
            for name in ("self_attn.q_proj", "mlp.experts.0.w2", "mlp.experts.1.w2")
        },
        "lm_head.weight": (11, 4),
    }
    a = random_model(0, shapes)
    b = random_model(1, shapes, base=a)
    folders = write(tmp_path / "a", a), write(tmp_path / "b", b)
    layers, kinds, total = run("diff", *folders).out.split("\n\n")[1:4]
    assert [line.split()[0] for line in layers.splitlines()] == [
        "tensors",
        "model.embed_tokens.weight",
        *[f"model.layers.{layer}" for layer in range(11)],
        "lm_head.weight",
    ]
    labels = [line.split("  ")[0] for line in kinds.splitlines()]
    assert labels == ["embeddings", "attention: q", "MLP: down", "head"]
    assert total.startswith("all 35 tensors")
    down = np.concatenate([a[name].reshape(-1) for name in a if "w2" in name])
    down_b = np.concatenate([b[name].reshape(-1) for name in a if "w2" in name])
    distance = oracle(down, down_b)["relative_distance"]
    assert f"{distance:.3e}" in kinds.splitlines()[2]
    every = run("diff", *folders, "--tensors").out
    assert all(name in every for name in shapes)


@pytest.mark.parametrize("layers", [0, 1, 60])
def test_plot(tmp_path, run: Run, layers):
    shapes = {
        "wte.weight": (5, 4),
        "_odd_$name$": (3,),
        **{
            f"h.{layer}.{name}": (4, 4)
            for layer in range(layers)
            for name in ("attn.q_proj.weight", "mlp.up_proj.weight", "ln_1.weight")
        },
        **{
            f"h.{layer}.strange{i}.$x": (2,)
            for layer in range(layers)
            for i in range(9)
        },
    }
    a = random_model(0, shapes)
    b = random_model(1, shapes, base=a)
    folders = write(tmp_path / "a_$1$", a), write(tmp_path / "b_$2$", b)
    picture = tmp_path / "picture.png"
    ran = run("diff", *folders, f"--plot={picture}")
    assert (ran.code, ran.err.count("\n")) == (0, 1)
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
    assert width > 400 and height > 400


def sublayers(prefix, names, layers):
    return {f"{prefix}.{i}.{name}": (4, 4) for i in range(layers) for name in names}


ATTENTION = [f"self_attn.{kind}_proj.{w}" for kind in "qkv" for w in ("weight", "bias")]
MODELS = {
    "Whisper": {
        **{f"model.{s}.{n}.weight": (9, 4) for s in ("encoder", "decoder")
           for n in ("embed_positions", "layer_norm")},
        "model.encoder.conv1.weight": (4, 3, 3),
        **sublayers("model.encoder.layers", [*ATTENTION, "fc1.weight"], 32),
        **sublayers(
            "model.decoder.layers",
            [*ATTENTION, "encoder_attn.q_proj.weight", "encoder_attn_layer_norm.bias"],
            4,
        ),
    },
    "CLIP": {
        "text_model.embeddings.token_embedding.weight": (9, 4),
        "vision_model.embeddings.position_embedding.weight": (9, 4),
        "logit_scale": (),
        "text_projection.weight": (4, 4),
        **sublayers("text_model.encoder.layers", [*ATTENTION, "layer_norm1.bias"], 12),
        **sublayers("vision_model.encoder.layers", [*ATTENTION, "mlp.fc1.bias"], 24),
    },
    "BERT": {
        "bert.embeddings.word_embeddings.weight": (9, 4),
        "cls.predictions.transform.LayerNorm.weight": (4,),
        **sublayers(
            "bert.encoder.layer",
            [
                "attention.self.query.weight",
                "attention.output.dense.weight",
                "attention.output.LayerNorm.weight",
                "intermediate.dense.bias",
                "output.dense.weight",
            ],
            12,
        ),
    },
    "MoE": {
        "lm_head.weight": (9, 4),
        **sublayers("model.layers", ["mlp.gate.weight", "attn.kv_a_proj_with_mqa"], 61),
        **sublayers("model.layers.3.mlp.experts", ["up_proj.weight"], 64),
        **{f"stack{i}.0.w": (3,) for i in range(500)},
        "model.layers.999999999.w": (3,),
        **sublayers("model.layers", [f"odd{i}.{'long' * 30}" for i in range(60)], 2),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_all_that_a_picture_says_can_be_read(tmp_path, name):
    """No text lies over another or is cut off."""
    from m3jax.commands import plots

    a = random_model(0, MODELS[name])
    b = random_model(1, MODELS[name], base=a)
    comparison = compared(write(tmp_path / "a", a), write(tmp_path / "b", b))
    figure = plots.draw(comparison, "org/" + "a" * 300, "b")
    figure.draw_without_rendering()
    ticks = {  # that lie beyond the axis, and are not drawn
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for place, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
        if not min(axis.get_view_interval()) <= place <= max(axis.get_view_interval())
    }
    texts = [text for text in figure.findobj(Text) if text not in ticks]
    texts = [text for text in texts if text.get_window_extent().width > 1]
    boxes = [text.get_window_extent() for text in texts]
    assert len(boxes) > 30
    for i, box in enumerate(boxes):
        said = texts[i].get_text()
        assert box.x0 >= 0 and box.y0 >= 0, said
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, said
        for other, text in zip(boxes[:i], texts, strict=False):
            # A line's box is a little higher than its letters.
            assert not other.padded(-1).overlaps(box.padded(-1)), (
                said,
                text.get_text(),
            )


def test_integers_are_left_out_of_sums(tmp_path, run: Run):
    weights = random_model(0, {"h.0.w": (5, 3), "h.1.w": (5, 3)})
    ids = np.arange(1000)
    a = {**weights, "position_ids": ids, "h.0.mask": ids > 3}
    b = {name: -values for name, values in weights.items()} | {
        "position_ids": np.where(ids == 7, 0, ids),
        "h.0.mask": ids > 3,
    }
    folders = write(tmp_path / "a", a), write(tmp_path / "b", b)
    ran = run("diff", *folders)
    rows = {line.split("  ")[0]: line.split()[-5:] for line in ran.out.splitlines()}
    assert rows["all 2 tensors"][0] == "2.000e+00"
    assert rows["h.0"][0] == "2.000e+00"
    assert "position_ids: integers, 99.90 % of them equal\n" in ran.out
    assert "mask" not in ran.out
    every = run("diff", *folders, "--tensors").out
    assert "h.0.mask" in every and "all 2 tensors" in every
    found = strict_json(run("diff", *folders, "--json").out)
    assert found["total"]["elements"] == 30
    assert found["tensors"]["position_ids"]["equal"] == 999


def test_work_grows_with_the_number_of_tensors(tmp_path, run: Run):
    """Not with its square: a thousand more names do not make each cost more."""

    def calls(count: int) -> int:
        names = (
            f"h.{i}.mlp.experts.{j}.w" for i in range(count // 8) for j in range(8)
        )
        model = {name: np.zeros(1, np.float32) for name in names}
        folder = write(tmp_path / str(count), model)
        counted = 0

        def count_(frame, event, argument):
            nonlocal counted
            counted += 1

        sys.setprofile(count_)
        try:
            assert run("diff", folder, folder).code == 0
        finally:
            sys.setprofile(None)
        return counted

    calls(8)
    assert calls(1600) < 10 * calls(400)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "needs two checkpoints, not 0"),
        (("a",), 2, "needs two checkpoints, not 1"),
        (("a", "a", "a"), 2, "needs two checkpoints, not 3"),
        (("a", "nowhere"), 3, "nowhere: no such file or folder"),
        (("a", "a", "--plot=p.jpg"), 2, "needs the name of a .png file"),
        (("a", "a", "--plot=nowhere/p.png"), 2, "nowhere is not a folder"),
        (("a", "a", "--exit-code"), 2, "Unknown command line flag 'exit-code'"),
    ],
)
def test_misuse(tmp_path, run: Run, monkeypatch, arguments, code, said):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", random_model(0))
    ran = run("diff", *arguments)
    assert ran.code == code
    assert said in ran.error
    assert ran.out == ""


def test_plot_without_matplotlib(tmp_path, run: Run, monkeypatch):
    a = write(tmp_path / "a", random_model(0))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ran = run("diff", a, a, f"--plot={tmp_path / 'p.png'}")
    assert ran.code == 2
    assert "pip install '.[plot]'" in ran.error


def test_a_file_that_was_cut_off(tmp_path, run: Run):
    a = write(tmp_path / "a", random_model(0))
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(encode(random_model(0))[:-1])
    ran = run("diff", a, cut)
    assert ran.code == 3
    assert "cut.safetensors" in ran.error


def test_commands_that_only_look_do_not_import_jax(tmp_path):
    a = write(tmp_path / "a", random_model(0))
    program = (
        "import sys\n"
        "from m3jax.__main__ import main\n"
        f"assert main(['inspect', {str(a)!r}]) == 0\n"
        f"assert main(['diff', {str(a)!r}, {str(a)!r}, '--exit_code']) == 0\n"
        f"assert main(['verify', {str(a)!r}]) == 3\n"
        "slow = {'jax', 'rich', 'matplotlib', 'huggingface_hub', 'ml_collections'}\n"
        "assert not slow & set(sys.modules), slow & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "has no m3jax.json" in done.stderr
