"""Settings of every test: eight virtual devices, strict promotion, no network.

All that XLA compiles in a run is kept in a folder of that run: the tests of one file
merge by the same programs, and so do those of the next one.
"""

import os
import shutil
import signal
import tempfile

# Read by jax and huggingface_hub when they are imported, here and in subprocesses.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["M3JAX_CACHE"] = "off"  # of the user's; tests of it have one of their own

import jax
from command_line import run  # noqa: F401 - a fixture for all tests
from hypothesis import Phase, settings

# The workers of pytest-xdist inherit the variable. Whoever sets it keeps the folder.
PROGRAMS = "M3JAX_TEST_PROGRAMS"
_ours = PROGRAMS not in os.environ
if _ours:
    os.environ[PROGRAMS] = tempfile.mkdtemp(prefix="m3jax-programs-")
jax.config.update("jax_compilation_cache_dir", os.environ[PROGRAMS])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# A busy machine is slow, not wrong.
settings.register_profile("m3jax", deadline=None)
# For mutations/run.py: any failure will do, it need not be the smallest.
found = (Phase.explicit, Phase.generate)
settings.register_profile("first failure", deadline=None, phases=found)
settings.load_profile("m3jax")


def pytest_sessionstart() -> None:
    # Scripts start what they put in the background without Ctrl-C.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert jax.local_device_count() == 8, "jax was imported before tests/conftest.py"


def pytest_unconfigure() -> None:
    if _ours:
        shutil.rmtree(os.environ[PROGRAMS], ignore_errors=True)
