"""Settings of every test: eight virtual devices, strict promotion, no network."""

import os

# Read by jax and huggingface_hub when they are imported, here and in subprocesses.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["HF_HUB_OFFLINE"] = "1"

import dataclasses
import logging
import signal
from collections.abc import Callable, Iterator

import jax
import pytest
from absl import flags


def pytest_sessionstart() -> None:
    assert jax.local_device_count() == 8, "jax was imported before tests/conftest.py"


@dataclasses.dataclass(frozen=True)
class Result:
    """What a command did: its exit code and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Result]]:
    """Runs `m3jax ARGUMENTS...` in this process, each time as if it were a new one."""
    from m3jax.__main__ import main

    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments: str) -> Result:
        for name in list(flags.FLAGS):
            if name.partition(".")[0] == "config":
                delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
        capsys.readouterr()
        code = main(list(arguments))
        return Result(code, *capsys.readouterr())

    yield run
    signal.signal(signal.SIGTERM, handler)
    logging.captureWarnings(False)
