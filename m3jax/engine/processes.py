"""Several processes at one merge: what they tell each other, and when one is lost.

They exchange a few small values through the store of JAX's coordination service;
nothing here computes on devices. A process that fails posts why, and one that is
killed stops giving signs of life: either way `check`, and whatever waits for others,
raises `ProcessError` in all of them, at the latest `SILENCE` + 2 · `BEAT` seconds
later (the first one then stays for up to `FAREWELL` seconds, for the others to hear).
If the process that runs the coordination service dies, JAX itself ends the others, at
once and by SIGABRT.
"""

from __future__ import annotations

import io
import itertools
import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from m3jax.engine import coordination

T = TypeVar("T")
Counts = np.ndarray | tuple[np.ndarray, ...] | None

BEAT = 2.0  # seconds between two signs of life
SILENCE = 30.0  # seconds without one after which a process counts as dead
ARRIVAL = 300.0  # seconds within which all have to have begun, after the first
_POLL = 1.0  # seconds; how long one question to the store waits for its answer
FAREWELL = 3 * BEAT  # seconds in which the others hear why the first one leaves

_numbers = itertools.count()  # of the merges of this process, so that keys differ


class ProcessError(ConnectionError):
    """Another process failed or died; one line."""


class UnequalProcessesError(ValueError):
    """The processes were not started with the same merge; one line."""


class Processes:
    """One process, alone; and the interface of several. Use as a context manager.

    All processes call the same methods in the same order, `check` excepted.

    Attributes:
      index: of this process, from 0.
      count: of all processes.
    """

    index = 0
    count = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that keeps the books."""
        return self.index == 0

    def check(self) -> None:
        """Raises ProcessError if another process is known to have failed."""

    def barrier(self) -> None:
        """Waits until all processes are here."""
        self._exchange(b"", b"".join)

    def gather(self, value: Any) -> list[Any]:
        """What all processes give, in their order; anything that JSON can hold."""
        if self.count == 1:
            return [value]
        text = json.dumps(value).encode()
        joined = self._exchange(text, lambda parts: b"[" + b",".join(parts) + b"]")
        return json.loads(joined)

    def from_first(self, value: Any) -> Any:
        """What the first process gives; it does not wait for the others."""
        return value

    def sum(self, counts: Counts) -> Counts:
        """Adds up arrays of one shape, or tuples of such arrays, one by one.

        None adds nothing; all None give None.
        """
        if self.count == 1:
            return counts
        return _decode(self._exchange(_encode(counts), _add))

    def first_then_others(self, function: Callable[[], T]) -> T:
        """Calls a function in the first process, and then in all others."""
        if not self.first:
            self.from_first(None)
        result = function()
        if self.first:
            self.from_first(None)
        return result

    def same(self, facts: Mapping[str, str]) -> None:
        """Raises UnequalProcessesError if a fact is not the same everywhere."""
        first, *others = self.gather(dict(facts))
        lines = []
        for index, theirs in enumerate(others, start=1):
            different = [
                f"the {name}" + _both(str(theirs.get(name)), value)
                for name, value in first.items()
                if theirs.get(name) != value
            ]
            if different:
                lines.append(f"process {index} differs in {', '.join(different)}")
        if lines:
            raise UnequalProcessesError(
                f"the {self.count} processes need to do the same merge, but compared "
                f"with process 0, {'; '.join(lines)}. If each is to merge on its own, "
                "pass --distributed=off"
            )

    def _exchange(
        self, payload: bytes, combine: Callable[[list[bytes]], bytes]
    ) -> bytes:
        """What the first process makes of all payloads, given in their order."""
        return combine([payload])

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        pass


class JoinedProcesses(Processes):
    """Several processes; see `Processes` and the module's docstring."""

    def __init__(self, store: coordination.Store):
        self.index, self.count = store.index, store.count
        self._store = store
        self._steps = itertools.count()
        self._reason: str | None = None  # why the merge has to stop
        self._leaving = threading.Event()
        self._watching = threading.Thread(
            target=self._watch, name="m3jax-watch", daemon=True
        )

    def check(self) -> None:
        if self._reason is not None:
            raise ProcessError(self._reason)

    def from_first(self, value: Any) -> Any:
        key = f"{next(self._steps)}/all"
        if not self.first:
            return json.loads(self._wait(key))
        self._put(key, json.dumps(value).encode())
        return value

    def _exchange(
        self, payload: bytes, combine: Callable[[list[bytes]], bytes]
    ) -> bytes:
        step = next(self._steps)
        if not self.first:
            self._put(f"{step}/{self.index}", payload)
            return self._wait(f"{step}/all")
        others = [self._wait(f"{step}/{i}") for i in range(1, self.count)]
        combined = combine([payload, *others])
        self._put(f"{step}/all", combined)
        return combined

    def _put(self, key: str, value: bytes) -> None:
        try:
            self._store.put(key, value)
        except jax.errors.JaxRuntimeError as error:
            raise ProcessError(
                f"process {self.index} of {self.count} cannot reach the coordinator: "
                f"{_first_line(error)}"
            ) from None

    def _wait(self, key: str) -> bytes:
        while True:
            self.check()
            try:
                value = self._store.get(key, _POLL)
            except jax.errors.JaxRuntimeError:  # the watch finds out what it means
                time.sleep(_POLL)
                continue
            if value is not None:
                if self.first:
                    self._store.remove(key)
                return value

    def _watch(self) -> None:
        """Gives signs of life, and looks for those of the others."""
        began = reached = time.monotonic()
        heard: dict[str, tuple[str, float]] = {}
        for beat in itertools.count():
            try:
                self._store.post(str(self.index), json.dumps({"beat": beat}))
                board = self._store.board()
                reached = time.monotonic()
            except jax.errors.JaxRuntimeError as error:
                if time.monotonic() - reached > SILENCE:
                    self._reason = (
                        f"process {self.index} of {self.count} has not reached the "
                        f"coordinator for {SILENCE:.0f} s: {_first_line(error)}"
                    )
            else:
                for key, text in board.items():
                    if heard.get(key, ("",))[0] != text:
                        heard[key] = text, reached
                self._reason = self._loss(heard, began)
            if self._leaving.wait(BEAT) or self._reason is not None:
                return

    def _loss(self, heard: dict[str, tuple[str, float]], began: float) -> str | None:
        """Why the merge has to stop, if it has to."""
        now = time.monotonic()
        posts = {key: (json.loads(text), when) for key, (text, when) in heard.items()}
        for post, _ in posts.values():
            if "reason" in post:
                return post["reason"]
        for index in set(range(self.count)) - {self.index}:
            post, when = posts.get(str(index), (None, began))
            if post is None and now - began > ARRIVAL:
                return (
                    f"process {index} of {self.count} has not begun to merge within "
                    f"{ARRIVAL:.0f} s of process {self.index}"
                )
            if post is not None and "done" not in post and now - when > SILENCE:
                return (
                    f"process {index} of {self.count} has given no sign of life for "
                    f"{SILENCE:.0f} s: it was killed or cannot be reached"
                )
        return None

    def __enter__(self) -> Processes:
        self._watching.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._leaving.set()
        self._watching.join()
        last = {"done": True} if error is None else {"reason": self._reason_of(error)}
        try:
            self._store.post(str(self.index), json.dumps(last))
            if error is not None and self.first:
                self._await_others()
        except jax.errors.JaxRuntimeError:
            pass  # nobody is left to be told

    def _reason_of(self, error: BaseException) -> str:
        if isinstance(error, (ProcessError, UnequalProcessesError)):
            return str(error)  # which says itself where it comes from
        what = _first_line(error) or type(error).__name__
        return f"process {self.index} of {self.count} failed: {what}"

    def _await_others(self) -> None:
        """The store may end with this process: gives the others time to look."""
        end = time.monotonic() + FAREWELL
        while time.monotonic() < end:
            posts = map(json.loads, self._store.board().values())
            if sum("beat" not in post for post in posts) == self.count:
                return
            time.sleep(BEAT / 10)


def joined() -> Processes:
    """All processes of this program: those of `jax.distributed`, or this one alone."""
    store = coordination.connect(f"m3jax/{next(_numbers)}")
    if store is None:
        return Processes()
    # Now, while all are known to be here: finding the devices waits for all of them,
    # for minutes and deaf to any failure.
    jax.local_devices()
    return JoinedProcesses(store)


def _both(theirs: str, first: str) -> str:
    """Both values where they are short enough to read."""
    return f" ({theirs} instead of {first})" if len(theirs + first) < 90 else ""


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")


def _encode(counts: Counts) -> bytes:
    file = io.BytesIO()
    if isinstance(counts, tuple):
        np.savez(file, *counts)
    elif counts is not None:
        np.save(file, counts, allow_pickle=False)
    return file.getvalue()


def _decode(content: bytes) -> Counts:
    found = np.load(io.BytesIO(content), allow_pickle=False) if content else None
    return (
        found if found is None or isinstance(found, np.ndarray) else (*found.values(),)
    )


def _add(parts: list[bytes]) -> bytes:
    found = [_decode(part) for part in parts if part]
    added = jax.tree.map(lambda *own: np.sum(own, axis=0), *found) if found else None
    return _encode(added)
