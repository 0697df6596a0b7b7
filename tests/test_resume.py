"""An interrupted merge, resumed, gives the bytes of one that was not interrupted."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import checkpoints
import jax
import numpy as np
import pytest
from grids import thin
from interruptions import (
    FLOATS,
    RECIPES,
    Merge,
    Observer,
    journal_of,
    partial_of,
    write_models,
)

import m3jax
from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.places import durable
from m3jax.recipe import Recipe

TIES = RECIPES["ties"]


@pytest.fixture(scope="module")
def merge(tmp_path_factory) -> Merge:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def references(merge, tmp_path_factory) -> dict[str, tuple[dict[str, str], Observer]]:
    """Of each recipe the output's checksums, and what was said meanwhile."""
    made = {}
    for name, recipe in RECIPES.items():
        output = tmp_path_factory.mktemp("reference") / "merged"
        observer = Observer()
        merge(output, recipe, observer)
        made[name] = checkpoints.digest(output), observer
    return made


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "merged"


def interrupt(merge: Merge, output: Path, recipe: Recipe, *at: int, **execution) -> str:
    """Runs a merge into Ctrl-C; returns the note that it leaves with."""
    with pytest.raises(KeyboardInterrupt) as caught:
        merge(output, recipe, Observer(*at), **execution)
    return "; ".join(getattr(caught.value, "__notes__", []))


def almost_all(references, name: str) -> int:
    """A moment when some tensors are written and some are not."""
    return references[name][1].calls - 8


@pytest.mark.parametrize(
    ("name", "share"), thin(RECIPES, [0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0])
)
def test_the_same_bytes(name, share, merge, references, output):
    expected, observed = references[name]
    note = interrupt(merge, output, RECIPES[name], int(share * (observed.calls - 1)))
    assert not output.exists()
    assert ("--resume" in note) == partial_of(output).exists()
    assert partial_of(output).exists() == journal_of(output).exists()
    if share >= 0.9:
        assert str(partial_of(output)) in note
    merge(output, RECIPES[name], resume=True)
    assert checkpoints.digest(output) == expected
    assert not partial_of(output).exists()


@pytest.mark.parametrize("name", RECIPES)
def test_interrupted_again_and_again(name, merge, references, output):
    expected, observed = references[name]
    interruptions, at = 0, observed.calls * 2 // 3
    while not output.exists():
        assert interruptions < 20, "it does not get on"
        try:
            merge(output, RECIPES[name], Observer(at), resume=True)
        except KeyboardInterrupt:
            interruptions += 1
            lines = len(durable.read_lines(journal_of(output)))
            # A call for each line that is checked, and ever more time behind that.
            at = lines + 4 + interruptions if lines > 2 else at + 4
    assert interruptions
    assert checkpoints.digest(output) == expected


def test_what_was_done_is_not_done_again(merge, references, output):
    interrupt(merge, output, TIES, almost_all(references, "ties"))
    observer = Observer()
    result = merge(output, TIES, observer, resume=True)
    assert 0 < result.resumed <= FLOATS  # what is copied may be all that is left
    assert observer.stages == ["checking what was written", "merging"]
    assert references["ties"][1].stages[0] == "measuring, pass 1"
    assert observer.notes == []


@pytest.mark.parametrize("executor", ["streamed", "sharded"])
@pytest.mark.parametrize("output_format", ["safetensors", "orbax"])
def test_formats_and_executors(executor, output_format, merge, tmp_path):
    how = {"executor": executor, "output_format": output_format}
    if executor == "sharded":
        how["chunk_size"] = None
    whole, observer = tmp_path / "whole", Observer()
    merge(whole, TIES, observer, **how)
    resumed = 0
    for share in (0.3, 0.6, 0.8, 0.9):
        output = tmp_path / f"merged-{share}"
        interrupt(merge, output, TIES, int(share * observer.calls), **how)
        assert not output.exists()
        resumed += merge(output, TIES, resume=True, **how).resumed
        assert contents(output) == contents(whole)
    assert resumed > 0


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files in a folder and the folders in it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_how_it_runs_may_change(merge, references, output):
    interrupt(merge, output, TIES, almost_all(references, "ties"))
    how = {"chunk_size": 3072, "threads": 1, "devices": jax.local_devices()}
    assert merge(output, TIES, resume=True, **how).resumed > 0
    assert checkpoints.digest(output) == references["ties"][0]


def test_a_second_ctrl_c_does_not_disturb_the_orderly_stop(merge, references, output):
    at = almost_all(references, "ties")
    note = interrupt(merge, output, TIES, at, at + 1, at + 2)
    assert "--resume" in note
    assert merge(output, TIES, resume=True).resumed > 0
    assert checkpoints.digest(output) == references["ties"][0]


def test_ctrl_c_before_anything_is_worth_keeping_leaves_nothing(merge, output):
    assert interrupt(merge, output, TIES, 0) == ""
    assert list(output.parent.iterdir()) == []


def test_nothing_to_resume(merge, references, output):
    observer = Observer()
    result = merge(output, TIES, observer, resume=True)
    assert result.resumed == 0
    assert observer.notes == ["nothing to resume; starting from the beginning"]
    assert checkpoints.digest(output) == references["ties"][0]


def test_without_resume_it_starts_anew_and_says_so(merge, references, output):
    interrupt(merge, output, TIES, almost_all(references, "ties"))
    observer = Observer()
    assert merge(output, TIES, observer).resumed == 0
    (note,) = observer.notes
    assert note.startswith(f"{partial_of(output)}: discarding")
    assert "--resume" in note
    assert observer.stages == references["ties"][1].stages


def test_resume_with_overwrite(merge, references, output):
    merge(output, RECIPES["average"])
    before = checkpoints.digest(output)
    at = almost_all(references, "ties")
    note = interrupt(merge, output, TIES, at, overwrite=True)
    assert "--resume" in note
    assert checkpoints.digest(output) == before
    other = "exists already, and is not what this merge would make: its recipe is anot"
    with pytest.raises(CheckpointError, match=other):
        merge(output, TIES, resume=True)
    assert merge(output, TIES, resume=True, overwrite=True).resumed > 0
    assert checkpoints.digest(output) == references["ties"][0]


class TestJournal:
    """Whatever has become of the journal and the files, the bytes come out right."""

    @pytest.fixture
    def output(self, merge, references, output):
        interrupt(merge, output, TIES, almost_all(references, "ties"))
        return output

    @pytest.fixture(autouse=True)
    def resumes(self, merge, references, output):
        yield
        merge(output, TIES, resume=True)
        assert checkpoints.digest(output) == references["ties"][0]

    def test_every_line_speaks_of_what_is_done(self, output):
        start, statistics, *tensors = durable.read_lines(journal_of(output))
        assert list(start) == ["fingerprint"]
        assert statistics["statistics"] == "step 0"
        assert tensors
        for tensor in tensors:
            assert len(tensor["inputs"]) == 3
            assert tensor["checked"] is True

    @pytest.mark.parametrize("share", [0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
    def test_torn(self, share, output, merge):
        journal = journal_of(output)
        whole = durable.read_lines(journal)
        os.truncate(journal, int(share * journal.stat().st_size))
        kept = durable.read_lines(journal)
        assert kept == whole[: len(kept)]
        assert len(kept) < len(whole)

    def test_torn_and_continued(self, output):
        journal = journal_of(output)
        whole = durable.read_lines(journal)
        os.truncate(journal, journal.stat().st_size - 5)
        assert durable.read_lines(journal) == whole[:-1]
        durable.append_lines(journal, [whole[-1]])
        assert durable.read_lines(journal) == whole

    def test_a_flipped_bit(self, output):
        journal = journal_of(output)
        content = bytearray(journal.read_bytes())
        content[len(content) // 2] ^= 1
        journal.write_bytes(content)

    @pytest.mark.parametrize("content", [b"", b"\n\n", bytes(5000), b"x {}\n", b"[]\n"])
    def test_no_journal_of_ours(self, content, output):
        journal_of(output).write_bytes(content)
        assert durable.read_lines(journal_of(output)) == []

    def test_bytes_that_are_not_on_the_disk(self, output, merge):
        for shard in (partial_of(output) / "checkpoint").iterdir():
            size = shard.stat().st_size
            os.truncate(shard, size // 2)
            os.truncate(shard, size)

    def test_files_that_are_gone(self, output):
        shards = sorted((partial_of(output) / "checkpoint").iterdir())
        assert len(shards) > 1
        shards[0].unlink()

    def test_no_files_at_all(self, output):
        shutil.rmtree(partial_of(output) / "checkpoint")

    def test_files_of_the_first_try_that_the_second_does_not_write(self, output):
        (partial_of(output) / "checkpoint" / "vocab.json").write_text("{}")


def version(merge, monkeypatch):
    monkeypatch.setattr(m3jax, "__version__", "0.0.0")


def jax_version(merge, monkeypatch):
    monkeypatch.setattr(jax, "__version__", "0.0.0")


def touched(merge, monkeypatch):
    os.utime(merge.models[1] / "model.safetensors", ns=(1, 1))


def content(merge, monkeypatch):
    path = merge.models[1] / "model.safetensors"
    path.write_bytes(path.read_bytes())


@pytest.mark.parametrize("change", [version, jax_version, touched, content])
def test_another_version_or_input(change, tmp_path, references, output, monkeypatch):
    merge = write_models(tmp_path / "models")
    interrupt(merge, output, TIES, almost_all(references, "ties"))
    change(merge, monkeypatch)
    observer = Observer()
    assert merge(output, TIES, observer, resume=True).resumed == 0
    assert "another" in observer.notes[0]


def test_another_recipe_or_seed(merge, references, output):
    """What may be hours of work goes away only if that is said."""
    interrupt(merge, output, TIES, almost_all(references, "ties"))
    average = RECIPES["average"]
    turned = Merge(merge.base, merge.models[::-1])
    for other, recipe, seed, what in (
        (merge, average, 7, "recipe"),
        (merge, TIES, 8, "seed"),
        (turned, TIES, 7, "set of inputs"),
    ):
        with pytest.raises(CheckpointError, match=f"had another {what}; --o") as e:
            other(output, recipe, seed=seed, resume=True)
        assert "kept in" in e.value.__notes__[0]
        assert partial_of(output).exists()
    assert merge(output, TIES, resume=True).resumed > 0
    interrupt(merge, output, TIES, almost_all(references, "ties"), overwrite=True)
    observer = Observer()
    again = merge(output, TIES, observer, seed=8, resume=True, overwrite=True)
    assert again.resumed == 0
    assert "another seed; starting from the beginning" in observer.notes[0]
    assert merge(output, average, overwrite=True).resumed == 0  # without --resume


def test_a_finished_merge_leaves_nothing_to_do(merge, references, output):
    """The same merge again; whatever it would make otherwise is refused."""
    first = merge(output, TIES)
    assert "checksums" not in repr(first)  # a line of it for each tensor
    before = checkpoints.digest(output), output.stat().st_ino
    observer = Observer()
    again = merge(output, TIES, observer, resume=True)
    assert observer.notes == [f"{output}: is complete already; nothing to do"]
    assert observer.calls == 0
    assert (again.checksums, again.ratios) == (first.checksums, first.ratios)
    turned = Merge(merge.base, merge.models[::-1])
    chosen = {"tokenizer_from": str(merge.base)}
    for other, recipe, how, what in (
        (merge, RECIPES["average"], {}, "its recipe is another one"),
        (merge, TIES, {"seed": 8}, "its seed is 7, not 8"),
        (turned, TIES, {}, "its base or models are others"),
        (merge, TIES, chosen, "it has another model's tokenizer"),
        (merge, TIES, {"output_format": "orbax"}, "its tensors are others"),
    ):
        with pytest.raises(CheckpointError, match=f"would make: {what}; pass --over"):
            other(output, recipe, resume=True, **how)
    assert (checkpoints.digest(output), output.stat().st_ino) == before
    (output / "README.md").write_text("a card of one's own")
    merge(output, TIES, resume=True)
    min(output.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="is missing or has another size"):
        merge(output, TIES, resume=True)
    merge(output, TIES, overwrite=True, resume=True)
    os.utime(merge.models[0] / "model.safetensors")
    with pytest.raises(CheckpointError, match="may have changed since; pass --overwr"):
        merge(output, TIES, resume=True)


def test_inputs_may_move_with_their_link(merge, references, output, tmp_path):
    """A fingerprint names files, not the way to them."""
    link = tmp_path / "link"
    link.symlink_to(merge.base.parent)
    interrupt(merge, output, TIES, almost_all(references, "ties"))
    models = tuple(link / path.name for path in merge.models)
    moved = Merge(link / "base", models)
    assert moved(output, TIES, resume=True).resumed > 0


class TestNonfinite:
    """A NaN is found where it is read first; late, it costs what was not yet merged."""

    @pytest.fixture
    def merge(self, tmp_path):
        merge = write_models(tmp_path / "models")
        path = merge.models[0] / "model.safetensors"
        tensors = {k: v.copy() for k, v in checkpoints.read(path.parent).items()}
        tensors["model.norm.weight"][17] = np.nan
        path.write_bytes(checkpoints.encode(tensors))
        return merge

    @pytest.fixture
    def expected(self, merge, tmp_path):
        merge(tmp_path / "expected", TIES, allow_nonfinite=True)
        return checkpoints.digest(tmp_path / "expected")

    def test_it_is_refused_before_anything_is_known(self, merge, output):
        observer = Observer()
        with pytest.raises(CheckpointError, match="holds nan"):
            merge(output, TIES, observer)
        assert observer.stages == ["measuring, pass 1"]
        assert not partial_of(output).exists()

    def test_resumed_with_leave_to_hold_nan(self, merge, output):
        average = RECIPES["average"]
        with pytest.raises(CheckpointError, match="holds nan") as caught:
            merge(output, average)
        (note,) = caught.value.__notes__
        assert note == (
            f"what is done so far is kept in {partial_of(output)} for --resume"
        )
        assert merge(output, average, resume=True, allow_nonfinite=True).resumed > 0
        whole = output.with_name("whole")
        merge(whole, average, allow_nonfinite=True)
        assert checkpoints.digest(output) == checkpoints.digest(whole)

    def test_tensors_that_nobody_looked_through_are_merged_again(
        self, merge, expected, output
    ):
        calls = Observer()
        merge(output.parent / "other", TIES, calls, allow_nonfinite=True)
        interrupt(merge, output, TIES, calls.calls - 1, allow_nonfinite=True)
        names = [e.get("tensor") for e in durable.read_lines(journal_of(output))]
        observer = Observer()
        with pytest.raises(CheckpointError, match="holds nan"):
            merge(output, TIES, observer, resume=True)
        assert "model.layers.0.up_proj.weight" in names
        assert observer.stages == ["merging"]  # the thresholds are as they were
        assert merge(output, TIES, resume=True, allow_nonfinite=True).resumed > 0
        assert checkpoints.digest(output) == expected


@pytest.mark.parametrize("moment", [0.1, 0.9])
def test_an_input_that_changes_while_it_is_read(moment, tmp_path, references, output):
    merge = write_models(tmp_path / "models")
    path = merge.models[1] / "model.safetensors"
    at = int(moment * references["ties"][1].calls)

    class Change(Observer):
        def advance(self, count: int) -> None:
            super().advance(count)
            if self.calls == at:
                with path.open("r+b") as file:
                    file.seek(-2, os.SEEK_END)
                    file.write(b"\x01\x3c")

    with pytest.raises(CheckpointError, match="changed while it was read") as caught:
        merge(output, TIES, Change())
    assert str(path) in str(caught.value)
    assert getattr(caught.value, "__notes__", []) == []
    assert not output.exists()
    assert not partial_of(output).exists()


def test_an_input_that_changes_before_ctrl_c_is_not_resumed(
    tmp_path, references, output
):
    merge = write_models(tmp_path / "models")
    at = almost_all(references, "ties")

    class Change(Observer):
        def advance(self, count: int) -> None:
            if self.calls == at - 20:
                os.utime(merge.models[1] / "model.safetensors")
            super().advance(count)

    with pytest.raises(KeyboardInterrupt):
        merge(output, TIES, Change(at))
    assert merge(output, TIES, resume=True).resumed == 0


def test_what_is_recorded_of_the_inputs_is_the_same(merge, references, output):
    """Checksums of tensors that were read before the interruption are kept."""
    interrupt(merge, output, TIES, almost_all(references, "ties"))
    merge(output, TIES, resume=True)
    record = json.loads((output / "m3jax.json").read_text())
    assert all(model["checksum"] for model in [record["base"], *record["models"]])
    assert m3jax.verify(output) == []
