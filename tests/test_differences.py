"""What differs beside tensors gets one line, which says whose the output has."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest

import m3jax
from m3jax import CheckpointError, Mixup, Recipe
from m3jax.engine.differences import effective
from m3jax.engine.execution import Execution

SHAPES = {f"model.layers.{i}.up_proj.weight": (32, 32) for i in range(4)}
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "num_attention_heads": 4,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "sliding_window": None,
    "eos_token_id": 2,
}
PLAIN = Recipe(mixup=Mixup(alpha=None))
Notes = Callable[..., list[str]]


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    """Merges base and two models, the second with other side files; the notes."""

    def run(
        config: dict[str, Any] | None = None,
        files: dict[str, Any] | None = None,
        base: dict[str, Any] | None = None,
        tensors: checkpoints.Tensors | None = None,
        **execution: Any,
    ) -> list[str]:
        start = checkpoints.random_model(0, SHAPES)
        for i, name in enumerate(("base", "a", "b")):
            own = checkpoints.random_model(i, SHAPES, base=start) if i else start
            own = tensors if tensors and name == "b" else own
            fields = CONFIG if base is None else base
            if name == "b":
                fields = {**fields, **(config or {})}
                fields = {n: v for n, v in fields.items() if v is not ...}
            folder = checkpoints.write(tmp_path / name, own, fields)
            for file, content in (files or {}).items() if name == "b" else ():
                text = content if isinstance(content, str) else json.dumps(content)
                (folder / file).write_text(text)
        output = tmp_path / "out"
        models = [tmp_path / "a", tmp_path / "b"]
        if "tokenizer_from" in execution:
            execution["tokenizer_from"] = str(tmp_path / execution["tokenizer_from"])
        m3jax.merge(
            tmp_path / "base", models, output, PLAIN, execution=Execution(**execution)
        )
        lines = json.loads((output / "m3jax.json").read_text())["notes"]
        return [line.replace(f"{tmp_path}/", "") for line in lines]

    return run


def test_nothing_where_nothing_differs(notes):
    assert notes() == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_attention_heads", 2),
        ("hidden_act", "gelu"),
        ("rope_theta", 1e6),
        ("sliding_window", 4096),
        ("model_type", "mistral"),
    ],
)
def test_a_field_of_the_config(field, value, notes):
    (line,) = notes({field: value})
    before = CONFIG[field]
    assert line == (
        f"config.json: {field} is {before!r} in base, a; {value!r} in b; the output "
        "has that of base"
    )


@pytest.mark.parametrize(
    "config",
    [
        {"torch_dtype": "bfloat16", "transformers_version": "5.0"},
        {"attention_dropout": 0.1, "_name_or_path": "x", "use_cache": False},
        # The forms of transformers 5.
        {
            "rope_theta": ...,
            "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
        },
        {"rope_scaling": None, "rope_theta": 10000},
    ],
)
def test_what_changes_nothing_is_not_said(config, notes):
    assert notes(config) == []


def test_a_scaled_rope(notes):
    scaling = {"type": "linear", "factor": 4.0}
    (line,) = notes({"rope_scaling": scaling})
    assert line.startswith("config.json: rope_scaling is None in base, a; {'rope_type'")


def test_a_nested_text_config_is_compared_as_the_models_own():
    nested = {"model_type": "x", "text_config": CONFIG, "vision_config": {"depth": 2}}
    flat = effective(nested)
    assert flat["num_attention_heads"] == 4
    assert flat["vision_config.depth"] == 2
    assert flat["rope_theta"] == 10000.0


def refused(notes: Notes, *arguments: Any, **settings: Any) -> str:
    """The one line for which --strict refuses; a merge has notes of its own of it."""
    with pytest.raises(CheckpointError) as error:
        notes(*arguments, strict=True, **settings)
    (line,) = error.value.mismatches
    return re.sub(r"/\S*/", "", line)


class TestEnds:
    def test_of_config_and_generation_config(self, notes):
        generation = {"eos_token_id": [60, 2], "temperature": 0.6}
        line = refused(notes, files={"generation_config.json": generation})
        assert line.startswith("the end token is [2] in base, a; [2, 60] in b; the ")

    def test_whose_is_written_follows_the_tokenizer(self, notes):
        line = refused(notes, {"eos_token_id": 60}, tokenizer_from="b")
        assert line.endswith("the output has that of b")

    def test_of_a_text_config(self, notes):
        base = {"text_config": {"eos_token_id": 5}}
        line = refused(notes, {"text_config": {"eos_token_id": 6}}, base=base)
        assert line.startswith("the end token is [5] in base, a; [6] in b")


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template.jinja": "{{ x }}"},
        {"tokenizer_config.json": {"chat_template": "{{ x }}"}},
        {"chat_template.json": {"chat_template": "{{ x }}"}},
    ],
)
def test_the_chat_template(files, notes):
    line = refused(notes, files=files)
    assert line == (
        "the chat template is none in base, a; one of 7 characters in b; the output "
        "has that of base; --tokenizer_from takes another model's"
    )


def test_a_file_that_is_no_json_is_for_others_to_refuse(notes):
    assert notes(files={"generation_config.json": "{"}) == []


class TestDistance:
    def test_a_model_that_was_never_tuned_from_this_base(self, notes):
        other = checkpoints.random_model(9, SHAPES)
        (line,) = notes(tensors=other)
        assert line.startswith("b: its weights have a cosine of ")
        assert "is it a fine-tune" in line

    def test_nan_is_for_others_to_refuse(self, notes):
        other = checkpoints.random_model(9, SHAPES)
        other = {n: np.full_like(t, np.nan) for n, t in other.items()}
        assert notes(tensors=other, allow_nonfinite=True) == []


class TestStrict:
    def test_refuses(self, notes, tmp_path):
        with pytest.raises(CheckpointError) as error:
            notes({"hidden_act": "gelu"}, strict=True)
        assert "hidden_act" in str(error.value) and "--strict" in str(error.value)
        assert not (tmp_path / "out").exists()

    def test_lets_equal_ones_pass(self, notes):
        assert notes(strict=True) == []

    def test_dry_run_lists_all(self, notes, tmp_path, run):
        notes({"hidden_act": "gelu", "rope_theta": 5.0})
        paths = [f"--base={tmp_path}/base", f"--models={tmp_path}/a,{tmp_path}/b"]
        ran = run("merge", *paths, "--dry_run")
        assert ran.code == 0 and ran.out.count("note ") == 2
        ran = run("merge", *paths, "--dry_run", "--strict")
        assert ran.code == 3 and ran.out.count("config.json: ") == 2


class TestWithoutEffect:
    @pytest.mark.parametrize(
        ("fields", "line"),
        [
            ({"scaling": 3}, "scaling has no effect: method average has none"),
            (
                {"method": "task_arithmetic", "trim_rate": 0.9},
                "trim_rate has no effect: method task_arithmetic has none",
            ),
            (
                {"dare": {"strategy": "magnitude"}},
                "dare.strategy has no effect: dare is off",
            ),
            (
                {"mixup": {"alpha": None, "granularity": "layer"}},
                "mixup.granularity has no effect: no ratio is drawn",
            ),
            (
                {"mixup": {"ratios": (0.5, 0.5), "granularity": "layer"}},
                "mixup.granularity has no effect: no ratio is drawn",
            ),
        ],
    )
    def test_a_line(self, fields, line):
        idle = Recipe.from_dict(fields).idle_fields()
        assert [f"{n} has no effect: {why}" for n, why in idle.items()] == [line]

    @pytest.mark.parametrize("more", [(), ("--nocopy_tokenizer",)])
    def test_the_command_says_so(self, more, tmp_path, run):
        for name in ("base", "a"):
            checkpoints.write(tmp_path / name, {"x": np.ones(2, np.float32)})
        flags = ("--config.scaling=3", "--config.dare.strategy=magnitude", "--dry_run")
        paths = (f"--base={tmp_path / 'base'}", f"--models={tmp_path / 'a'}")
        ran = run("merge", *paths, f"--output={tmp_path / 'out'}", *flags, *more)
        assert ran.code == 0, ran.err
        said = ran.out + ran.err
        assert "scaling has no effect: method average has none" in said
        assert "dare.strategy has no effect: dare is off" in said

    def test_none_where_there_is_one(self):
        assert Recipe.from_dict({"mixup": {"granularity": "layer"}}).idle_fields() == {}
        dare = {"drop_rate": 0.1, "strategy": "magnitude"}
        assert Recipe.from_dict({"dare": dare}).idle_fields() == {}
