"""Several draws at once: on devices of their own, or on one that has the room.

A place is where one draw at a time is merged and evaluated. What a draw is, and what it
scores, does not depend on it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp

from m3jax.exploration.merger import Merger
from m3jax.recipe import Recipe, RecipeError

T = TypeVar("T")
R = TypeVar("R")
L = TypeVar("L")

_THREADS = "m3jax-draw"  # their name begins so

Place: TypeAlias = "jax.Device | None"  # None: several devices together


def choose_places(trees: Sequence[Any], at_once: int | None, most: int) -> list[Place]:
    """Where draws are to be merged and evaluated: a place for each one at a time.

    The first is where the models are. If there are fewer devices than draws at a time,
    some have several.

    Args:
      trees: base (or None) and models.
      at_once: draws at a time. None: one for each accelerator of this process; one for
        all CPU devices, which share cores and memory, and for models that lie on
        several devices together.
      most: draws that there will be to do at a time; a place more would be idle, and
        hold a copy of the models.

    Raises:
      RecipeError: so many are not possible.
    """
    home = _home(trees)
    if home is None:
        if at_once is not None and at_once > 1:
            raise RecipeError(
                f"at_once={at_once} needs to be 1: the models lie on several devices "
                "together"
            )
        return [None]
    devices = [home, *(other for other in jax.local_devices() if other != home)]
    if at_once is None:
        at_once = 1 if home.platform == "cpu" else len(devices)
    return [devices[i % len(devices)] for i in range(min(at_once, most))]


def make_mergers(
    trees: list[Any],
    recipe: Recipe,
    places: Sequence[Place],
    make: Callable[[Any, Sequence[Any], Recipe], Merger] = Merger,
) -> list[Merger]:
    """A merger for each place; the same one for the same place.

    Each place but the first, where the models are, gets a copy of them.

    Args:
      trees: base (or None) and models; emptied, so that what the merges do not need
        can go.
      recipe: as for `Merger`.
      places: from `choose_places`.
      make: makes one.

    Raises:
      RecipeError, CheckpointError: as `Merger` does.
    """
    mergers = {places[0]: make(trees[0], trees[1:], recipe)}
    for place in places:
        if place not in mergers:
            base, *models = _copied(trees, place)
            mergers[place] = make(base, models, recipe)
    trees.clear()
    return [mergers[place] for place in places]


def in_order(
    work: Callable[[T, L], R], items: Sequence[T], workers: Sequence[L]
) -> Generator[R]:
    """Yields ``work(item, worker)`` in the items' order; a worker has one at a time.

    With a single worker nothing leaves this thread. With more, an item's error is
    raised when its turn comes; what is at work by then is not waited for, which is what
    `pipeline.for_each` has to do with its files.
    """
    if len(workers) == 1:
        yield from (work(item, workers[0]) for item in items)
        return
    free: queue.SimpleQueue[L] = queue.SimpleQueue()
    for worker in workers:
        free.put(worker)
    # What the caller has set for its own thread. A device of our choice would compile
    # everything once more; the models' arrays are where they have to be as it is.
    config: Any = jax.config
    x64, device = config.jax_enable_x64, config.jax_default_device

    def run(item: T) -> R:
        worker = free.get()
        try:
            with jax.enable_x64(x64), jax.default_device(device):
                return work(item, worker)
        finally:
            free.put(worker)

    pool = ThreadPoolExecutor(len(workers), thread_name_prefix=_THREADS)
    try:
        for future in [pool.submit(run, item) for item in items]:
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def at_work() -> bool:
    """Whether a draw goes on that nobody waits for."""
    return any(thread.name.startswith(_THREADS) for thread in threading.enumerate())


def _home(trees: Sequence[Any]) -> Place:
    """The device that holds all arrays; None if there are several."""
    leaves = [x for x in jax.tree.leaves(list(trees)) if isinstance(x, jax.Array)]
    found = {device for leaf in leaves or [jnp.zeros(())] for device in leaf.devices()}
    return found.pop() if len(found) == 1 else None


def _copied(trees: Sequence[Any], device: Place) -> list[Any]:
    """The trees with their arrays on a device; NumPy's stay what they are."""
    return jax.tree.map(
        lambda x: jax.device_put(x, device) if isinstance(x, jax.Array) else x,
        list(trees),
    )
