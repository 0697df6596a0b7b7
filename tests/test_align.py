"""Alignment: planted permutations and added zeros come back, to the bit."""

from __future__ import annotations

import functools
import json

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
import tiny_tokenizer
from flax import linen as nn

import m3jax
from m3jax.align import Units, layout
from m3jax.align.architectures import GROUPS
from m3jax.checkpoints.formats import tree
from m3jax.models.decoder import forward

WIDE = {
    "model_type": "llama",
    "intermediate_size": 56,
    "num_attention_heads": 12,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "attention_bias": True,
    "mlp_bias": True,
}
NARROW = {**WIDE, "intermediate_size": 40, "num_attention_heads": 4} | {
    "num_key_value_heads": 2
}
FAMILIES = {"wide": WIDE, "narrow": NARROW}


@pytest.fixture(autouse=True)
def families(monkeypatch):
    for name, own in FAMILIES.items():
        monkeypatch.setitem(tiny_models.FAMILIES, name, own)


# An oracle of its own: what a permutation does to every tensor of a layer.


def planted(family: str, groups=GROUPS, seed: int = 5) -> dict[str, np.ndarray]:
    """The tensors of another order of units, made by hand."""
    config, rng = tiny_models.config(family), np.random.default_rng(seed)
    tensors = dict(tiny_models.tensors(family))
    kv, dim = config.num_key_value_heads, config.head_dim
    share = config.num_attention_heads // kv
    inner = getattr(config, "intermediate_size", None) or config.inner_size
    for layer in range(config.num_layers):
        ffn = rng.permutation(inner)
        outer = rng.permutation(kv)
        inside = [rng.permutation(share) for _ in range(kv)]
        heads = np.concatenate([outer[a] * share + inside[a] for a in range(kv)])
        for name in tensors:
            if f".{layer}." not in name:
                continue
            part = name.split(f".{layer}.")[1]
            if "ffn" in groups:
                tensors[name] = moved_ffn(part, tensors[name], ffn)
            if "heads" in groups:
                tensors[name] = moved_heads(part, tensors[name], outer, heads, dim)
    if "residual" in groups:
        order = rng.permutation(config.hidden_size)
        for name, own in tensors.items():
            tensors[name] = moved_residual(name, own, order)
    return tensors


def moved_ffn(part, own, order):
    if part.startswith(("mlp.gate", "mlp.up", "mlp.c_fc.bias", "mlp.c_proj.weight")):
        return own[order]
    if part in ("mlp.down_proj.weight", "mlp.c_fc.weight"):
        return own[:, order]
    return own


def moved_heads(part, own, outer, heads, dim):
    if "c_attn" in part:
        split = own.reshape(*own.shape[:-1], 3, -1, dim)
        return split[..., heads, :].reshape(own.shape)
    if part == "attn.c_proj.weight":
        return own.reshape(-1, dim, own.shape[1])[heads].reshape(own.shape)
    if "o_proj.weight" in part:
        return own.reshape(len(own), -1, dim)[:, heads].reshape(own.shape)
    for kind, order in (("q", heads), ("k", outer), ("v", outer)):
        if f"{kind}_proj" in part:
            return own.reshape(-1, dim, *own.shape[1:])[order].reshape(own.shape)
    return own


def moved_residual(name, own, order):
    if name.endswith(("c_fc.bias", "c_attn.bias")) or "q_norm" in name:
        return own
    if "k_norm" in name or name.endswith(
        ("q_proj.bias", "k_proj.bias", "v_proj.bias", "gate_proj.bias", "up_proj.bias")
    ):
        return own
    if name.endswith(("c_attn.weight", "c_fc.weight")) or own.ndim == 1:
        return own[order]
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return own[order]
    return own[:, order]  # embeddings, the head, and what reads the stream


def logits(tensors, family):
    parameters = tree.nest({n: jnp.asarray(t) for n, t in tensors.items()})
    tokens = jnp.asarray(tiny_models.prompts(2, 7))
    return forward(parameters, tokens, config=tiny_models.config(family))


@pytest.mark.parametrize(
    ("family", "groups"),
    [
        ("wide", ("ffn", "heads")),
        ("wide", GROUPS),
        ("qwen3", ("heads", "residual")),
        ("gpt2", GROUPS),
    ],
)
def test_a_planted_order_computes_the_same_and_comes_back(family, groups):
    target = tiny_models.tensors(family)
    source = planted(family, groups)
    np.testing.assert_allclose(
        logits(source, family), logits(target, family), rtol=1e-4, atol=1e-4
    )
    axes, units = layout(tiny_models.config(family), groups)
    found = m3jax.align.weight_matching(
        tree.nest(target), tree.nest(source), axes, units=units
    )
    aligned, _ = tree.flatten(m3jax.align.permute(tree.nest(source), found, axes))
    for name, own in target.items():
        assert np.array_equal(aligned[name], own), name
    # The average of the two is the model, and the average as they were is not.
    assert not np.allclose(
        logits({n: (t + source[n]) / 2 for n, t in target.items()}, family),
        logits(target, family),
        atol=0.1,
    )


def test_only_what_is_exact_may_move():
    """Channels of heads have rotary angles, heads their keys."""
    axes, units = layout(tiny_models.config("wide"), GROUPS)
    prefix = "model.layers.0."
    assert units[f"{prefix}queries"] == Units(8, within=f"{prefix}keys")
    assert axes["model.layers.0.self_attn.q_proj.weight"] == (
        f"{prefix}queries",
        "residual",
    )
    assert axes["model.embed_tokens.weight"] == (None, "residual")
    rng = np.random.default_rng(0)
    target, source = (
        tree.nest({n: rng.normal(size=t.shape) for n, t in own.items()})
        for own in (tiny_models.tensors("wide"), tiny_models.tensors("narrow"))
    )
    axes, units = layout(tiny_models.config("wide"))
    found = m3jax.align.weight_matching(
        target, source, axes, units=units, keep_all=True
    )
    queries, keys = found[f"{prefix}queries"], found[f"{prefix}keys"]
    for group, count in ((queries, 4), (keys, 2)):
        heads = group.reshape(-1, 8)
        there = heads[heads[:, 0] >= 0]
        assert len(there) == count
        assert np.array_equal(there % 8, np.tile(np.arange(8), (count, 1)))
        assert np.all(heads[heads[:, 0] < 0] == -1)
    for head, own in enumerate(queries[::8] // 8):
        if own >= 0:  # four to each head of keys here, two there
            assert own // 2 == keys[8 * (head // 4)] // 8
    assert sorted(found[f"{prefix}ffn"])[-40:] == list(range(40))


def write(folder, tensors, family):
    tensors = {n: np.ascontiguousarray(t) for n, t in tensors.items()}  # as on disk
    checkpoints.write(folder, tensors, tiny_models.config_dict(family))
    tiny_tokenizer.write(folder)
    return folder


def assert_same(ours, theirs):
    ours, theirs = checkpoints.read(ours), checkpoints.read(theirs)
    assert ours.keys() == theirs.keys()
    for name, own in theirs.items():
        assert np.array_equal(ours[name], own), name


def test_the_command_writes_what_merges_without_a_barrier(tmp_path, run):
    target = write(tmp_path / "a", tiny_models.tensors("wide"), "wide")
    source = write(tmp_path / "b", planted("wide", ("ffn", "heads")), "wide")
    ran = run("align", source, f"--to={target}", f"--output={tmp_path}/aligned")
    assert ran.code == 0, ran.err
    lines = dict(line.split(maxsplit=1) for line in ran.out.splitlines())
    assert lines["ffn"].split()[2] == str(2 * 56)
    assert lines["heads"].split()[2] == str(2 * 12)
    assert "added" not in ran.out
    assert_same(tmp_path / "aligned", target)
    models = f"--models={target},{tmp_path}/aligned"
    ran = run("merge", models, f"--output={tmp_path}/merged", "--config=average")
    assert ran.code == 0, ran.err
    assert_same(tmp_path / "merged", target)
    again = run(
        "align", tmp_path / "aligned", f"--to={target}", f"--output={tmp_path}/2"
    )
    assert "it was aligned before" in again.out


def test_a_narrower_model_gets_units_of_zeros(tmp_path, run):
    """And computes what it did: in our decoder, and where it had a wider partner."""
    narrow = tiny_models.tensors("narrow")
    source = write(tmp_path / "narrow", narrow, "narrow")
    target = write(tmp_path / "wide", tiny_models.tensors("wide"), "wide")
    ran = run("align", source, f"--to={target}", f"--output={tmp_path}/padded")
    assert ran.code == 0, ran.err
    assert "32 of zeros added" in ran.out  # (56 - 40) in 2 layers
    assert "16 of zeros added" in ran.out  # heads: (12 - 4) in 2 layers
    config = json.loads((tmp_path / "padded/config.json").read_text())
    assert config == {**json.loads((source / "config.json").read_text()), **WIDE}
    padded = checkpoints.read(tmp_path / "padded")
    np.testing.assert_allclose(
        logits(padded, "wide"), logits(narrow, "narrow"), rtol=1e-5, atol=1e-5
    )
    # Its other order is found, zeros and all, in both directions.
    config = tiny_models.config("wide")
    axes, units = layout(config)
    rng = np.random.default_rng(1)
    shuffled = {n: t.copy() for n, t in padded.items()}
    for layer in range(2):
        order = rng.permutation(56)
        for name in shuffled:
            if f".{layer}.mlp." in name:
                part = name.split(f".{layer}.")[1]
                shuffled[name] = moved_ffn(part, shuffled[name], order)
    other = write(tmp_path / "shuffled", shuffled, "wide")
    ran = run("align", source, f"--to={other}", f"--output={tmp_path}/back")
    assert ran.code == 0, ran.err
    for name, own in checkpoints.read(tmp_path / "back").items():
        assert np.array_equal(own, shuffled[name]), name
    found = m3jax.align.weight_matching(
        tree.nest(narrow), tree.nest(shuffled), axes, units=units
    )
    back, _ = tree.flatten(m3jax.align.permute(tree.nest(shuffled), found, axes))
    for name, own in narrow.items():
        assert np.array_equal(back[name], own), name


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{0}/wide", "--output={0}/o"], 2, "--to is missing"),
        (["--to={0}/wide", "--output={0}/o"], 2, "needs one model, not 0"),
        (["{0}/wide", "--to={0}/narrow", "--output={0}/o"], 3, "units would be lost"),
        (["{0}/wide", "--to={0}/gpt2", "--output={0}/o"], 3, "family = llama"),
        (["{0}/wide", "--to={0}/wide", "--output={0}/gpt2"], 3, "exists"),
        (["{0}/wide", "--to={0}/none", "--output={0}/o"], 3, "none"),
        (
            ["{0}/wide", "--to={0}/wide", "--output={0}/o", "--units=mlp"],
            2,
            "--units: 'mlp' needs one of ffn, heads, residual",
        ),
    ],
)
def test_what_cannot_be_aligned_is_said(arguments, code, message, tmp_path, run):
    for family in ("wide", "narrow", "gpt2"):
        write(tmp_path / family, tiny_models.tensors(family), family)
    ran = run("align", *(own.format(tmp_path) for own in arguments))
    assert (ran.code, message in ran.error) == (code, True), ran.err
    assert not (tmp_path / "o").exists()


# Networks of the user's own: axes by hand.


class Mlp(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(self.width)(x))
        x = nn.relu(nn.Dense(self.width + 3)(x))
        return nn.Dense(4)(x)


MLP = {
    "params.Dense_0.kernel": [None, "first"],
    "params.Dense_0.bias": ["first"],
    "params.Dense_1.kernel": ["first", "second"],
    "params.Dense_1.bias": ["second"],
    "params.Dense_2.kernel": ["second", None],
}


class Cnn(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(self.width, (3, 3))(x))
        x = nn.relu(nn.Conv(self.width + 2, (3, 3))(x))
        x = x.reshape(len(x), -1)  # the last axis, channels, is the fastest
        return nn.Dense(4)(x)


CNN = {
    "params.Conv_0.kernel": [None, None, None, "first"],
    "params.Conv_0.bias": ["first"],
    "params.Conv_1.kernel": [None, None, "first", "second"],
    "params.Conv_1.bias": ["second"],
    "params.Dense_0.kernel": [("second", 9), None],
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_network(network, width, parameters, x):
    return network(width).apply(parameters, x)


@pytest.mark.parametrize(
    ("network", "axes", "shape", "second"),
    [(Mlp, MLP, (5, 6), 10), (Cnn, CNN, (2, 3, 3, 2), 9)],
)
def test_a_planted_network_merges_without_a_barrier(network, axes, shape, second):
    """Permuted, with units of zeros among the others; in both directions."""
    rng, more = np.random.default_rng(0), 4
    x = rng.normal(size=shape).astype(np.float32)
    shapes = jax.eval_shape(network(7).init, jax.random.key(0), x)
    narrow = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(s.dtype), shapes)
    # Where each unit of the wide network comes from, −1 being nowhere.
    places = {
        group: rng.permutation(np.r_[np.arange(n), np.full(more, -1)])
        for group, n in (("first", 7), ("second", second))
    }
    wide = m3jax.align.permute(narrow, places, axes)
    np.testing.assert_allclose(
        run_network(network, 7 + more, wide, x),
        run_network(network, 7, narrow, x),
        rtol=1e-4,
        atol=1e-4,
    )
    for target, source in ((wide, narrow), (narrow, wide)):
        found = m3jax.align.weight_matching(target, source, axes)
        aligned = m3jax.align.permute(source, found, axes)
        merged = jax.tree.map(lambda a, b: (a + b) / 2, target, aligned)
        for ours, theirs in zip(*map(jax.tree.leaves, (merged, target)), strict=True):
            assert np.array_equal(ours, theirs)
