"""The store of keys and values that JAX's processes share.

The one place that uses private names of JAX: it has no public way to exchange a few
bytes between processes without a computation on all their devices, and such a
computation cannot be told that another process has died.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

# Of one message. Coordination services are built for small values.
_PART = 1 << 20


@dataclasses.dataclass(frozen=True)
class Store:
    """A part of the shared store.

    Attributes:
      index, count: of this process, and of all.
      prefix: of the keys.
      client: JAX's.
    """

    index: int
    count: int
    prefix: str
    client: Any

    def put(self, key: str, value: bytes) -> None:
        """Sets a key that nobody has set."""
        count = -(-len(value) // _PART)
        for i in range(count):
            part = value[i * _PART : (i + 1) * _PART]
            self.client.key_value_set_bytes(f"{self.prefix}/{key}/{i}", part)
        self.client.key_value_set(f"{self.prefix}/{key}/count", str(count))

    def get(self, key: str, seconds: float) -> bytes | None:
        """The value of a key; None if nobody has set it within that time."""
        wait = int(1000 * seconds)
        try:
            name = f"{self.prefix}/{key}/count"
            count = int(self.client.blocking_key_value_get(name, wait))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise
        return b"".join(
            self.client.blocking_key_value_get_bytes(f"{self.prefix}/{key}/{i}", wait)
            for i in range(count)
        )

    def remove(self, key: str) -> None:
        """Forgets a key, so that the store does not grow."""
        self.client.key_value_delete(f"{self.prefix}/{key}/")

    def post(self, key: str, text: str) -> None:
        """Sets a key of the notice board, in place of what it was."""
        name = f"{self.prefix}/board/{key}"
        self.client.key_value_set(name, text, allow_overwrite=True)

    def board(self) -> dict[str, str]:
        """All that is posted, by key."""
        entries = self.client.key_value_dir_get(f"{self.prefix}/board/")
        return {key.rpartition("/")[2]: text for key, text in entries}


def connect(prefix: str) -> Store | None:
    """The store, if JAX runs with several processes; else None."""
    if not jax.distributed.is_initialized():
        return None
    from jax._src.distributed import global_state as state

    if state.num_processes == 1:
        return None
    return Store(state.process_id, state.num_processes, prefix, state.client)
