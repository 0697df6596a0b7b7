"""What processes tell each other, with threads for processes and a dict for a store."""

from __future__ import annotations

import http.server
import importlib.util
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3jax.commands import distributed
from m3jax.engine import coordination, plan, processes
from m3jax.engine.processes import (
    JoinedProcesses,
    ProcessError,
    Processes,
    UnequalProcessesError,
)


class Client:
    """What JAX's client does, in memory."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self._changed = threading.Condition()

    def key_value_set(self, key, value, allow_overwrite=False):
        with self._changed:
            assert allow_overwrite or key not in self.values
            self.values[key] = value
            self._changed.notify_all()

    def blocking_key_value_get(self, key, timeout_in_ms):
        with self._changed:
            if not self._changed.wait_for(
                lambda: key in self.values, timeout_in_ms / 1000
            ):
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: no such key")
            return self.values[key]

    def key_value_dir_get(self, key):
        with self._changed:
            return [(k, v) for k, v in self.values.items() if k.startswith(key)]

    def key_value_delete(self, key):
        with self._changed:
            for name in [name for name in self.values if name.startswith(key)]:
                del self.values[name]

    key_value_set_bytes = key_value_set
    blocking_key_value_get_bytes = blocking_key_value_get


@pytest.fixture(autouse=True)
def short_times(monkeypatch):
    for name, seconds in {"BEAT": 0.02, "SILENCE": 0.3, "ARRIVAL": 0.6}.items():
        monkeypatch.setattr(processes, name, seconds)
    monkeypatch.setattr(processes, "_POLL", 0.02)
    monkeypatch.setattr(processes, "FAREWELL", 0.2)


def together(count: int, work: Callable[[Processes], Any], client=None) -> list[Any]:
    """Runs `work` in that many processes; their results or errors."""
    client = client or Client()

    def one(index: int) -> Any:
        store = coordination.Store(index, count, "run", client)
        try:
            with JoinedProcesses(store) as own:
                return work(own)
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def test_exchanges():
    def work(own: Processes) -> Any:
        own.barrier()
        first = own.from_first({"index": own.index})
        return own.gather([own.index, "ü"]), first, own.count

    everywhere = [[0, "ü"], [1, "ü"], [2, "ü"]]
    assert together(3, work) == [(everywhere, {"index": 0}, 3)] * 3


def test_sums_are_exact_and_larger_than_a_message():
    size = 2 * coordination._PART // 8 + 5
    parts = [None, np.full(size, 2**53 + 1), np.arange(size)]
    total = parts[1] + parts[2]
    client = Client()
    found = together(3, lambda own: own.sum(parts[own.index]), client)
    for array in found:
        assert array.dtype == np.int64
        np.testing.assert_array_equal(array, total)
    assert together(2, lambda own: own.sum(None)) == [None, None]
    parts = [np.float32(v) for v in (0, -1, 0)]
    sums = together(3, lambda own: own.sum(parts[own.index]))
    assert [float(s) for s in sums] == [-1.0] * 3
    assert not [key for key in client.values if "/0/1/" in key]  # read and forgotten


def test_first_then_others():
    order: list[int] = []

    def work(own: Processes) -> None:
        if own.first:
            time.sleep(0.1)
        own.first_then_others(lambda: order.append(own.index))

    together(3, work)
    assert order[0] == 0 and sorted(order) == [0, 1, 2]


def test_an_error_reaches_all():
    def work(own: Processes) -> None:
        if own.index == 2:
            raise ValueError("tensor w: NaN\nmore")
        while True:
            own.check()
            time.sleep(0.01)

    first, second, failed = together(3, work)
    assert isinstance(failed, ValueError)
    for error in (first, second):
        assert isinstance(error, ProcessError)
        assert str(error) == "process 2 of 3 failed: tensor w: NaN"


@pytest.mark.parametrize("waiting", ["barrier", "check"])
def test_silence_is_noticed_in_bounded_time(waiting):
    died = threading.Event()

    def work(own: Any) -> tuple[str, float] | None:
        own.barrier()
        if own.index == 1:  # gives no more signs, and has no last word
            own._leaving.set()
            died.set()
            own._store = coordination.Store(1, 3, "nowhere", Client())
            return None
        died.wait()
        started = time.monotonic()
        with pytest.raises(ProcessError) as caught:
            while True:
                getattr(own, waiting)()
                time.sleep(0.01)
        return str(caught.value), time.monotonic() - started

    first, nothing, third = together(3, work)
    assert nothing is None
    for text, seconds in (first, third):
        assert text.startswith("process 1 of 3 has given no sign of life for 0 s")
        assert 0.2 < seconds < 3


def test_one_that_never_begins():
    client = Client()
    store = coordination.Store(0, 2, "run", client)
    expected = pytest.raises(ProcessError, match="process 1 of 2 has not begun")
    with expected, JoinedProcesses(store) as own:
        own.barrier()


def test_a_process_that_is_done_is_not_missed():
    def work(own: Processes) -> str:
        if own.index:
            return "done"
        time.sleep(0.7)
        own.check()
        return "still here"

    assert together(2, work) == ["still here", "done"]


def test_what_differs_is_named():
    facts = [
        {"seed": "0", "recipe": "r" * 99},
        {"seed": "0", "recipe": "r" * 99},
        {"seed": "7", "recipe": "q" * 99},
    ]
    errors = together(3, lambda own: own.same(facts[own.index]))
    assert {type(error) for error in errors} == {UnequalProcessesError}
    (text,) = {str(error) for error in errors}
    assert "process 2 differs in the seed (7 instead of 0), the recipe. If" in text
    assert "process 1" not in text
    assert together(3, lambda own: own.same({"seed": "0"})) == [None] * 3


def test_one_process_costs_nothing():
    array = np.arange(3)
    with processes.joined() as own:
        assert type(own) is Processes and own.first
        assert own.sum(array) is array
        assert own.gather(array) == [array] and own.from_first(array) is array
        assert own.first_then_others(lambda: 5) == 5
        own.barrier()
        own.check()
        own.same({"seed": "0"})


@given(st.lists(st.integers(0, 50), max_size=12), st.integers(1, 6))
def test_shares(sizes, count):
    shares = plan.share_out(sizes, count)
    assert len(shares) == count
    assert [i for share in shares for i in share] == list(range(len(sizes)))
    largest = max(sum(sizes[i] for i in share) for share in shares)
    assert largest == _best(tuple(sizes), count)


def _best(sizes: tuple[int, ...], count: int) -> int:
    """The smallest possible largest share, by trying all cuts."""
    if count == 1:
        return sum(sizes)
    return min(
        max(sum(sizes[:cut]), _best(sizes[cut:], count - 1))
        for cut in range(len(sizes) + 1)
    )


SLURM = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_NODELIST": "node[1-4]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
MPI = {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://h:1", "OMPI_COMM_WORLD_SIZE": "2"}
CLUSTER = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        (SLURM, True),
        ({**SLURM, "SLURM_NTASKS": "1"}, False),
        ({"SLURM_JOB_ID": "17", "SLURM_NTASKS": "4"}, False),  # sbatch, no srun
        (MPI, True),
        ({**MPI, "OMPI_COMM_WORLD_SIZE": "1"}, False),
        (CLUSTER, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, False),  # without a TPU's library
    ],
)
def test_finds_several_processes(environment, expected):
    assert distributed.several(environment) == expected


def test_finds_a_tpu_pod(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert distributed.several({"TPU_WORKER_HOSTNAMES": "a,b"})
    assert not distributed.several({"TPU_WORKER_HOSTNAMES": "a"})
    assert distributed.several({"MEGASCALE_NUM_SLICES": "2"})
    assert not distributed.several({"TPU_SKIP_MDS_QUERY": "1"})
    assert not distributed.several({"GCE_METADATA_IP": "127.0.0.1:9"})  # nobody
    assert _asked("w0:0:10.0.0.1,w1:1:10.0.0.2")
    assert not _asked("w0:0:10.0.0.1")


def _asked(endpoints: str) -> bool:
    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path.endswith("/attributes/worker-network-endpoints")
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(endpoints.encode())

        def log_message(self, *arguments: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        host = f"127.0.0.1:{server.server_port}"
        found = distributed.several({"GCE_METADATA_IP": host})
        thread.join()
    return found
