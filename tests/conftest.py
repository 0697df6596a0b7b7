"""Settings of every test: eight virtual devices, strict promotion, no network.

What XLA compiles is kept in .pytest_cache, or in the folder M3JAX_TEST_PROGRAMS: the
workers share it, and so do the tests of a file and those of the next one.
"""

import os
import shutil
import signal
from pathlib import Path

# Read by jax and huggingface_hub when they are imported, here and in subprocesses.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["M3JAX_CACHE"] = "off"  # of the user's; tests of it have one of their own

import jax
import pytest
from command_line import run  # noqa: F401 - a fixture for all tests
from hypothesis import Phase, settings

# Kept for the next run, too; XLA's key of a program says all that it depends on.
PROGRAMS = Path(__file__).parents[1] / ".pytest_cache" / "programs"
MOST = 20_000  # files; a whole run has some thousands
programs = os.environ.setdefault("M3JAX_TEST_PROGRAMS", str(PROGRAMS))
jax.config.update("jax_compilation_cache_dir", programs)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# A busy machine is slow, not wrong.
settings.register_profile("m3jax", deadline=None)
# For mutations/run.py: any failure will do, it need not be the smallest.
found = (Phase.explicit, Phase.generate)
settings.register_profile("first failure", deadline=None, phases=found)
settings.load_profile("m3jax")


def pytest_sessionstart(session: pytest.Session) -> None:
    a_worker = hasattr(session.config, "workerinput")
    if not a_worker and sum(1 for _ in PROGRAMS.glob("*")) > MOST:
        shutil.rmtree(PROGRAMS)
    # Scripts start what they put in the background without Ctrl-C.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert jax.local_device_count() == 8, "jax was imported before tests/conftest.py"
