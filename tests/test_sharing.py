"""One exploration by several processes: nothing lost, nothing twice without a word."""

from __future__ import annotations

import collections
import json
import threading
import time

import distributed
import pytest
import test_explore
from test_explore_command import command, folder  # noqa: F401 - a fixture

from m3jax.checkpoints.errors import CheckpointError
from m3jax.exploration.sharing import worker as workers
from m3jax.exploration.sharing.ledger import Entry, Ledger
from m3jax.exploration.sharing.storage import Storage
from m3jax.exploration.sharing.worker import Worker

RESULTS = ("trials.jsonl", "scores.jsonl", "summary.json", "winner.json")


def entries(*lines: str) -> list[Entry]:
    """Entries as KIND PIECE CLAIM, whose worker is the claim's first letter."""
    return [
        Entry(*line.split(), line.split()[2][0], {"by": line.split()[2]})
        for line in lines
    ]


def read(*lines: str) -> Ledger:
    ledger = Ledger()
    ledger.add(entries(*lines))
    return ledger


# The ledger.


def test_the_first_claim_holds():
    ledger = read("claim t a1", "claim t b1", "done t b1")
    assert ledger.held["t"].claim == "a1"
    assert not ledger.done and [own.claim for own in ledger.refused] == ["b1"]
    ledger.add(entries("done t a1", "claim t b2", "done t b2"))
    assert ledger.done["t"].result == {"by": "a1"}
    assert not ledger.held and not ledger.lost


def test_a_lost_claim_is_counted_once_and_its_result_is_refused():
    ledger = read("claim t a1", "lost t a1", "claim t b1", "lost t a1", "claim t c1")
    assert [own.claim for own in ledger.lost] == ["a1"]
    assert ledger.held["t"].claim == "b1"
    ledger.add(entries("done t a1", "done t b1"))
    assert ledger.done["t"].result == {"by": "b1"}
    assert [own.claim for own in ledger.refused] == ["a1"]


def test_a_result_that_came_before_it_was_given_up_for_lost_counts():
    ledger = read("claim t a1", "done t a1", "lost t a1", "claim t b1")
    assert ledger.done["t"].result == {"by": "a1"}
    assert not ledger.lost and not ledger.held


def test_a_piece_that_was_given_up_is_free_and_not_lost():
    ledger = read("claim t a1", "released t a1", "claim t b1")
    assert ledger.held["t"].claim == "b1" and not ledger.lost


# Workers, over a storage in memory.


class Memory:
    """A storage of threads."""

    place = "memory"

    def __init__(self, lines: list[Entry] | None = None):
        self.lines = [] if lines is None else lines
        self.read, self.counts = 0, {}

    def of(self) -> Memory:
        """Another process's view of it."""
        made = Memory(self.lines)
        made.counts = self.counts
        return made

    def new(self):
        found = self.lines[self.read :]
        self.read += len(found)
        return found

    def append(self, entry):
        self.lines.append(entry)

    def beat(self, worker, count):
        self.counts[worker] = count

    def beats(self):
        return dict(self.counts)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(workers, "BEAT", 0.02)
    monkeypatch.setattr(workers, "SILENCE", 0.4)
    monkeypatch.setattr(workers, "POLL", 0.01)


def test_each_piece_is_done_once_and_all_get_all(quick):
    storage, done = Memory(), collections.Counter()
    items = {f"trial {i}": i for i in range(30)}
    found = {}

    def work(item, place):
        done[item] += 1
        time.sleep(0.003)
        return {"square": item * item}

    def run(name, places):
        with Worker(storage.of(), lambda line: None) as worker:
            found[name] = list(worker.each(items, work, places))

    threads = [
        threading.Thread(target=run, args=(i, [None] * (i + 1))) for i in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == dict.fromkeys(range(30), 1)
    here = [[own for _, own in found[i]] for i in range(3)]
    assert all(sum(column) == 1 for column in zip(*here, strict=True))
    for lines in found.values():
        assert [line["square"] for line, _ in lines] == [i * i for i in range(30)]


def test_what_a_dead_worker_had_begun_is_done_again_and_said(quick):
    storage, said = Memory(entries("claim a d1", "claim b d2", "done b d2")), []
    storage.beat("d", 0)
    with Worker(storage, said.append) as worker:
        found = list(worker.each({"a": 1, "b": 2}, lambda x, _: {"x": x}, [None]))
        assert [here for _, here in found] == [True, False]
        assert "done again: a" in worker.summary()
    assert len(said) == 1 and said[0].startswith("a is done again: d had begun it")


def test_a_worker_that_wakes_up_is_refused(quick):
    storage, said = Memory(), []
    with Worker(storage.of(), said.append) as worker:

        def slow(item, place):
            # While it works it is given up for lost, and another one does the piece.
            claim = storage.lines[-1]
            other = claim._replace(claim="other", worker="other")
            for kind, own in (("lost", claim), ("claim", other), ("done", other)):
                storage.append(own._replace(kind=kind, result={"by": "other"}))
            return {"by": "me"}

        assert list(worker.each({"a": 1}, slow, [None])) == [({"by": "other"}, False)]
        assert "done twice, by workers that were thought dead: a" in worker.summary()


def test_an_orderly_end_frees_what_was_begun(quick):
    storage = Memory()

    def fails(item, place):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Worker(storage, print) as worker:
        list(worker.each({"a": 1}, fails, [None]))
    assert [own.kind for own in storage.lines] == ["claim", "released"]


# Storages.


@pytest.mark.parametrize("place", ["{}/study.journal", "sqlite:///{}/study.db#x"])
def test_a_storage_keeps_entries_in_one_order(place, tmp_path):
    place = place.format(tmp_path)
    first, second = Storage(place), Storage(place)
    long = {"trial": {"objective": -0.5, "text": 'ä"' * 20_000}}
    own = [Entry("claim", "t", "1", "a"), Entry("done", "t", "1", "a", long)]
    for storage, entry in zip((first, second), own, strict=True):
        storage.append(entry)
    assert first.new() == second.new() == own
    assert first.new() == []
    first.beat("a", 3)
    assert second.beats() == {"a": 3}
    import optuna

    url, _, name = place.partition("#")
    if not name:
        backend = optuna.storages.journal.JournalFileBackend(url)
        url = optuna.storages.JournalStorage(backend)
    study = optuna.load_study(storage=url, study_name=name or "m3jax")
    assert study.best_value == -0.5  # as optuna's own tools see it


def test_a_torn_line_is_cut_off(tmp_path):
    path = tmp_path / "study.journal"
    own = [Entry("claim", str(i), str(i), "a") for i in range(3)]
    Storage(str(path)).append(own[0])
    with path.open("ab") as file:
        file.write(b'{"op_code": 4, "torn')
    again = Storage(str(path))
    again.append(own[1])
    Storage(str(path)).append(own[2])
    assert Storage(str(path)).new() == again.new() == own


@pytest.mark.parametrize(
    ("place", "error", "message"),
    [
        ("{}/none/study.journal", OSError, "No such file"),
        ("{}/text", CheckpointError, "text: cannot be opened as a study"),
        ("{}", OSError, "Is a directory"),
        ("nosuch://user:secret@host/db", CheckpointError, r"user:\*\*\*@host/db: "),
    ],
)
def test_what_is_no_study_is_said(place, error, message, tmp_path):
    (tmp_path / "text").write_text("first\nsecond\n")
    with pytest.raises(error, match=message) as raised:
        Storage(place.format(tmp_path))
    assert "secret" not in str(raised.value)
    assert (tmp_path / "text").read_text() == "first\nsecond\n"


def test_a_study_that_cannot_be_opened_leaves_no_output_behind(tmp_path):
    (tmp_path / "own").mkdir()
    for name in ("new", "own"):
        with pytest.raises(OSError, match="No such file"):
            test_explore.explore(
                output=tmp_path / name, study=tmp_path / "none" / "study"
            )
    assert [own.name for own in tmp_path.iterdir()] == ["own"]


# Explorations.


def test_workers_end_with_the_files_of_one_alone(quick, tmp_path):
    options = {"draws": 12, "seed": 4, "sampler": "tpe", "generation": 4}
    test_explore.explore(output=tmp_path / "alone", **options)
    study, evaluated = tmp_path / "study.journal", collections.Counter()

    def start(name):
        near = test_explore.near(0.3, 0.7)

        def evaluator(parameters, budget, key):
            evaluated[name] += 1
            time.sleep(0.01)
            return near(parameters, budget, key)

        evaluator.__qualname__ = near.__qualname__
        evaluator.__module__ = near.__module__
        test_explore.explore(
            evaluator=evaluator, output=tmp_path / name, study=study, **options
        )

    threads = [threading.Thread(target=start, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Base, two models, equal ratios, the plain method, draws and the winner.
    assert evaluated.total() == 3 + 2 + 12 + 1
    assert len(evaluated) == 2
    expected = test_explore.contents(tmp_path / "alone")
    assert test_explore.contents(tmp_path / "a") == expected
    assert test_explore.contents(tmp_path / "b") == expected
    start("late")  # there is nothing left to evaluate
    assert evaluated.total() == 18
    assert test_explore.contents(tmp_path / "late") == expected


def test_an_output_brings_its_trials_into_a_study(quick, tmp_path):
    kept = {"output": tmp_path / "a", "draws": 3, "resume": True}
    test_explore.explore(**kept)
    study, seen = tmp_path / "study.journal", []
    test_explore.explore(**kept, study=study, say=seen.append)
    alone = tmp_path / "b"
    calls = []
    near = test_explore.near(0.3, 0.7)

    def evaluator(*arguments):
        calls.append(1)
        return near(*arguments)

    evaluator.__qualname__, evaluator.__module__ = near.__qualname__, near.__module__
    test_explore.explore(evaluator=evaluator, output=alone, draws=3, study=study)
    assert not calls
    assert test_explore.contents(alone) == test_explore.contents(tmp_path / "a")


def test_another_search_is_refused(quick, tmp_path):
    study = tmp_path / "study.journal"
    test_explore.explore(draws=2, study=study)
    with pytest.raises(CheckpointError, match="was begun with seed = 0, now it is 1"):
        test_explore.explore(draws=2, seed=1, study=study)


def test_copies_of_the_models_elsewhere_are_the_same(folder, tmp_path, run):  # noqa: F811
    import shutil

    study = tmp_path / "study.journal"
    ran = run(*command(folder, tmp_path / "a", study=study))
    assert ran.code == 0, ran.err
    shutil.copytree(folder, tmp_path / "elsewhere")
    ran = run(*command(tmp_path / "elsewhere", tmp_path / "b", study=study))
    assert ran.code == 0, ran.err
    assert "0 of 10 evaluations were done by this process" in ran.err
    for name in RESULTS[:3]:
        ours, theirs = (
            (tmp_path / own / name).read_text().splitlines()[1:] for own in "ab"
        )
        assert ours == theirs  # but for the headers, which name the files
    shutil.copy(folder / "a/model.safetensors", tmp_path / "elsewhere/b")
    ran = run(*command(tmp_path / "elsewhere", tmp_path / "c", study=study))
    assert (ran.code, "was begun with models" in ran.error) == (3, True), ran.err


# Processes that die.

# m3jax's command line, but for shorter times and a sudden death in a trial.
COMMAND = """
import os, sys, time
from m3jax.__main__ import main
from m3jax.engine import processes
from m3jax.exploration import run
from m3jax.exploration.sharing import worker
processes.BEAT, processes.SILENCE = 0.3, 3.0
worker.BEAT, worker.SILENCE, worker.POLL = 0.3, 3.0, 0.1
dies = int(sys.argv[1])
do, done = run.Run._do, []
def do_and_die(self, asked, merger):
    done.append(asked.index)
    if len(done) == dies:
        os.kill(os.getpid(), 9)
    time.sleep(0.2)  # so that both get some
    return do(self, asked, merger)
run.Run._do = do_and_die
code = main(sys.argv[2:])
print("DONE", done)
sys.stdout.flush()
sys.exit(code)
"""


def began(ended) -> list[int]:
    (line,) = [own for own in ended.out.splitlines() if own.startswith("DONE")]
    return json.loads(line.removeprefix("DONE"))


def ledger_of(study) -> Ledger:
    ledger = Ledger()
    ledger.add(Storage(str(study)).new())
    return ledger


@pytest.mark.slow
def test_of_two_workers_one_is_killed(folder, tmp_path, run):  # noqa: F811
    flags = {"draws": 12, "sampler": "tpe", "generation": 6}
    assert run(*command(folder, tmp_path / "alone", **flags)).code == 0
    study = tmp_path / "study.journal"
    commands = [
        ["-c", COMMAND, dies, *command(folder, tmp_path / name, study=study, **flags)]
        for name, dies in (("a", 3), ("b", -1))
    ]
    killed, other = distributed.run(*commands)
    assert (killed.code, other.code) == (-9, 0), other.err
    ledger = ledger_of(study)
    (lost,) = ledger.lost
    assert lost.piece.startswith("trial ") and not ledger.refused and not ledger.held
    assert f"begun by workers that died, and done again: {lost.piece}" in other.err
    assert len([name for name in ledger.done if name.startswith("trial ")]) == 12
    by = collections.Counter(own.worker for own in ledger.done.values())
    assert len(by) == 2
    # The killed one had done two, which are not done again.
    assert len(began(other)) == 10
    # It takes part again, and has nothing to do.
    ran = run(*command(folder, tmp_path / "a", study=study, **flags), "--resume")
    assert ran.code == 0, ran.err
    for name in RESULTS:
        expected = (tmp_path / "alone" / name).read_bytes()
        assert (tmp_path / "b" / name).read_bytes() == expected
        assert (tmp_path / "a" / name).read_bytes() == expected


@pytest.mark.slow
@pytest.mark.parametrize("victim", [None, 1, 0])
def test_processes_of_jax_share_an_exploration(victim, folder, tmp_path, run):  # noqa: F811
    flags = {"draws": 10}
    assert run(*command(folder, tmp_path / "alone", **flags)).code == 0
    output = tmp_path / "out"
    port = distributed.free_port()

    def start(victim, *more):
        where = [f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2"]
        return distributed.run(
            *(
                [
                    *("-c", COMMAND, 3 if i == victim else -1),
                    *command(folder, output, **flags),
                    *(*where, f"--process_id={i}", *more),
                ]
                for i in range(2)
            )
        )

    ended = start(victim)
    if victim == 0:  # the coordinator: JAX ends the other one
        assert [own.code for own in ended] == [-9, 4], ended[1].err
        ended = start(None, "--resume")
    if victim == 1:
        assert [own.code for own in ended] == [0, -9], ended[0].err
        assert "begun by workers that died, and done again: trial" in ended[0].err
    else:
        assert [own.code for own in ended] == [0, 0], ended[0].err + ended[1].err
        assert ended[1].err == "", ended[1].err  # the first one speaks
    ledger = ledger_of(output / "study.journal")
    # With the first one JAX ends the other one in what it is at.
    assert len(ledger.lost) in {None: (0,), 1: (1,), 0: (1, 2)}[victim]
    assert len([name for name in ledger.done if name.startswith("trial ")]) == 10
    for name in RESULTS:
        expected = (tmp_path / "alone" / name).read_bytes()
        assert (output / name).read_bytes() == expected
