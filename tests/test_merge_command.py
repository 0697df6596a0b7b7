"""`m3jax merge` from end to end: recipes, records, plans; one line for every error."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from command_line import Ran, Run

from m3jax import Recipe
from m3jax.commands import config

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = sorted(path.stem for path in CONFIGS.glob("[!_]*.py"))
SHAPES = {
    "model.embed_tokens.weight": (11, 5),
    "model.layers.0.up_proj.weight": (9, 5),
    "model.norm.weight": (5,),
    "lm_head.weight": (11, 5),
}
PATHS = ("--base=base", "--models=a,b", "--output=merged")
FIELDS = {  # flags of a recipe, and what they mean
    "mixup.alpha=None": ("mixup", "alpha", None),
    "mixup.ratios=(0.8,0.2)": ("mixup", "ratios", [0.8, 0.2]),
    "dare.drop_rate=0.2": ("dare", "drop_rate", 0.2),
    "dare.drop_rate=(0.2,0.3)": ("dare", "drop_rate", [0.2, 0.3]),
}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """The folder that holds base, a and b, and where outputs go."""
    base = checkpoints.random_model(0, SHAPES, checkpoints.BFLOAT16)
    checkpoints.write(tmp_path / "base", base, {"vocab_size": 11})
    for i, name in enumerate("ab", start=1):
        model = checkpoints.random_model(i, SHAPES, checkpoints.BFLOAT16, base)
        checkpoints.write(tmp_path / name, model, {"vocab_size": 11})
    return tmp_path


@pytest.fixture
def merge(models: Path, run: Run, monkeypatch) -> Callable[..., Ran]:
    """`m3jax merge` of base, a and b into `merged`; arguments may say otherwise."""
    monkeypatch.chdir(models)

    def merge(*arguments: str) -> Ran:
        given = {argument.partition("=")[0] for argument in arguments}
        usual = {"--base": "base", "--models": "a,b", "--output": "merged"}
        rest = [f"{k}={v}" for k, v in usual.items() if k not in given]
        wanted = [argument for argument in arguments if not argument.endswith("=-")]
        return run("merge", *rest, *wanted)

    return merge


class TestRecipes:
    @pytest.mark.parametrize("field", FIELDS)
    @pytest.mark.parametrize("name", [None, *RECIPES])
    def test_one_field_changed(self, name: str | None, field: str, merge, models: Path):
        file = [] if name is None else [f"--config={CONFIGS / name}.py"]
        ran = merge(*file, f"--config.{field}")
        assert ran.code == 0, ran.err
        recipe = record(models / "merged")["recipe"]
        group, key, value = FIELDS[field]
        assert recipe[group][key] == value
        fields = config_of(name)
        fields.setdefault(group, {})[key] = value
        expected = Recipe.from_dict(fields).to_dict()
        assert recipe == json.loads(json.dumps(expected))

    @pytest.mark.parametrize("name", RECIPES)
    def test_by_name(self, name: str, merge, models: Path):
        """Without folder and suffix, as it works outside a checkout."""
        assert merge(f"--config={name}").code == 0
        recipe = record(models / "merged")["recipe"]
        assert recipe == json.loads(json.dumps(config_of(name)))

    @pytest.mark.parametrize("name", RECIPES)
    def test_the_docstring_is_a_command(self, name: str, merge):
        text = (CONFIGS / f"{name}.py").read_text()
        assert f"--config=configs/{name}.py" in text
        assert "m3jax merge" in text

    def test_there_is_one_for_every_setting_of_the_paper(self):
        methods = ("average", "task_arithmetic", "ties")
        wanted = {m + s for m in methods for s in ("", "_m3", "_dare", "_m3_dare")}
        assert wanted <= set(RECIPES)

    def test_every_field(self, merge, models: Path):
        ran = merge(
            "--config.method=ties",
            "--config.mixup.alpha=2",
            "--config.mixup.granularity=layer",
            "--config.scaling=0.5",
            "--config.trim_rate=0.25",
            "--config.dare.drop_rate=0.1",
            "--config.dare.rescale=False",
            "--config.dare.strategy=magnitude",
            "--config.dare.target=weights",
            "--config.exclude=('model.norm','lm_head')",
            "--config.vocabulary=truncate",
            "--config.tokenizer.chat_template=chatml",
            "--config.dtype=float32",
            "--config.max_shard_size=500B",
            "--seed=4294967295",
        )
        assert ran.code == 0, ran.err
        written = record(models / "merged")
        assert written["seed"] == 2**32 - 1
        assert written["recipe"] == {
            "method": "ties",
            "transforms": ["dare"],
            "mixup": {"alpha": 2, "ratios": None, "granularity": "layer"},
            "ties": {"weights": None, "scaling": 0.5, "trim_rate": 0.25},
            "dare": {
                "drop_rate": 0.1,
                "rescale": False,
                "strategy": "magnitude",
                "target": "weights",
            },
            "exclude": ["model.norm", "lm_head"],
            "vocabulary": "truncate",
            "tokenizer": {
                "tokens": [],
                "missing": "base",
                "pad_to_multiple_of": None,
                "chat_template": "chatml",
                "config": None,
                "copy": True,
            },
            "rename": [],
            "unmatched": "error",
            "rules": [],
            "compute": "float32",
            "slices": [],
            "dtype": "float32",
            "max_shard_size": "500B",
        }

    def test_the_flag_is_stronger_than_the_file(self, merge, models: Path):
        assert merge("--config=ties_m3", "--config.method=average").code == 0
        assert record(models / "merged")["recipe"]["method"] == "average"

    def test_other_ways_to_write_flags(self, merge, models: Path):
        assert (
            merge("--config", "ties", "-seed", "3", "-config.trim_rate=0.1").code == 0
        )
        written = record(models / "merged")
        assert (written["seed"], written["recipe"]["ties"]["trim_rate"]) == (
            3,
            0.1,
        )

    def test_ratios_are_printed(self, merge):
        assert "0.800000, 0.200000" in merge("--config.mixup.ratios=(0.8,0.2)").out


class TestAgain:
    """The record makes the same bytes again."""

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--seed=5"],
            ["--config=ties_m3_dare", "--config.mixup.granularity=tensor", "--seed=1"],
            ["--config.dare.drop_rate=(0.2,0.3)", "--config.exclude=('lm_head',)"],
            ["--base=-", "--models=b,a,b", "--config.max_shard_size=200B"],
            ["--tokenizer_from=b", "--config.mixup.ratios=(0.3,0.7)"],
        ],
    )
    def test_same_bytes(self, arguments: list[str], merge, run: Run, models: Path):
        for name in "ab":
            (models / name / "tokenizer.json").write_text(f'"{name}"')
        assert merge(*arguments).code == 0
        ran = run("merge", "--config=merged/m3jax.json", "--output=again")
        assert ran.code == 0, ran.err
        again = checkpoints.digest(models / "again")
        assert again == checkpoints.digest(models / "merged")

    def test_with_another_seed(self, merge, run: Run, models: Path):
        merge("--config.dare.drop_rate=0.2")
        run("merge", "--config=merged/m3jax.json", "--output=again", "--seed=6")
        assert record(models / "again")["seed"] == 6
        again = checkpoints.digest(models / "again")
        other = checkpoints.digest(models / "merged")
        assert again["model.safetensors"] != other["model.safetensors"]


class TestDryRun:
    def test_plan(self, merge, models: Path):
        before = sorted(models.rglob("*"))
        ran = merge("--dry_run", "--config=ties_m3_dare", "--output=-")
        assert (ran.code, ran.err) == (0, "")
        facts = {line[:11].strip(): line[11:] for line in ran.out.splitlines()}
        elements = sum(int(np.prod(shape)) for shape in SHAPES.values())
        assert f"4 merged, 0 copied), {elements} elements" in facts["tensors"]
        assert facts["method"] == "ties after dare"
        assert facts["passes"] == "at least 2: what ties measures, whole model; merge"
        assert f"{3 * 2 * elements} B in the last pass" in facts["read"]
        assert "in 1 file" in facts["written"]
        assert sorted(models.rglob("*")) == before

    def test_plan_says_dtype_and_place(self, merge, models: Path):
        def said(*arguments: str) -> dict[str, str]:
            ran = merge("--dry_run", *arguments)
            assert (ran.code, ran.err) == (0, "")
            return {line[:11].strip(): line[11:] for line in ran.out.splitlines()}

        assert said("--output=-")["output"] == "not given"
        facts = said()
        assert (facts["dtype"], facts["output"]) == ("bfloat16", "merged, free")
        assert said("--output=a/x")["output"].startswith("taken: a/x: lies in (or hol")
        assert merge().code == 0
        assert said()["output"] == (
            "taken: merged: exists already; pass --overwrite to replace it"
        )
        assert said("--overwrite")["output"] == "merged, which will be replaced"

    def test_plan_says_when_the_base_widens_the_output(self, merge, models: Path):
        base = checkpoints.read(models / "base")
        wide = {name: values.astype(np.float32) for name, values in base.items()}
        checkpoints.write(models / "wide", wide)
        said = (
            "note: the output is float32, the models are bfloat16: it takes 2.0 times "
            "their size; --config.dtype=bfloat16 would not\n"
        )
        ran = merge("--dry_run", "--base=wide")
        assert "dtype      float32\n" in ran.out
        assert said.replace(": ", "       ", 1) in ran.out
        ran = merge("--dry_run", "--base=wide", "--config.dtype=bfloat16")
        assert "dtype      bfloat16\n" in ran.out
        assert "times" not in ran.out
        assert said in merge("--base=wide").err

    def test_plan_says_how_much_is_written(self, merge, models: Path):
        planned = merge("--dry_run", "--config.max_shard_size=100B").out
        merge("--config.max_shard_size=100B")
        files = list((models / "merged").glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        line = next(line for line in planned.splitlines() if line.startswith("written"))
        assert line.endswith(f"in {len(files)} files")
        assert f" {size} B " in line

    def test_every_mismatch(self, merge, models: Path):
        extra = {f"extra.{i}": np.ones(1, np.float32) for i in range(9)}
        checkpoints.write(models / "c", checkpoints.read(models / "a") | extra)
        ran = merge("--dry_run", "--models=a,c")
        assert ran.code == 3
        for name in extra:
            assert f"tensor '{name}' is missing in base, a" in ran.out
        assert len(ran.out.splitlines()) == 9
        assert ran.error.startswith(
            "m3jax merge: the checkpoints do not fit: 9 mismatches; --config.unmatched"
        )


class TestMisuse:
    """Exit code 2: the command line or the recipe is wrong."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--models=-"], "--models is missing; usage: m3jax merge --base="),
            (["--output=-"], "--output is missing; usage: m3jax merge --base="),
            (["c"], "unexpected argument 'c'; usage: m3jax merge --base="),
            (["--overwrit"], "Unknown command line flag 'overwrit'. Did you mean: ov"),
            (
                ["--config.bogus=1"],
                "unknown recipe field 'bogus'; known: ",
            ),
            (
                ["--method=ties"],
                "unknown flag --method; did you mean --config.method?",
            ),
            (["--scaling=1"], "unknown flag --scaling; did you mean --config.scaling?"),
            (
                ["--trim_rate", "1"],
                "unknown flag --trim_rate; did you mean --config.tri",
            ),
            (
                ["--drop_rate=1"],
                "unknown flag --drop_rate; did you mean --config.dare.",
            ),
            (["--mixup.alpha=1"], "unknown flag --mixup.alpha; did you mean --config."),
            (["--alpha=1"], "unknown flag --alpha; did you mean --config.mixup.alpha?"),
            (["--config.dare.p=1"], "unknown recipe field 'dare.p'; known: "),
            (["--config.method=wobble"], "method='wobble' needs one of "),
            (["--config.scaling=abc"], "scaling='abc' needs a finite number"),
            (["--config.trim_rate=2"], "trim_rate=2 needs a number from 0 to 1"),
            (["--config=nowhere.py"], "--config=nowhere.py: no such file"),
            (["--config=nowhere"], "--config=nowhere: no such file; there are average"),
            (["--config"], "--config is empty; give a value"),
            (["--seed=-1"], "seed=-1 needs 0 <= seed < 2**32"),
            (["--seed=4294967296"], "seed=4294967296 needs 0 <= seed < 2**32"),
            (
                ["--seed=x"],
                "flag --seed=x: invalid literal for int() with base 10: 'x'",
            ),
            (
                ["--config.mixup.ratios=(0.5,0.3,0.2)"],
                "mixup.ratios=(0.5, 0.3, 0.2) needs one number per model, 2 here",
            ),
            (
                ["--config.mixup.ratios=(0.5,0.6)"],
                "mixup.ratios=(0.5, 0.6) needs a sum of 1 for method average",
            ),
            (
                ["--config.dare.drop_rate=(0.1,)"],
                "dare.drop_rate=(0.1,) needs one number per model, 2 here",
            ),
            (
                ["--base=-", "--config.method=ties"],
                "method='ties' needs a base (--base)",
            ),
            (
                ["--base=-", "--config.dare.drop_rate=0.1"],
                "transforms='dare' needs a base (--base)",
            ),
            (["--threads=0"], "threads=0 needs 1 to 256"),
            (["--chunk_size=1"], "chunk_size=1 needs 1024 to 67108864 elements"),
        ],
    )
    def test_message(self, arguments, message, merge, models: Path):
        before = sorted(models.rglob("*"))
        ran = merge(*arguments)
        assert (ran.code, ran.out) == (2, "")
        assert ran.err.startswith(f"m3jax merge: {message}")
        assert ran.err.count("\n") == 1
        assert sorted(models.rglob("*")) == before

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("bad.py", "import nothing_of_this_name", "ModuleNotFoundError: No module"),
            ("bad.py", "config = 1", "KeyError: 'get_config'; a config is a Python fi"),
            ("bad.json", "{", "not valid JSON"),
            ("bad.json", "[1]", "needs an object"),
        ],
    )
    def test_config_files(self, name, text, message, merge, models: Path):
        (models / name).write_text(text)
        ran = merge(f"--config={name}")
        assert ran.code == 2
        assert ran.error.startswith(f"m3jax merge: --config={name}: {message}")

    @pytest.mark.parametrize("name", ["bad.py", "bad.json"])
    def test_unknown_field_in_a_file(self, name: str, merge, models: Path):
        text = '{"mixup": {"beta": 1}}'
        if name.endswith("py"):
            text = (
                "from ml_collections import ConfigDict\n"
                f"def get_config(): return ConfigDict({text})\n"
            )
        (models / name).write_text(text)
        ran = merge(f"--config={name}")
        assert ran.code == 2
        assert ran.error.startswith("m3jax merge: unknown recipe field 'mixup.beta'; ")


class TestBadInput:
    """Exit code 3: a checkpoint cannot be used, or the output's place is taken."""

    @pytest.fixture
    def fails(self, merge, models: Path) -> Callable[..., str]:
        def fails(*arguments: str) -> str:
            before = sorted(path.relative_to(models) for path in models.rglob("*"))
            ran = merge(*arguments)
            assert (ran.code, ran.out) == (3, "")
            after = sorted(path.relative_to(models) for path in models.rglob("*"))
            assert after == before, "nothing is left behind"
            return ran.error.removeprefix("m3jax merge: ")

        return fails

    def test_missing_and_extra_tensors(self, fails, models: Path):
        tensors = checkpoints.read(models / "a")
        tensors["score.weight"] = tensors.pop("model.norm.weight")
        checkpoints.write(models / "c", tensors)
        message = fails("--models=a,c")
        assert "tensor 'model.norm.weight' is missing in c" in message
        assert "tensor 'score.weight' is missing in base, a" in message

    def test_shapes(self, fails, models: Path):
        tensors = checkpoints.read(models / "a")
        checkpoints.write(models / "c", tensors | {"model.norm.weight": np.ones(7)})
        assert fails("--models=a,c") == (
            "tensor 'model.norm.weight' has shape [5] in base, [5] in a, [7] in c"
        )

    def test_vocabularies(self, fails, models: Path):
        shapes = SHAPES | {"model.embed_tokens.weight": (12, 5)}
        checkpoints.write(models / "c", checkpoints.random_model(4, shapes))
        assert fails("--models=a,c") == (
            "tensor 'model.embed_tokens.weight' has shape [11, 5] in base, [11, 5] in "
            "a, [12, 5] in c (vocabulary sizes differ: set vocabulary to union or "
            "base, in mergekit's YAML tokenizer: {source: base}, to merge by token, "
            "to mean or truncate to merge by row)"
        )

    def test_no_such_model(self, fails):
        message = fails("--models=a,./nowhere")
        assert message.startswith("./nowhere: no such file or folder; give a folder,")

    def test_no_such_model_on_the_hub(self, fails):
        assert fails("--models=a,nobody/nothing").startswith("nobody/nothing: no such")

    def test_an_index_that_names_a_missing_file(self, fails, models: Path):
        write_in_shards(models / "c")
        (models / "c" / "model-00002-of-00002.safetensors").unlink()
        message = fails("--models=a,c")
        assert "'model-00002-of-00002.safetensors'" in message
        assert "missing" in message

    def test_an_index_that_leads_out_of_the_folder(self, fails, models: Path):
        write_in_shards(models / "c")
        index = models / "c" / "model.safetensors.index.json"
        text = index.read_text()
        inner = "model-00002-of-00002.safetensors"
        index.write_text(text.replace(inner, "../a/model.safetensors"))
        message = fails("--models=a,c")
        assert "../a/model.safetensors" in message
        assert message.startswith("c/model.safetensors.index.json: tensor ")

    @pytest.mark.parametrize("kept", [0, 4, 8, 60, -1])
    def test_a_file_that_was_cut_off(self, kept: int, fails, models: Path):
        file = models / "a" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:kept])
        assert fails().startswith("a/model.safetensors: ")

    @pytest.mark.parametrize(
        "header",
        [
            b"",
            b"[]",
            b"{",
            b'{"a": 1}',
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,8]}}',
            b'{"a":{"dtype":"F33","shape":[2],"data_offsets":[0,8]}}',
            b'{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}',
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}',
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{}}',
        ],
    )
    def test_a_malformed_header(self, header: bytes, fails, models: Path):
        content = len(header).to_bytes(8, "little") + header + bytes(8)
        (models / "a" / "model.safetensors").write_bytes(content)
        assert fails().startswith("a/model.safetensors: ")

    def test_pickled_weights_that_are_none(self, fails, models: Path):
        (models / "a" / "model.safetensors").rename(models / "a" / "model.bin")
        message = fails()
        assert message.startswith("a/model.bin: starts with ")
        assert "so it is no file of torch.save" in message

    def test_nan(self, fails, merge, models: Path):
        tensors = {k: v.copy() for k, v in checkpoints.read(models / "a").items()}
        tensors["model.norm.weight"][3] = np.nan
        checkpoints.write(models / "c", tensors)
        assert fails("--models=a,c") == (
            "c: tensor 'model.norm.weight' holds nan at [3]; mend the checkpoint, or "
            "pass --allow_nonfinite to merge it anyway"
        )
        ran = merge("--models=a,c", "--allow_nonfinite")
        assert ran.code == 0
        merged = checkpoints.read(models / "merged")["model.norm.weight"]
        assert np.isnan(merged.astype(np.float32)).tolist() == [0, 0, 0, 1, 0]

    def test_the_output_exists(self, fails, merge, models: Path):
        assert merge().code == 0
        assert fails() == "merged: exists already; pass --overwrite to replace it"
        assert merge("--overwrite", "--seed=7").code == 0
        assert record(models / "merged")["seed"] == 7

    def test_the_output_is_foreign(self, fails, models: Path):
        (models / "merged").mkdir()
        (models / "merged" / "precious.txt").write_text("")
        assert fails() == "merged: exists already; choose another --output"
        assert fails("--overwrite").startswith("merged: holds no m3jax.json, so it is ")

    @pytest.mark.parametrize("output", ["a/merged", "a", "base/x/y"])
    def test_the_output_lies_in_an_input(self, output: str, fails):
        fails(f"--output={output}", "--overwrite")
        if output != "a":
            assert "lies in" in fails(f"--output={output}")


class TestProcess:
    """The real thing: a process of its own."""

    def test_merge_and_error(self, models: Path):
        arguments = ["merge", *PATHS]
        first = process(models, *arguments)
        assert first.returncode == 0, first.stderr
        assert first.stdout.splitlines()[-1] == "output     merged"
        assert first.stderr.startswith("m3jax: merging: ")
        second = process(models, *arguments)
        assert (second.returncode, second.stdout) == (3, "")
        assert second.stderr == (
            "m3jax merge: merged: exists already; pass --overwrite to replace it\n"
        )
        third = process(models, *arguments, "--config.trim=1")
        assert (third.returncode, third.stdout) == (2, "")
        assert third.stderr.startswith("m3jax merge: unknown recipe field 'trim'; ")
        assert third.stderr.count("\n") == 1

    def test_same_bytes_with_one_device(self, merge, models: Path):
        """In a process without virtual devices and with other settings of JAX."""
        arguments = ["--config=ties_m3_dare", "--config.dtype=float32", "--seed=9"]
        assert merge(*arguments).code == 0  # on eight
        settings = {
            "XLA_FLAGS": "",
            "JAX_NUMPY_DTYPE_PROMOTION": "standard",
            "JAX_ENABLE_X64": "1",
            "JAX_DEFAULT_PRNG_IMPL": "rbg",
        }
        other = [*PATHS[:2], "--output=other", *arguments]
        done = process(models, "merge", *other, **settings)
        assert done.returncode == 0, done.stderr
        digest = checkpoints.digest(models / "other")
        assert digest == checkpoints.digest(models / "merged")

    def test_progress_on_a_terminal(self, models: Path):
        """A bar with bytes, rate and remaining time."""
        ours, theirs = pty.openpty()
        with subprocess.Popen(
            [sys.executable, "-m", "m3jax", "merge", "--config=ties", *PATHS],
            cwd=models,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "120"},
            stderr=theirs,
            stdout=subprocess.DEVNULL,
        ) as running:
            os.close(theirs)
            shown = b""
            while True:
                try:
                    part = os.read(ours, 4096)
                except OSError:  # the other end is closed
                    break
                shown += part
                if not part:
                    break
        os.close(ours)
        assert running.returncode == 0, shown.decode()
        for word in ("measuring, pass 1", "merging", "kB", "0:00:00"):
            assert word in shown.decode()

    @pytest.mark.parametrize(
        ("arguments", "code"),
        [
            (["--help"], 0),
            (["--version"], 0),
            (["merge", "--help"], 0),
            (["merge", "--mistyped"], 2),
            (["merg"], 2),
            (["merge", "--config.mistyped=1"], 2),
            (["merge", "--base=base", "--models=a,b", "--config.scaling=x"], 2),
            (["inspect", "--help"], 0),
            (["verify", "--help"], 0),
        ],
    )
    def test_answers_without_jax(self, arguments: list[str], code: int, models: Path):
        program = (
            "import sys; from m3jax.__main__ import main\n"
            "code = main(sys.argv[1:])\n"
            "print(sorted({'jax', 'flax', 'torch'} & set(sys.modules)))\n"
            "sys.exit(code)"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            cwd=models,
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stderr
        assert done.stdout.splitlines()[-1] == "[]"
        assert done.stderr.count("\n") == (1 if code else 0)

    def test_help_names_every_flag_and_field(self, run: Run):
        text = run("merge", "--help").out
        for name in config.field_names():
            assert name in text
        for flag in ("base", "models", "output", "seed", "overwrite", "dry_run"):
            assert f"--{flag}=" in text or f"--[no]{flag}" in text


def config_of(name: str | None) -> dict[str, Any]:
    """All fields of a recipe in configs/, as JSON would hold them."""
    if name is None:
        return Recipe().to_dict()
    source: dict[str, Any] = {}
    exec((CONFIGS / f"{name}.py").read_text(), source)
    return Recipe.from_dict(source["get_config"]().to_dict()).to_dict()


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "m3jax.json").read_text())


def write_in_shards(folder: Path) -> None:
    names = list(SHAPES)
    model = checkpoints.random_model(5, SHAPES)
    checkpoints.write(folder, model, shards=[names[:2], names[2:]])


def process(
    folder: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "m3jax", *arguments],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
