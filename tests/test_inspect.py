"""`m3jax inspect` on every kind of checkpoint, with and without provenance."""

import json

import numpy as np
import pytest
from checkpoints import BFLOAT16, ODD_SHAPES, encode, random_model, write
from command_line import Run

import m3jax
from m3jax.commands import tensor_names

LLAMA = {
    "model.embed_tokens.weight": (11, 4),
    **{
        f"model.layers.{layer}.{name}.weight": shape
        for layer in range(12)
        for name, shape in {
            "input_layernorm": (4,),
            "mlp.down_proj": (4, 6),
            "mlp.gate_proj": (6, 4),
            "self_attn.q_proj": (4, 4),
        }.items()
    },
    "model.norm.weight": (4,),
    "lm_head.weight": (11, 4),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4,
    "tie_word_embeddings": False,
}


def rows(text):
    """The table of tensors: its cells, without the header."""
    table = text[text.index("\ntensor ") :].strip().splitlines()[1:]
    return [row.split("  ", 1)[0] for row in table]


def test_folds_the_layers(tmp_path, run: Run):
    folder = write(tmp_path / "a", random_model(0, LLAMA, BFLOAT16), CONFIG)
    ran = run("inspect", folder)
    assert (ran.code, ran.err) == (0, "")
    assert rows(ran.out) == [
        "model.embed_tokens.weight",
        "model.layers.0–11.self_attn.q_proj.weight",
        "model.layers.0–11.mlp.gate_proj.weight",
        "model.layers.0–11.mlp.down_proj.weight",
        "model.layers.0–11.input_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ]
    assert "kind          folder, one safetensors file\n" in ran.out
    assert "parameters    908 in 51 tensors\n" in ran.out
    assert "bytes         1.8 kB\n" in ran.out
    assert "dtypes        BF16: 908 parameters in 51 tensors\n" in ran.out
    assert "architecture  LlamaForCausalLM\n" in ran.out
    assert "tie_word_embeddings false" in ran.out
    every = run("inspect", folder, "--tensors")
    assert sorted(rows(every.out)) == sorted(LLAMA)
    assert rows(every.out).index("model.layers.10.mlp.gate_proj.weight") == 42


def test_layers_that_differ_are_not_folded(tmp_path, run: Run):
    model = {f"h.{i}.w": np.zeros((2 + i % 2,), np.float32) for i in range(20)}
    model |= {"h.3.w": np.zeros(3, np.float16), "h.5.w": np.zeros(3, np.float16)}
    ran = run("inspect", write(tmp_path / "a", model))
    lines = ran.out[ran.out.index("\ntensor ") :].strip().splitlines()[1:]
    assert [line.split() for line in lines] == [
        ["h.*.w", "10", "F32", "2", "80", "B"],
        ["h.*.w", "8", "F32", "3", "96", "B"],
        ["h.3,5.w", "2", "F16", "3", "12", "B"],
    ]


def test_json(tmp_path, run: Run):
    model = random_model(0)
    names = list(model)
    folder = write(tmp_path / "a", model, CONFIG, shards=[names[:3], names[3:]])
    found = json.loads(run("inspect", folder, "--json").out)
    assert found["kind"] == "folder, 2 shards of safetensors"
    assert found["parameters"] == sum(values.size for values in model.values())
    assert found["bytes"] == sum(values.nbytes for values in model.values())
    assert found["architecture"] == CONFIG
    assert found["provenance"] is found["provenance_problem"] is None
    assert found["files"] == {
        path.name: path.stat().st_size for path in folder.glob("*.safetensors")
    }
    assert {name: facts["shape"] for name, facts in found["tensors"].items()} == {
        name: list(shape) for name, shape in ODD_SHAPES.items()
    }
    assert sum(facts["bytes"] for facts in found["tensors"].values()) == found["bytes"]


def test_a_single_file_of_many_dtypes(tmp_path, run: Run):
    model = {
        "ids": np.arange(5),
        "mask": np.array([True, False]),
        "nothing": np.zeros((0, 3), np.float16),
        "scale": np.array(1.5, np.float64),
        "w": np.zeros((2, 3), BFLOAT16),
    }
    path = tmp_path / "x.safetensors"
    path.write_bytes(encode(model))
    ran = run("inspect", path)
    assert ran.code == 0
    assert "a single safetensors file" in ran.out
    assert "unknown: there is no config.json" in ran.out
    found = json.loads(run("inspect", path, "--json").out)
    assert found["dtypes"] == {
        "I64": {"tensors": 1, "parameters": 5, "bytes": 40},
        "BF16": {"tensors": 1, "parameters": 6, "bytes": 12},
        "F64": {"tensors": 1, "parameters": 1, "bytes": 8},
        "BOOL": {"tensors": 1, "parameters": 2, "bytes": 2},
        "F16": {"tensors": 1, "parameters": 0, "bytes": 0},
    }


def test_provenance(tmp_path, run: Run):
    base = random_model(0, LLAMA)
    write(tmp_path / "base", base)
    models = [
        write(tmp_path / name, random_model(seed, LLAMA, base=base))
        for seed, name in ((1, "maths"), (2, "code"))
    ]
    mixup = m3jax.Mixup(alpha=0.4, granularity="layer")
    recipe = m3jax.Recipe(method="ties", mixup=mixup, exclude=("lm_head",))
    merged = tmp_path / "merged"
    result = m3jax.merge(tmp_path / "base", models, merged, recipe, seed=11)
    ran = run("inspect", merged)
    for said in (
        f"merged by     m3jax {m3jax.__version__}, python ",
        "method        ties, seed 11\n",
        "mixup.alpha=0.4\n",
        "exclude=('lm_head',)\n",
        f"base          {tmp_path / 'base'}\n",
        f"model 1       {tmp_path / 'maths'}\n",
        f"model 2       {tmp_path / 'code'}\n",
    ):
        assert said in ran.out
    assert "mixup.granularity='layer'" in ran.out
    first, second = result.ratios["model.layers.0"]
    assert f"model.layers.0: {first:.6f}, {second:.6f}\n" in ran.out
    found = json.loads(run("inspect", merged, "--json").out)["provenance"]
    assert m3jax.Recipe.from_dict(found["recipe"]) == recipe
    assert found["seed"] == 11
    assert {g: tuple(r) for g, r in found["ratios"].items()} == result.ratios
    assert found["versions"]["m3jax"] == m3jax.__version__


def test_a_damaged_record_is_said_and_the_rest_shown(tmp_path, run: Run):
    folder = write(tmp_path / "a", random_model(0))
    (folder / "m3jax.json").write_text('{"format": 99}')
    ran = run("inspect", folder)
    assert ran.code == 0
    assert "provenance    cannot be used: " in ran.out
    assert "has format 99" in ran.out
    assert "lm_head.weight" in ran.out
    found = json.loads(run("inspect", folder, "--json").out)
    assert "has format 99" in found["provenance_problem"]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"architectures": "x", "model_type": ["a"], "hidden_size": {"a": 1}},
        {"architectures": ["A\x1b[31m\n", 3, "B" * 10**4], "hidden_size": "\ud800"},
        {"text_config": {"hidden_size": 7}, "quantization_config": {"quant_method": 3}},
        {"text_config": [], "quantization_config": [], "hidden_size": 1e300},
        {"hidden_size": json.loads("[" * 300 + "]" * 300)},
    ],
)
def test_any_config(tmp_path, run: Run, config):
    folder = write(tmp_path / "a", random_model(0))
    (folder / "config.json").write_text(json.dumps(config))
    for option in ((), ("--json",)):
        ran = run("inspect", folder, *option)
        assert ran.code == 0
        assert "\x1b" not in ran.out
        assert option or max(map(len, ran.out.splitlines())) < 300


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "needs one checkpoint, not 0; usage: m3jax inspect DIR"),
        (("a", "b"), 2, "needs one checkpoint, not 2"),
        (("a", "--tensor"), 2, "Unknown command line flag 'tensor'. Did you mean"),
        (("nowhere",), 3, "nowhere: no such file or folder"),
        (("empty",), 3, "empty: "),
        (("text",), 3, "text"),
    ],
)
def test_misuse(tmp_path, run: Run, monkeypatch, arguments, code, said):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", random_model(0))
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("no checkpoint")
    ran = run("inspect", *arguments)
    assert ran.code == code
    assert said in ran.error
    assert ran.out == ""


@pytest.mark.parametrize("command", ["inspect", "diff", "verify"])
def test_help(run: Run, command):
    ran = run(command, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert f"usage: m3jax {command} " in ran.out


@pytest.mark.parametrize(
    ("name", "stack", "layer", "part", "kind"),
    [
        ("model.embed_tokens.weight", "", None, "embeddings", "embeddings"),
        ("model.norm.weight", "", None, "norms", "final norm"),
        ("lm_head.weight", "", None, "head", "head"),
        (
            "model.layers.3.self_attn.q_proj.bias",
            "model.layers",
            3,
            "attention",
            "q bias",
        ),
        ("model.layers.10.mlp.experts.7.w2.weight", "model.layers", 10, "MLP", "down"),
        ("model.layers.0.mlp.gate.weight", "model.layers", 0, "MLP", "router"),
        (
            "model.layers.0.self_attn.k_norm.weight",
            "model.layers",
            0,
            "norms",
            "k norm",
        ),
        ("h.0.attn.c_attn.weight", "h", 0, "attention", "qkv"),
        ("h.0.mlp.c_proj.weight", "h", 0, "MLP", "down"),
        ("h.0.attn.c_proj.weight", "h", 0, "attention", "o"),
        *[
            (f"bert.encoder.layer.3.{name}", "bert.encoder.layer", 3, part, kind)
            for name, part, kind in [
                ("attention.self.query.weight", "attention", "q"),
                ("attention.output.dense.bias", "attention", "o bias"),
                ("attention.output.LayerNorm.weight", "norms", "attention norm"),
                ("intermediate.dense.weight", "MLP", "up"),
                ("output.dense.weight", "MLP", "down"),
                ("output.LayerNorm.weight", "norms", "MLP norm"),
            ]
        ],
        ("bert.pooler.dense.weight", "", None, "head", "pooler.dense"),
        *[
            (f"model.decoder.layers.3.{name}", "model.decoder.layers", 3, part, kind)
            for name, part, kind in [
                ("self_attn.q_proj.weight", "attention", "q"),
                ("encoder_attn.q_proj.weight", "attention", "cross q"),
                ("encoder_attn_layer_norm.bias", "norms", "cross attention norm bias"),
                ("final_layer_norm.weight", "norms", "MLP norm"),
            ]
        ],
        ("model.decoder.layer_norm.weight", "", None, "norms", "decoder.layer_norm"),
        (
            "vision_model.encoder.layers.0.layer_norm2.weight",
            "vision_model.encoder.layers",
            0,
            "norms",
            "before MLP",
        ),
        ("text_projection.weight", "", None, "head", "text_projection"),
        (
            "model.layers.1.mlp.shared_experts.up_proj.weight",
            "model.layers",
            1,
            "MLP",
            "shared up",
        ),
        (
            "model.layers.1.block_sparse_moe.gate.weight",
            "model.layers",
            1,
            "MLP",
            "router",
        ),
        ("h.0.ln_2.weight", "h", 0, "norms", "before MLP"),
        ("wte.weight", "", None, "embeddings", "embeddings"),
        ("0.weight", "", 0, "other", "weight"),
        ("layer1.scale", "", None, "other", "layer1.scale"),
        ("w", "", None, "other", "w"),
    ],
)
def test_names(name, stack, layer, part, kind):
    assert tensor_names.describe(name) == tensor_names.TensorName(
        stack, layer, part, kind
    )


@pytest.mark.parametrize("name", ["", ".", "..", "0", "1.2.3", "a..1..b", "9" * 4000])
def test_strange_names(name):
    assert tensor_names.in_order([name, "model.layers.0.w"])
    assert tensor_names.alike([name], len) == [(name, [name])]
