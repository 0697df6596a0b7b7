"""Checkpoints of one model under other names merge as under the base's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoints
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import m3jax
from m3jax import CheckpointError, Mixup, Recipe, RecipeError
from m3jax.checkpoints.formats.dtypes import of_numpy
from m3jax.checkpoints.naming import common, layouts, prefixes, wrappers
from m3jax.checkpoints.source import Array, read_whole
from m3jax.checkpoints.sources import views
from m3jax.engine.execution import Execution

Tensors = checkpoints.Tensors
PLAIN = Recipe(mixup=Mixup(alpha=None))
SHAPES = {
    "model.embed_tokens.weight": (11, 6),
    "model.layers.0.self_attn.q_proj.weight": (6, 6),
    "model.layers.0.self_attn.k_proj.weight": (3, 6),
    "model.layers.0.self_attn.v_proj.weight": (3, 6),
    "model.layers.0.mlp.gate_proj.weight": (5, 6),
    "model.layers.0.mlp.up_proj.weight": (5, 6),
    "model.layers.0.mlp.down_proj.weight": (6, 5),
    "model.layers.1.mlp.down_proj.weight": (6, 5),
    "model.norm.weight": (6,),
}
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
UNTIED = {"tie_word_embeddings": False}
TIED = {"tie_word_embeddings": True}


def model(seed: int, shapes: Any = SHAPES) -> Tensors:
    return checkpoints.random_model(seed, shapes)


def mean(a: Tensors, b: Tensors) -> Tensors:
    return {name: (a[name] + b[name]) / 2 for name in a}


def named(tensors: Tensors, rename: Callable[[str], str]) -> Tensors:
    return {rename(name): tensor for name, tensor in tensors.items()}


class Merged:
    """A merge's tensors, config.json, and the notes in its record."""

    def __init__(self, folder: Path):
        self.tensors = checkpoints.read(folder)
        self.record = json.loads((folder / "m3jax.json").read_text())
        self.notes = "\n".join(self.record["notes"])
        config = folder / "config.json"
        self.config = json.loads(config.read_text()) if config.exists() else None


@pytest.fixture
def merge(tmp_path: Path) -> Callable[..., Merged]:
    def run(
        base: Tensors,
        *models: Tensors,
        configs: list[Any] | None = None,
        recipe: Recipe = PLAIN,
    ) -> Merged:
        for i, tensors in enumerate((base, *models)):
            own = configs[i] if configs else None
            checkpoints.write(
                tmp_path / ("base" if i == 0 else "abc"[i - 1]), tensors, own
            )
        paths = [tmp_path / "abc"[i] for i in range(len(models))]
        m3jax.merge(tmp_path / "base", paths, tmp_path / "out", recipe)
        assert m3jax.verify(tmp_path / "out") == []
        again = Recipe.from_dict(Merged(tmp_path / "out").record["recipe"])
        m3jax.merge(tmp_path / "base", paths, tmp_path / "again", again)
        ours, theirs = (checkpoints.digest(tmp_path / n) for n in ("out", "again"))
        assert ours == theirs, "the record makes the same bytes"
        return Merged(tmp_path / "out")

    return run


def assert_same(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


class TestPlain:
    def test_nothing_is_said_and_nothing_is_imported(self, merge, monkeypatch):
        def fail(*arguments: Any) -> None:
            raise AssertionError("names are equal: transformers is not asked")

        monkeypatch.setattr("m3jax.checkpoints.naming.registry.of", fail)
        monkeypatch.setattr("m3jax.checkpoints.naming.registry._default", fail)
        base = model(0, {**SHAPES, HEAD: (11, 6)})
        made = merge(base, base, base, configs=[{"model_type": "llama"}] * 3)
        assert_same(made.tensors, base)
        assert made.notes == ""


class TestWrappers:
    @pytest.mark.parametrize(
        "wrap",
        [
            lambda name: f"_orig_mod.{name}",
            lambda name: f"module.{name}",
            lambda name: f"module._orig_mod.{name}",
            lambda name: f"base_model.model.{name}",
            lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
            lambda name: name.replace("model.", "model._orig_mod.", 1),
        ],
    )
    @pytest.mark.parametrize("who", ["base", "model"])
    def test_prefixes_go(self, wrap, who, merge):
        a, b = model(1), model(2)
        first, second = (a, named(b, wrap)) if who == "model" else (named(a, wrap), b)
        made = merge(first, a, second)
        assert_same(made.tensors, mean(a, b))
        assert "is left off" in made.notes

    def test_a_module_of_that_name_stays(self):
        table = {"module.a": 1, "other.b": 2}
        assert wrappers.unwrap(table) == (table, "")


class TestPrefixes:
    @pytest.mark.parametrize(
        ("base", "other"),
        [
            ("", "transformer."),
            ("transformer.", ""),
            ("language_model.model.", "model.language_model."),
            ("model.", "model.language_model."),
            ("model.", "language_model.model."),
            ("bert.", ""),
        ],
    )
    def test_either_way(self, base, other, merge):
        a, b = model(1), model(2)
        first = named(a, lambda name: name.replace("model.", base, 1))
        second = named(b, lambda name: name.replace("model.", other, 1))
        wanted = mean(a, b)
        made = merge(first, first, second)
        assert_same(made.tensors, {n: wanted[o] for n, o in zip(first, a, strict=True)})
        assert "prefix" in made.notes

    def test_an_encoder_never_becomes_a_decoder(self, merge):
        a = named(model(1), lambda name: name.replace("model.", "encoder."))
        b = named(model(1), lambda name: name.replace("model.", "decoder."))
        with pytest.raises(CheckpointError, match="no tensor name in common"):
            merge(a, a, b)

    def test_a_name_that_could_be_two_stays(self):
        def table(*names: str) -> dict[str, Array]:
            return {n: Array(np.ones((2, 2), np.float32), "") for n in names}

        target = table("text.layers.0.w", "vision.layers.0.w")
        given = table("layers.0.w")
        assert prefixes.fit(given, target) == (given, [])

    def test_one_odd_name_moves_nothing(self):
        """A norm of one model is not that of a part of another."""

        def table(*names: str) -> dict[str, Array]:
            return {n: Array(np.ones(2, np.float32), "") for n in names}

        given = table("a.x.weight", "b.y.weight", "norm.weight")
        target = table("a.x.weight", "b.y.weight", "vision.norm.weight")
        assert prefixes.fit(given, target) == (given, [])


class TestLayouts:
    @staticmethod
    def fused(tensors: Tensors) -> Tensors:
        made = dict(tensors)
        place = "model.layers.0.self_attn."
        made[f"{place}qkv_proj.weight"] = np.concatenate(
            [made.pop(f"{place}{part}_proj.weight") for part in "qkv"]
        )
        place = "model.layers.0.mlp."
        made[f"{place}gate_up_proj.weight"] = np.concatenate(
            [made.pop(f"{place}{part}_proj.weight") for part in ("gate", "up")]
        )
        return made

    @staticmethod
    def experts(seed: int, words: tuple[str, str, str], home: str = "mlp") -> Tensors:
        shapes = {"model.norm.weight": (6,)}
        for layer in range(2):
            for expert in range(11):  # in order of their numbers, not of their names
                place = f"model.layers.{layer}.{home}.experts.{expert}."
                gate, up, down = words
                shapes[f"{place}{gate}.weight"] = shapes[f"{place}{up}.weight"] = (4, 6)
                shapes[f"{place}{down}.weight"] = (6, 4)
        return model(seed, shapes)

    @staticmethod
    def stacked(tensors: Tensors, words: tuple[str, str, str]) -> Tensors:
        made = {"model.norm.weight": tensors["model.norm.weight"]}
        for layer in range(2):
            place = f"model.layers.{layer}.mlp.experts."
            gate, up, down = (
                np.stack([tensors[f"{place}{i}.{word}.weight"] for i in range(11)])
                for word in words
            )
            made[f"{place}gate_up_proj"] = np.concatenate([gate, up], 1)
            made[f"{place}down_proj"] = down
        return made

    @pytest.mark.parametrize("who", ["base", "model"])
    def test_projections(self, who, merge):
        a, b = model(1), model(2)
        if who == "model":
            made = merge(a, a, self.fused(b))
            assert_same(made.tensors, mean(a, b))
        else:
            made = merge(self.fused(a), a, b)
            assert_same(made.tensors, self.fused(mean(a, b)))
        assert "several tensors read as one" in made.notes

    @pytest.mark.parametrize("who", ["base", "model"])
    @pytest.mark.parametrize(
        "words", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")]
    )
    def test_experts(self, who, words, merge):
        a, b = self.experts(1, words), self.experts(2, words)
        if who == "model":
            made = merge(a, a, self.stacked(b, words))
            assert_same(made.tensors, mean(a, b))
        else:
            made = merge(self.stacked(a, words), a, b)
            assert_same(made.tensors, self.stacked(mean(a, b), words))

    @pytest.mark.parametrize(
        "execution", [{"executor": "sharded"}, {"chunk_size": 1024, "threads": 1}]
    )
    def test_views_are_read_alike_by_all_executors(self, execution, tmp_path: Path):
        words = "gate_proj", "up_proj", "down_proj"
        a, b = self.experts(1, words), self.experts(2, words)
        for name, tensors in ("base", a), ("a", b), ("b", self.stacked(a, words)):
            checkpoints.write(tmp_path / name, tensors)
        recipe = Recipe(
            method="ties", mixup=Mixup(alpha=None), dare=m3jax.Dare(drop_rate=0.3)
        )
        models = [tmp_path / "a", tmp_path / "b"]
        m3jax.merge(tmp_path / "base", models, tmp_path / "out", recipe)
        m3jax.merge(
            tmp_path / "base",
            models,
            tmp_path / "other",
            recipe,
            execution=Execution(**execution),
        )
        found, other = (checkpoints.read(tmp_path / n) for n in ("out", "other"))
        assert_same(found, other)

    def test_experts_of_another_number_do_not_fit(self, merge):
        words = "gate_proj", "up_proj", "down_proj"
        a = self.experts(1, words)
        b = {
            name: tensor[:10] if "experts" in name else tensor
            for name, tensor in self.stacked(a, words).items()
        }
        with pytest.raises(CheckpointError, match="is missing in"):
            merge(a, a, b)


def sources_of(tensors: Tensors) -> dict[str, Array]:
    return {name: Array(tensor, "") for name, tensor in tensors.items()}


class TestViews:
    """Any run of elements of a view is NumPy's."""

    @given(st.data())
    def test_runs(self, data):
        shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=3)))
        count = data.draw(st.integers(1, 4))
        axis = data.draw(st.integers(0, len(shape) - 1))
        generator = np.random.default_rng(0)
        arrays = [generator.random(shape, np.float32) for _ in range(count)]
        given = [Array(array, "") for array in arrays]
        stacked = views.stacked(given)
        joined = views.concatenated(given, axis)
        cases = [
            (stacked, np.stack(arrays)),
            (joined, np.concatenate(arrays, axis)),
            (views.Transposed(stacked), np.swapaxes(np.stack(arrays), -1, -2)),
            (
                views.concatenated([stacked, stacked], 1),
                np.concatenate([np.stack(arrays)] * 2, 1),
            ),
            *zip(views.chunks(joined, count, axis), arrays, strict=True),
        ]
        for view, wanted in cases:
            assert view.shape == wanted.shape
            start = data.draw(st.integers(0, wanted.size))
            length = data.draw(st.integers(0, wanted.size - start))
            out = np.empty(length, np.float32)
            view.read_into(out, start)
            np.testing.assert_array_equal(out, wanted.reshape(-1)[start:][:length])

    def test_inverted(self):
        """What made one model's tensor finds its parts in another's."""
        generator = np.random.default_rng(0)
        mine = [Array(generator.random((3, 4), np.float32), "") for _ in range(4)]
        yours = generator.random((2, 8, 3), np.float32)
        made = views.Transposed(
            views.concatenated([views.stacked(mine[:2]), views.stacked(mine[2:])], 1)
        )
        other = np.swapaxes(yours, 1, 2).copy()  # (2, 3, 8)
        made = views.concatenated([views.stacked(mine[:2]), views.stacked(mine[2:])], 2)
        found: views.Found = {}
        views.inverted(views.Transposed(made), Array(yours, ""), found)
        parts = [views.gathered(found[id(source)]) for source in mine]
        wanted = [other[0, :, :4], other[1, :, :4], other[0, :, 4:], other[1, :, 4:]]
        for part, array in zip(parts, wanted, strict=True):
            np.testing.assert_array_equal(read_whole(part), array)

    def test_parts_of_two_dtypes_are_merged_in_float32(self):
        a = Array(np.ones((2, 3), checkpoints.BFLOAT16), "")
        b = Array(np.full((2, 3), 0.1, np.float32), "")
        whole = views.concatenated([a, b], 0)
        assert whole.dtype == of_numpy(np.float32)
        wanted = np.concatenate([np.ones((2, 3)), np.full((2, 3), 0.1)])
        np.testing.assert_array_equal(read_whole(whole), wanted.astype(np.float32))

    def test_a_fused_tensor_is_checked_by_its_shape(self):
        parts = {f"a.{p}_proj.weight": np.ones((2, 3), np.float32) for p in "qkv"}
        table = sources_of(parts)
        right = sources_of({"a.qkv_proj.weight": np.ones((6, 3), np.float32)})
        wrong = sources_of({"a.qkv_proj.weight": np.ones((5, 3), np.float32)})
        assert set(layouts.fuse(table, [right])[0]) == set(right)
        assert layouts.fuse(table, [wrong]) == (table, [])


BUFFERS = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32),
    "model.layers.0.attn.bias": np.ones((1, 1, 4, 4), np.float32),
    "model.layers.0.attn.masked_bias": np.array(-1e4, np.float32),
    "model.embeddings.position_ids": np.arange(4)[None],
    "model.bn.num_batches_tracked": np.array(7, np.int64),
}


class TestBuffers:
    def test_the_bases_are_copied(self, merge):
        a, b = model(1), model(2)
        made = merge({**a, **BUFFERS}, a, b)
        assert_same(made.tensors, {**mean(a, b), **BUFFERS})
        assert "no weights" in made.notes

    def test_those_of_models_alone_go(self, merge):
        a, b = model(1), model(2)
        other = {n: np.zeros((1, 1, 2, 2), np.uint8) for n in BUFFERS}
        other = {"model.layers.0.attn.bias": other["model.layers.0.attn.bias"]}
        made = merge(a, a | BUFFERS, b | other)
        assert_same(made.tensors, mean(a, b))

    def test_others_of_the_same_name_and_another_dtype(self, merge):
        a, b = model(1), model(2)
        name = "model.layers.0.attn.bias"
        mask = np.tril(np.ones((1, 1, 4, 4)))
        made = merge(
            {**a, name: mask.astype(np.float32)}, a, {**b, name: mask.astype(np.uint8)}
        )
        assert made.tensors[name].dtype == np.float32

    def test_a_bias_is_a_weight(self, merge):
        name = "model.layers.0.attn.bias"
        a, b = ({**model(i), name: np.full(4, i, np.float32)} for i in (1, 2))
        made = merge(a, a, b)
        np.testing.assert_array_equal(made.tensors[name], np.full(4, 1.5))


class TestTies:
    """Heads stored, left out, or stored alone; a table of what comes out."""

    def test_copies_are_left_out(self, merge):
        a, b = model(1), model(2)
        made = merge(a, a, {**b, HEAD: b[EMBEDDING]}, configs=[TIED] * 3)
        assert_same(made.tensors, mean(a, b))
        assert made.config == TIED
        assert "stays tied" in made.notes

    def test_the_bases_copy_too(self, merge):
        a, b = model(1), model(2)
        made = merge({**a, HEAD: a[EMBEDDING]}, a, b, configs=[TIED] * 3)
        assert_same(made.tensors, mean(a, b))

    def test_copies_everywhere(self, merge):
        a, b = ({**own, HEAD: own[EMBEDDING]} for own in (model(1), model(2)))
        made = merge(a, a, b, configs=[TIED] * 3)
        assert HEAD not in made.tensors
        assert made.config == TIED

    def test_heads_of_their_own_under_a_tied_config(self, merge):
        a, b = (model(i, {**SHAPES, HEAD: (11, 6)}) for i in (1, 2))
        made = merge(a, a, b, configs=[TIED] * 3)
        assert_same(made.tensors, mean(a, b))
        assert made.config == UNTIED

    def test_a_head_stored_alone(self, merge):
        a, b = model(1), model(2)
        other = {HEAD if n == EMBEDDING else n: t for n, t in b.items()}
        made = merge(a, a, other, configs=[TIED] * 3)
        assert_same(made.tensors, mean(a, b))
        assert "stored as" in made.notes

    @pytest.mark.parametrize("kind", ["gemma", "gpt2"])
    def test_the_default_of_the_architecture_is_tied(self, kind, merge):
        a, b = model(1), model(2)
        configs = [{"model_type": kind}] * 3
        made = merge(a, a, {**b, HEAD: b[EMBEDDING]}, configs=configs)
        assert_same(made.tensors, mean(a, b))

    def test_the_default_of_the_architecture_is_untied(self, merge):
        a, b = model(1), model(2)
        configs = [{"model_type": "llama"}] * 3
        with pytest.raises(CheckpointError, match="is missing in"):
            merge(a, a, {**b, HEAD: b[EMBEDDING]}, configs=configs)

    def test_nested_in_a_text_config(self, merge):
        a, b = model(1), model(2, {**SHAPES, HEAD: (11, 6)})
        configs = [{"text_config": TIED, "model_type": "x"}] * 3
        made = merge(a, a, b, configs=configs)
        assert made.config["text_config"] == UNTIED
        assert made.config["tie_word_embeddings"] is False
        np.testing.assert_array_equal(made.tensors[HEAD], (a[EMBEDDING] + b[HEAD]) / 2)

    def test_t5s_shared_embedding(self, merge):
        shapes = {"shared.weight": (11, 6), "encoder.block.0.w.weight": (3, 3)}
        a, b = model(1, shapes), model(2, shapes)
        copies = {
            f"{part}.embed_tokens.weight": b["shared.weight"]
            for part in ("encoder", "decoder")
        }
        made = merge(a, a, {**b, **copies})
        assert_same(made.tensors, mean(a, b))

    def test_berts_biases(self, merge):
        shapes = {"cls.predictions.bias": (11,), "bert.x.weight": (3, 3)}
        a, b = model(1, shapes), model(2, shapes)
        copy = {"cls.predictions.decoder.bias": b["cls.predictions.bias"]}
        made = merge({**a}, a, {**b, **copy})
        assert_same(made.tensors, mean(a, b))

    @pytest.mark.parametrize("alone", [False, True])
    def test_what_else_transformers_ties(self, alone, merge):
        """XLNet calls its head lm_loss; it stands in one tune, beside its embedding or
        alone."""
        pytest.importorskip("torch")
        config = {
            "model_type": "xlnet",
            "architectures": ["XLNetLMHeadModel"],
            "vocab_size": 11,
            "d_model": 6,
            "n_layer": 1,
            "n_head": 2,
            "d_inner": 4,
        }
        words, head = "transformer.word_embedding.weight", "lm_loss.weight"
        shapes = {words: (11, 6), "transformer.mask_emb": (1, 1, 6)}
        a, b = model(1, shapes), model(2, shapes)
        other = {n: own for n, own in a.items() if not (alone and n == words)}
        made = merge(a, {**other, head: a[words]}, b, configs=[config] * 3)
        assert_same(made.tensors, mean(a, b))


class TestRename:
    def test_a_rule(self, merge):
        a, b = model(1), model(2)
        other = named(b, lambda name: name.replace("layers", "blocks"))
        rule = r"(model)\.blocks\.=\1.layers."
        made = merge(a, a, other, recipe=Recipe(mixup=Mixup(alpha=None), rename=rule))
        assert_same(made.tensors, mean(a, b))
        assert made.record["recipe"]["rename"] == [rule]

    def test_names_that_the_base_has_stay(self, merge):
        a, b = model(1), model(2)
        recipe = Recipe(mixup=Mixup(alpha=None), rename=("model=x",))
        made = merge(a, a, b, recipe=recipe)
        assert_same(made.tensors, mean(a, b))
        assert "rename: 'model=x' matches no tensor" in made.notes

    def test_two_tensors_of_one_name(self, merge):
        a = model(1)
        other = named(model(2), lambda name: f"x.{name}")
        recipe = Recipe(mixup=Mixup(alpha=None), rename=(r".*=y",))
        with pytest.raises(CheckpointError, match="which is there already"):
            merge(a, a, other, recipe=recipe)

    def test_a_mapping_and_a_text_are_rules(self):
        assert Recipe(rename={"a": "b"}).rename == ("a=b",)
        assert Recipe(rename="(?<=x)a=b").rename == ("(?<=x)a=b",)

    @pytest.mark.parametrize("rule", ["a", "=b", "(=b", r"a=\1", 3])
    def test_refused(self, rule):
        with pytest.raises(RecipeError, match=r"rename\[0\]=.*REGEX=REPLACEMENT"):
            Recipe(rename=(rule,))

    def test_the_flag_adds_to_the_recipe(self, tmp_path: Path, run):
        other = named(model(1), lambda n: n.replace("layers", "x").replace("mlp", "y"))
        for name, tensors in ("base", model(0)), ("a", other):
            checkpoints.write(tmp_path / name, tensors)
        ran = run(
            "merge",
            f"--base={tmp_path / 'base'}",
            f"--models={tmp_path / 'a'}",
            f"--output={tmp_path / 'out'}",
            "--config.mixup.alpha=None",
            r"--config.rename=(r'\.x\.=.layers.',)",
            r"--rename=\.y\.=.mlp.",
        )
        assert ran.code == 0
        made = Merged(tmp_path / "out")
        assert_same(made.tensors, model(1))
        assert made.record["recipe"]["rename"] == [r"\.x\.=.layers.", r"\.y\.=.mlp."]


MTP = {"mtp.fc.weight": np.ones((3, 3), np.float32)}
SCORE = {"score.weight": np.ones((1, 6), np.float32)}


class TestUnmatched:
    def run(self, merge, policy: str, *models: Tensors) -> Merged:
        recipe = Recipe(mixup=Mixup(alpha=None), unmatched=policy)
        return merge(*models, recipe=recipe)

    def test_an_error_names_the_ways_out(self, merge):
        a, b = model(1), model(2)
        with pytest.raises(CheckpointError) as error:
            merge({**a, **MTP}, a, b)
        for word in ("mtp.fc.weight", "--config.unmatched=base", "skip", "--rename"):
            assert word in str(error.value)

    def test_base(self, merge):
        a, b = model(1), model(2)
        made = self.run(merge, "base", {**a, **MTP}, a, {**b, **SCORE})
        assert_same(made.tensors, {**mean(a, b), **MTP})
        assert "no model has 1 tensor ('mtp.fc.weight')" in made.notes
        assert "not in the output: 1 tensor ('score.weight')" in made.notes

    def test_a_model_that_lacks_one_counts_as_the_base(self, merge):
        base, a, b = model(0), model(1), model(2)
        gone = b.pop("model.norm.weight")
        made = self.run(merge, "base", base, a, b)
        b["model.norm.weight"] = base["model.norm.weight"]
        assert_same(made.tensors, mean(a, b))
        assert gone.shape == (6,)

    def test_skip(self, merge):
        a, b = model(1), model(2)
        made = self.run(merge, "skip", {**a, **MTP}, a, {**b, **SCORE})
        assert_same(made.tensors, mean(a, b))

    def test_a_text_model_into_one_of_text_and_images(self, merge):
        a, b = model(1), model(2)
        vision = {"vision_tower.blocks.0.weight": np.ones((4, 4), np.float32)}
        whole = named(a, lambda n: n.replace("model.", "language_model.model.", 1))
        made = self.run(merge, "base", {**whole, **vision}, whole, b)
        wanted = named(
            mean(a, b), lambda n: n.replace("model.", "language_model.model.")
        )
        assert_same(made.tensors, {**wanted, **vision})

    def test_base_needs_one(self, tmp_path: Path):
        with pytest.raises(RecipeError, match="unmatched='base' needs a base"):
            Recipe(unmatched="base").check(num_models=2, has_base=False)


def wrap(tensors: Tensors) -> Tensors:
    return {f"module._orig_mod.{name}": tensor for name, tensor in tensors.items()}


def change_prefix(tensors: Tensors) -> Tensors:
    return named(tensors, lambda n: n.replace("model.", "model.language_model.", 1))


def add_buffers(tensors: Tensors) -> Tensors:
    return {**tensors, **BUFFERS}


def copy_head(tensors: Tensors) -> Tensors:
    return {**tensors, HEAD: tensors[EMBEDDING]}


@given(
    kinds=st.tuples(
        *[
            st.sets(
                st.sampled_from(
                    [copy_head, TestLayouts.fused, add_buffers, change_prefix, wrap]
                )
            )
        ]
        * 3
    )
)
def test_any_mixture(kinds):
    """Whatever was done to names of base and models, the same tensors meet."""
    order = [copy_head, TestLayouts.fused, add_buffers, change_prefix, wrap]
    opened = []
    for i, own in enumerate(kinds):
        tensors = model(i)
        for step in order:
            tensors = step(tensors) if step in own else tensors
        table = {name: Array(tensor, "") for name, tensor in tensors.items()}
        opened.append(SimpleNamespace(name=str(i), tensors=table, config=TIED))
    found = common(opened)
    names = set(found.tables[0]) - found.copied
    first = model(0)
    first = TestLayouts.fused(first) if TestLayouts.fused in kinds[0] else first
    first = change_prefix(first) if change_prefix in kinds[0] else first
    assert names == set(first)
    assert found.config == {}
    for i, table in enumerate(found.tables):
        wanted = model(i)
        wanted = TestLayouts.fused(wanted) if TestLayouts.fused in kinds[0] else wanted
        wanted = change_prefix(wanted) if change_prefix in kinds[0] else wanted
        assert set(table) - found.copied == set(wanted)
        for name, tensor in wanted.items():
            np.testing.assert_array_equal(read_whole(table[name]), tensor)


class TestFiles:
    """A library finds the weights again under the file's name that it gave them."""

    @pytest.mark.parametrize("size", ["5GB", "200B"])
    def test_of_a_diffusion_transformer(self, size, tmp_path: Path):
        a, b = model(1), model(2)
        for name, tensors in ("base", a), ("a", a), ("b", b):
            folder = checkpoints.write(tmp_path / name, tensors)
            whole = folder / "model.safetensors"
            whole.rename(folder / "diffusion_pytorch_model.safetensors")
        recipe = Recipe(mixup=Mixup(alpha=None), max_shard_size=size)
        output = tmp_path / "out"
        for overwrite in (False, True):
            m3jax.merge(
                tmp_path / "base",
                [tmp_path / "a", tmp_path / "b"],
                output,
                recipe,
                execution=Execution(overwrite=overwrite),
            )
        assert_same(checkpoints.read(output), mean(a, b))
        assert m3jax.verify(output) == []
        stem = "diffusion_pytorch_model"
        weights = [p.name for p in output.glob("*.safetensors*")]
        assert all(name.startswith(stem) for name in weights)
        assert (len(weights) > 1) == (f"{stem}.safetensors.index.json" in weights)
        again = tmp_path / "again"
        m3jax.merge(output, [output], again, PLAIN)
        assert_same(checkpoints.read(again), mean(a, b))


class TestExclude:
    def test_of_what_models_alone_have_is_no_mistake(self, merge):
        a, b = model(1), model(2)
        recipe = Recipe(mixup=Mixup(alpha=None), exclude=("score.*", "nothing.*"))
        made = merge(a, a, {**b, **SCORE}, recipe=recipe)
        assert_same(made.tensors, mean(a, b))
        assert made.notes == "exclude: 'nothing.*' matches no tensor"
