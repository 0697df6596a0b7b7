"""What goes into a merge: dtypes, vocabularies, tied heads, copies and mismatches."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import ml_dtypes
import numpy as np
import pytest
import reference
from grids import slow, thin

import m3jax
from m3jax import CheckpointError, Mixup, Recipe
from m3jax.methods import METHODS as ALL

SHAPES = {"model.norm.weight": (5,), "model.layers.0.up_proj.weight": (9, 7)}
METHODS = ("average", "task_arithmetic", "ties")  # those that the oracle knows
FLOATS = ("float16", "bfloat16", "float32", "float64")
PLAIN = Mixup(alpha=None)
HIDDEN = 6

Tensors = checkpoints.Tensors
Merge = Callable[..., Tensors]


@pytest.fixture
def merge(tmp_path: Path) -> Merge:
    """Writes checkpoints, merges them into `tmp_path/merged`, reads that.

    With `again` what was there is removed.
    """

    def run(
        base: Tensors | None,
        *models: Tensors,
        configs: list[dict[str, Any] | None] | None = None,
        recipe: Recipe | None = None,
        again: bool = False,
        **execution: Any,
    ) -> Tensors:
        given = {"base": base, **dict(zip("abcdef", models, strict=False))}
        written = {name: model for name, model in given.items() if model is not None}
        if again:
            shutil.rmtree(tmp_path)
        for place, (name, tensors) in enumerate(written.items()):
            config = configs and configs[place]
            checkpoints.write(tmp_path / name, tensors, config or None)
        output = tmp_path / "merged"
        m3jax.merge(
            None if base is None else tmp_path / "base",
            [tmp_path / name for name in written if name != "base"],
            output,
            recipe or Recipe(mixup=PLAIN),
            execution=m3jax.engine.execution.Execution(**execution),
        )
        return checkpoints.read(output)

    return run


@pytest.fixture
def fails(merge: Merge, tmp_path: Path) -> Callable[..., str]:
    """The message of a merge that fails, and leaves nothing behind."""

    def run(*arguments: Any, **settings: Any) -> str:
        with pytest.raises(CheckpointError) as error:
            merge(*arguments, **settings)
        assert not [path for path in tmp_path.iterdir() if "merged" in path.name]
        assert "\n" not in str(error.value)
        return str(error.value).replace(f"{tmp_path}/", "")

    return run


class TestDtypes:
    @pytest.mark.parametrize(("method", "base_dtype"), thin(METHODS, FLOATS))
    def test_mixed(self, method: str, base_dtype: str, merge: Merge):
        """Every dtype at once: each is read as float64, the base's is written."""
        base = checkpoints.random_model(0, SHAPES, np.dtype(base_dtype))
        models = [
            checkpoints.random_model(i, SHAPES, np.dtype(dtype), base)
            for i, dtype in enumerate(FLOATS, start=1)
        ]
        merged = merge(base, *models, recipe=Recipe(method=method, mixup=PLAIN))
        expected = reference.merge(base, models, method=method)
        for name, tensor in expected.items():
            assert merged[name].dtype == base_dtype
            assert tensor.dtype == np.float64
            assert_rounded(merged[name], tensor)

    @pytest.mark.parametrize(("method", "base_dtype"), thin(METHODS, FLOATS[:3]))
    def test_mixed_without_float64(self, method: str, base_dtype: str, merge: Merge):
        """Each is read as float32."""
        base = checkpoints.random_model(0, SHAPES, np.dtype(base_dtype))
        models = [
            checkpoints.random_model(i, SHAPES, np.dtype(dtype), base)
            for i, dtype in enumerate(FLOATS[:3], start=1)
        ]
        merged = merge(base, *models, recipe=Recipe(method=method, mixup=PLAIN))
        expected = reference.merge(base, models, method=method)
        for name, tensor in expected.items():
            assert merged[name].dtype == base_dtype
            assert tensor.dtype == np.float32
            assert_rounded(merged[name], tensor)

    @pytest.mark.parametrize(("method", "dtype"), thin(METHODS, FLOATS))
    def test_one_of_float64(self, method: str, dtype: str, merge: Merge):
        """Whichever it is, and whatever is written; a base that nothing reads too."""
        for wide in range(3):
            dtypes = [np.float64 if i == wide else np.float32 for i in range(3)]
            models = [
                checkpoints.random_model(i, SHAPES, own) for i, own in enumerate(dtypes)
            ]
            recipe = Recipe(method=method, mixup=PLAIN, dtype=dtype)
            merged = merge(*models, recipe=recipe, again=wide > 0)
            expected = reference.merge(models[0], models[1:], method=method)
            for name, tensor in expected.items():
                assert merged[name].dtype == dtype
                assert_rounded(merged[name], tensor)

    def test_mixed_within_a_checkpoint(self, merge: Merge):
        shapes = {f"model.{dtype}.weight": (3, 5) for dtype in FLOATS}
        base, model = ({}, {})
        for dtype, name in zip(FLOATS, shapes, strict=True):
            own = {name: (3, 5)}
            base |= checkpoints.random_model(0, own, np.dtype(dtype))
            model |= checkpoints.random_model(1, own, np.dtype(dtype))
        merged = merge(base, model, model)
        assert {name: tensor.dtype for name, tensor in merged.items()} == {
            name: np.dtype(dtype) for dtype, name in zip(FLOATS, shapes, strict=True)
        }
        for name, tensor in merged.items():
            assert_rounded(tensor, model[name])

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_of_the_output(self, dtype: str, merge: Merge, tmp_path: Path):
        base = checkpoints.random_model(0, SHAPES, checkpoints.BFLOAT16)
        model = checkpoints.random_model(1, SHAPES, checkpoints.BFLOAT16)
        base["ids"] = model["ids"] = np.arange(3)
        configs = [{"torch_dtype": "bfloat16", "dtype": "bfloat16"}, None, None]
        merged = merge(
            base, model, base, configs=configs, recipe=Recipe(mixup=PLAIN, dtype=dtype)
        )
        for name in SHAPES:
            assert merged[name].dtype == dtype
            expected = (model[name].astype(np.float32) + base[name]) / 2
            assert_rounded(merged[name], expected)
        assert merged["ids"].dtype == np.int64
        config = json.loads((tmp_path / "merged" / "config.json").read_text())
        assert config == {"torch_dtype": dtype, "dtype": dtype}

    def test_rounding_is_to_nearest_even(self, merge: Merge):
        """Halfway between two bfloat16: 1 + 2⁻⁸ goes down, 1 + 3 · 2⁻⁸ up."""
        one = {"a": np.array([1, 1 + 2**-7, 1]).astype(ml_dtypes.bfloat16)}
        two = {"a": np.array([1 + 2**-7, 1 + 2**-6, 1]).astype(ml_dtypes.bfloat16)}
        merged = merge(None, one, two)["a"]
        assert merged.astype(np.float64).tolist() == [1, 1 + 2**-6, 1]

    def test_beyond_float16(self, fails):
        """The sum of two task vectors, 65000 + 65000."""
        base = {"a": np.zeros((2, 2), np.float16)}
        model = {"a": np.array([[0, 1], [65000, 2]], np.float16)}
        recipe = Recipe(method="task_arithmetic", mixup=PLAIN)
        assert fails(base, model, model, recipe=recipe) == (
            "tensor 'a': the merged value at [1, 0] overflows float16; choose a wider "
            "dtype, or pass --allow_nonfinite"
        )

    def test_float64_beyond_float32(self, merge: Merge, fails):
        large, small = {"a": np.array([0.0, 1e300])}, {"a": np.array([3.0, 1.0])}
        assert merge(None, large, small)["a"].tolist() == [1.5, 5e299]
        assert fails(
            None, large, small, recipe=Recipe(mixup=PLAIN, dtype="float32"), again=True
        ) == (
            "tensor 'a': the merged value at [1] overflows float32; choose a wider "
            "dtype, or pass --allow_nonfinite"
        )

    def test_float64_differences_beyond_float32(self, merge: Merge):
        """Task vectors of 1e-9 beside weights of 1, which float32 does not hold."""
        base = {"a": np.linspace(1, 2, 1500)}
        model = {"a": base["a"] + 1e-9 * np.arange(1500)}
        recipe = Recipe(method="task_arithmetic", mixup=PLAIN, scaling=2.0)
        merged = merge(base, model, recipe=recipe)["a"]
        expected = base["a"] + 2.0 * (model["a"] - base["a"])
        np.testing.assert_array_equal(merged, expected)


class TestCopies:
    """Tensors that are not floating point, and excluded ones."""

    COPIED = {  # noqa: RUF012
        "ids": np.arange(-3, 4000).reshape(-1, 1),
        "flags": np.array([[True, False, True]]),
        "bytes": np.arange(256, dtype=np.uint8),
        "counter": np.array(7, np.int32),
    }

    @pytest.mark.parametrize("with_base", [True, False])
    def test_integers_and_bools(self, with_base: bool, merge: Merge):
        base = checkpoints.random_model(0, SHAPES) | self.COPIED
        model = checkpoints.random_model(1, SHAPES) | self.COPIED
        merged = merge(base if with_base else None, model, model)
        for name, tensor in self.COPIED.items():
            assert merged[name].dtype == tensor.dtype
            np.testing.assert_array_equal(merged[name], tensor)

    @pytest.mark.parametrize("with_base", [True, False])
    def test_they_must_be_equal(self, with_base: bool, merge: Merge, tmp_path: Path):
        other = self.COPIED["ids"].copy()
        other[3210] = 99
        base = self.COPIED | {"w": np.ones(1)}
        changed = base | {"ids": other}
        with pytest.raises(CheckpointError) as error:
            merge(base if with_base else None, base, changed)
        first = "base" if with_base else "a"
        assert str(error.value).startswith(
            f"tensor 'ids' (I64) is 3207 in {tmp_path}/{first} and 99 in {tmp_path}/b "
            "at [3210, 0]; tensors that are not floating point cannot be merged"
        )

    def test_unless_excluded(self, merge: Merge):
        base = {"ids": np.arange(4), "model.w": np.ones(3)}
        other = {"ids": np.arange(4) + 1, "model.w": np.zeros(3)}
        recipe = Recipe(mixup=PLAIN, exclude=("ids",))
        merged = merge(base, other, other, recipe=recipe)
        np.testing.assert_array_equal(merged["ids"], base["ids"])
        np.testing.assert_array_equal(merged["model.w"], other["model.w"])

    def test_excluded_tensors_are_the_bases(self, merge: Merge):
        """Bit by bit, NaN included, whatever the models have under that name."""
        shapes = {"a.norm": (1500,), "b.norm": (3,), "c": (4,)}
        base = checkpoints.random_model(0, shapes, checkpoints.BFLOAT16)
        base["a.norm"][7] = np.nan
        model = checkpoints.random_model(1, shapes, checkpoints.BFLOAT16)
        model["a.norm"] = np.zeros((2, 2))
        del model["b.norm"]
        extra = model | {"extra.norm": np.zeros(2)}
        recipe = Recipe(method="ties", mixup=PLAIN, exclude=(r"(a|b|extra)\.norm",))
        merged = merge(base, model, extra, recipe=recipe)
        assert set(merged) == set(base)
        for name in ("a.norm", "b.norm"):
            assert merged[name].tobytes() == base[name].tobytes()

    def test_an_excluded_tensor_takes_part_in_no_threshold(self, merge: Merge):
        zeros = {"a": np.zeros(4), "b": np.zeros(4)}
        model = {"a": np.arange(1.0, 5), "b": np.full(4, 9.0)}
        recipe = Recipe(method="ties", mixup=PLAIN, exclude=("b",))
        merged = merge(zeros, model, recipe=recipe)
        assert merged["a"].tolist() == [0, 2, 3, 4]
        assert merged["b"].tolist() == [0, 0, 0, 0]

    def test_excluded_tensors_have_the_dtype_of_the_output(self, merge: Merge):
        recipe = Recipe(mixup=PLAIN, exclude=("a",), dtype="float16")
        model = {"a": np.ones(3), "b": np.ones(3)}
        merged = merge(model, model, model, recipe=recipe)
        assert {tensor.dtype for tensor in merged.values()} == {np.dtype(np.float16)}


class TestVocabulary:
    """The paper's trio: 32000 rows in one model, 32001 in another."""

    @pytest.fixture
    def trio(self) -> tuple[list[Tensors], list[dict[str, Any]]]:
        rows = (32, 33, 32)
        shapes = [
            {
                "model.embed_tokens.weight": (count, HIDDEN),
                "model.norm.weight": (HIDDEN,),
                "lm_head.weight": (count, HIDDEN),
            }
            for count in rows
        ]
        models = [checkpoints.random_model(i, shape) for i, shape in enumerate(shapes)]
        return models, [{"vocab_size": count, "other": 1} for count in rows]

    def test_error(self, trio, fails):
        models, configs = trio
        message = fails(*models, configs=configs)
        assert (
            "tensor 'lm_head.weight' has shape [32, 6] in base, [33, 6] in a, [32, 6] "
            "in b (vocabulary sizes differ: set vocabulary to union or base, in "
            "mergekit's YAML tokenizer: {source: base}, to merge by token, to mean or "
            "truncate to merge by row)"
        ) in message
        assert "tensor 'model.embed_tokens.weight' has shape [32, 6] in base" in message

    @pytest.mark.parametrize("method", METHODS)
    def test_mean(self, method: str, trio, merge: Merge, tmp_path: Path):
        (base, a, b), configs = trio
        recipe = Recipe(method=method, mixup=PLAIN, vocabulary="mean", scaling=0.5)
        merged = merge(base, a, b, configs=configs, recipe=recipe)
        for model in (base, b):
            for name in ("model.embed_tokens.weight", "lm_head.weight"):
                mean = model[name].mean(axis=0, dtype=np.float64, keepdims=True)
                model[name] = np.concatenate([model[name], mean.astype(np.float32)])
        expected = reference.merge(base, [a, b], method=method, scaling=0.5)
        for name, tensor in expected.items():
            np.testing.assert_allclose(merged[name], tensor, rtol=0, atol=3e-8)
        config = json.loads((tmp_path / "merged" / "config.json").read_text())
        assert config == {"vocab_size": 33, "other": 1}

    def test_truncate(self, trio, merge: Merge, tmp_path: Path):
        (base, a, b), configs = trio
        recipe = Recipe(mixup=PLAIN, vocabulary="truncate")
        merged = merge(a, base, b, configs=configs, recipe=recipe)
        for name, tensor in merged.items():
            np.testing.assert_allclose(tensor, (base[name] + b[name]) / 2, 0, 3e-8)
            assert tensor.shape == base[name].shape
        config = json.loads((tmp_path / "merged" / "config.json").read_text())
        assert config["vocab_size"] == 32

    def test_the_bases_size_stays(self, trio, merge: Merge, tmp_path: Path):
        (base, a, b), configs = trio
        recipe = Recipe(mixup=PLAIN, vocabulary="mean")
        merge(a, base, b, configs=[configs[1], configs[0], configs[2]], recipe=recipe)
        written = (tmp_path / "merged" / "config.json").read_text()
        assert json.loads(written) == configs[1]

    def test_several_rows_of_bfloat16(self, merge: Merge):
        """The mean is of all rows, in float64, rounded once to the model's dtype."""
        name = "model.embed_tokens.weight"
        small = checkpoints.random_model(0, {name: (700, 500)}, checkpoints.BFLOAT16)
        large = checkpoints.random_model(1, {name: (705, 500)}, checkpoints.BFLOAT16)
        recipe = Recipe(mixup=Mixup(ratios=(1.0, 0.0)), vocabulary="mean")
        merged = merge(None, small, large, recipe=recipe, chunk_size=1024)[name]
        np.testing.assert_array_equal(merged[:700], small[name])
        mean = small[name].mean(axis=0, dtype=np.float64).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(merged[700:], np.tile(mean, (5, 1)))

    @pytest.mark.parametrize("vocabulary", ["mean", "truncate"])
    def test_other_shapes_stay_an_error(self, vocabulary: str, trio, fails):
        (base, a, b), configs = trio
        b["model.norm.weight"] = np.ones(HIDDEN + 1, np.float32)
        recipe = Recipe(mixup=PLAIN, vocabulary=vocabulary)
        assert fails(base, a, b, configs=configs, recipe=recipe) == (
            "tensor 'model.norm.weight' has shape [6] in base, [6] in a, [7] in b"
        )


class TestTiedHeads:
    EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"

    @pytest.fixture
    def tied(self) -> Tensors:
        return checkpoints.random_model(0, {self.EMBEDDINGS: (7, HIDDEN)})

    @pytest.fixture
    def untied(self) -> Tensors:
        shapes = {self.EMBEDDINGS: (7, HIDDEN), self.HEAD: (7, HIDDEN)}
        return checkpoints.random_model(1, shapes)

    def test_all_tied(self, tied: Tensors, merge: Merge, tmp_path: Path):
        config = {"tie_word_embeddings": True}
        merged = merge(tied, tied, tied, configs=[config] * 3)
        assert set(merged) == {self.EMBEDDINGS}
        assert json.loads((tmp_path / "merged" / "config.json").read_text()) == config

    @pytest.mark.parametrize("base_is_tied", [True, False])
    def test_some_tied(
        self, base_is_tied: bool, tied, untied, merge: Merge, tmp_path: Path
    ):
        """A tied model's head is its embedding; the output has a head of its own."""
        base, model = (tied, untied) if base_is_tied else (untied, tied)
        configs = [{"tie_word_embeddings": base_is_tied == i} for i in (1, 0)]
        recipe = Recipe(method="task_arithmetic", mixup=PLAIN)
        merged = merge(base, model, configs=configs, recipe=recipe)
        wanted = model.get(self.HEAD, model[self.EMBEDDINGS])
        np.testing.assert_allclose(merged[self.HEAD], wanted, rtol=0, atol=3e-8)
        np.testing.assert_allclose(
            merged[self.EMBEDDINGS], model[self.EMBEDDINGS], rtol=0, atol=3e-8
        )
        config = json.loads((tmp_path / "merged" / "config.json").read_text())
        assert config == {"tie_word_embeddings": False}

    @pytest.mark.parametrize("config", [None, {"tie_word_embeddings": False}])
    def test_a_missing_head_that_is_not_tied(self, config, tied, untied, fails):
        message = fails(untied, untied, tied, configs=[config] * 3)
        assert message.startswith("tensor 'lm_head.weight' is missing in b")


class TestMismatches:
    BASE = checkpoints.random_model(0, SHAPES)

    def test_missing_and_extra(self, fails):
        missing = {"model.norm.weight": self.BASE["model.norm.weight"]}
        extra = self.BASE | {"score.weight": np.ones(2)}
        assert fails(self.BASE, missing, extra) == (
            "tensor 'model.layers.0.up_proj.weight' is missing in a; tensor "
            "'score.weight' is missing in base, a; --config.unmatched=base keeps the "
            "base's and passes over what it lacks, skip leaves them out; "
            "--rename=REGEX=REPLACEMENT brings other names to the base's"
        )

    def test_shapes(self, fails):
        other = self.BASE | {"model.norm.weight": np.ones((5, 1), np.float32)}
        assert fails(self.BASE, self.BASE, other) == (
            "tensor 'model.norm.weight' has shape [5] in base, [5] in a, [5, 1] in b"
        )

    def test_kinds(self, fails):
        other = self.BASE | {"model.norm.weight": np.ones(5, np.int64)}
        assert fails(self.BASE, other) == (
            "tensor 'model.norm.weight' has dtype F32 in base, I64 in a"
        )

    def test_integers_of_other_sizes(self, fails):
        small, large = {"ids": np.ones(5, np.int32)}, {"ids": np.ones(5, np.int64)}
        assert fails(small, large) == "tensor 'ids' has dtype I32 in base, I64 in a"

    def test_many(self, fails):
        others = {f"extra.{i}": np.ones(1) for i in range(5)}
        message = fails(self.BASE, self.BASE | others)
        assert message.count("is missing in base") == 3
        assert "; and 2 more (--dry_run lists them); --config.unmatched" in message

    def test_no_tensors(self, fails):
        assert fails({}, {}) == "base: holds no tensors"


class TestFewModels:
    @pytest.mark.parametrize("method", METHODS)
    def test_one_model(self, method: str, merge: Merge):
        base = checkpoints.random_model(0, SHAPES)
        model = checkpoints.random_model(1, SHAPES, base=base)
        merged = merge(base, model, recipe=Recipe(method=method, trim_rate=0.6))
        expected = reference.merge(base, [model], method=method, trim_rate=0.6)
        for name, tensor in expected.items():
            np.testing.assert_allclose(merged[name], tensor, rtol=0, atol=3e-8)

    @pytest.mark.parametrize("method", METHODS)
    def test_the_same_model_several_times(self, method: str, merge: Merge):
        base = checkpoints.random_model(0, SHAPES)
        model = checkpoints.random_model(1, SHAPES, base=base)
        recipe = Recipe(method=method, trim_rate=0.0)
        merged = merge(base, model, model, model, recipe=recipe)
        for name, tensor in model.items():
            np.testing.assert_allclose(merged[name], tensor, rtol=0, atol=3e-8)

    def test_no_base(self, merge: Merge):
        models = [checkpoints.random_model(i, SHAPES) for i in range(3)]
        merged = merge(None, *models)
        for name, tensor in merged.items():
            expected = sum(model[name] for model in models) / 3
            np.testing.assert_allclose(tensor, expected, rtol=0, atol=3e-8)

    def test_a_base_that_average_does_not_read(self, merge: Merge):
        """Its names, shapes and dtypes count, its values do not."""
        base = {name: np.full(shape, np.nan) for name, shape in SHAPES.items()}
        model = checkpoints.random_model(1, SHAPES)
        merged = merge(base, model, model)
        for name, tensor in merged.items():
            assert tensor.dtype == np.float64
            np.testing.assert_array_equal(tensor, model[name])


class TestNothingToMerge:
    """No element that is merged, in any executor."""

    CASES = tuple(
        pytest.param(tensors, method, strategy)
        if (i % 3, i // 3 % 3) == (j, k)
        else slow(pytest.param(tensors, method, strategy))
        for i, method in enumerate(ALL)
        for j, tensors in enumerate(("empty", "copied", "excluded"))
        for k, strategy in enumerate((None, "random", "magnitude"))
    )

    @pytest.mark.parametrize(("tensors", "method", "strategy"), CASES)
    def test_it(self, tensors: str, method: str, strategy: str | None, merge: Merge):
        model = {
            "empty": {"a": np.zeros((0, 3), np.float32), "b.1": np.zeros(0)},
            "copied": {"ids": np.arange(3)},
            "excluded": {"a": np.ones((2, 2), np.float32)},
        }[tensors]
        if ALL[method].beside:
            pytest.skip("needs statistics, of which there are none without a tensor")
        count = ALL[method].num_models or 2
        dare = m3jax.Dare(drop_rate=strategy and 0.5, strategy=strategy or "random")
        recipe = Recipe(method=method, mixup=PLAIN, exclude=("a",), dare=dare)
        if tensors != "excluded":
            recipe = dataclasses.replace(recipe, exclude=())
        for executor in ("streamed", "sharded"):
            merged = merge(
                *[model] * (1 + count), recipe=recipe, executor=executor, again=True
            )
            for name, tensor in model.items():
                np.testing.assert_array_equal(merged[name], tensor)
        in_memory = m3jax.merge_params(model, [model] * count, recipe)
        in_memory = in_memory.get("", in_memory)
        for name, tensor in model.items():
            np.testing.assert_array_equal(in_memory[name], tensor)


class TestNonfinite:
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("who", ["base", "a", "b"])
    def test_refused(self, dtype: str, value: float, who: str, fails):
        models = {
            name: checkpoints.random_model(i, SHAPES, np.dtype(dtype))
            for i, name in enumerate(("base", "a", "b"))
        }
        models[who]["model.layers.0.up_proj.weight"][8, 3] = value
        recipe = Recipe(method="task_arithmetic")
        assert fails(*models.values(), recipe=recipe) == (
            f"{who}: tensor 'model.layers.0.up_proj.weight' holds {value} at [8, 3]; "
            "mend the checkpoint, or pass --allow_nonfinite to merge it anyway"
        )

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_refused_where_the_method_would_hide_it(
        self, value: float, method: str, merge: Merge
    ):
        """TIES trims a NaN, which is not larger than anything."""
        base, model = {"a": np.ones(3)}, {"a": np.array([1, value, 1])}
        recipe = Recipe(method=method)
        with pytest.raises(CheckpointError, match=f"holds {value} at"):
            merge(base, base, model, recipe=recipe)

    @pytest.mark.parametrize("method", METHODS)
    def test_refused_where_dare_would_drop_it(self, method: str, merge: Merge):
        base, model = {"a": np.ones(3)}, {"a": np.array([1, np.inf, 1])}
        dare = m3jax.Dare(drop_rate=1.0)
        with pytest.raises(CheckpointError, match="holds inf at"):
            merge(base, model, model, recipe=Recipe(method=method, dare=dare))

    @pytest.mark.parametrize("method", METHODS)
    def test_allowed(self, method: str, merge: Merge):
        base = {"a": np.zeros(6)}
        model = {"a": np.array([1, np.nan, np.inf, -np.inf, 2, 3])}
        other = {"a": np.array([1, 1, 1, 1, 2, 3.0])}
        recipe = Recipe(method=method, mixup=PLAIN, trim_rate=0.3, scaling=0.5)
        merged = merge(base, model, other, recipe=recipe, allow_nonfinite=True)["a"]
        assert np.isfinite(merged[[0, 4, 5]]).all()
        assert not np.isfinite(merged[2:4]).any()


def assert_rounded(merged: np.ndarray, expected: np.ndarray) -> None:
    """`merged` is `expected`, which may be off by a bit, rounded once."""
    low, high = (
        np.nextafter(expected, expected.dtype.type(side)).astype(merged.dtype)
        for side in (-np.inf, np.inf)
    )
    assert np.all((low <= merged) & (merged <= high))
