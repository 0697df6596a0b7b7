"""Several processes of a command: finds them, starts them up, and takes leave of them.

Nothing here imports JAX before it is known that there are several processes.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import signal
from collections.abc import Mapping

from m3jax.commands.cli import SYSTEM, UsageError, define, leave_at_once

GROUPS = {
    "Several processes": (
        *("distributed", "coordinator_address", "num_processes", "process_id"),
    )
}
_DISTRIBUTED = define(
    "distributed",
    ["auto", "on", "off"],
    "Share the work with other processes; auto: if the environment has several.",
    "auto",
)
_ADDRESS = define(
    "coordinator_address", str, "HOST:PORT of process 0, where nothing says it."
)
_COUNT = define("num_processes", int, "How many, where nothing says it.")
_INDEX = define("process_id", int, "This one's, from 0, likewise.")

_SHUTDOWN = 30  # seconds in which all processes have to end after the first
# Google's address for what a virtual machine may know of itself.
_METADATA = "metadata.google.internal"

_started = False


def start(*, survive: bool = False) -> bool:
    """Starts JAX's several processes if that is wanted; returns if this prints.

    Comes before anything else is done with JAX. What a user's program has started
    already stays as it is.

    Args:
      survive: go on if a process other than the first is lost.

    Raises:
      UsageError: they cannot be started.
    """
    global _started
    wanted = _DISTRIBUTED.value
    given = [f for f in (_ADDRESS, _COUNT, _INDEX) if f.value is not None]
    if wanted == "off" or (wanted == "auto" and _COUNT.value == 1):
        return True
    if wanted == "auto" and not given and not several(os.environ):
        return True
    if _ADDRESS.value and not re.fullmatch(r".+:\d+", _ADDRESS.value):
        raise UsageError(f"--coordinator_address={_ADDRESS.value} needs HOST:PORT")
    import jax

    if not jax.distributed.is_initialized():
        # JAX's own way with SIGTERM would keep it from ending the command in order.
        jax.config.update("jax_enable_preemption_service", False)
        jax.config.update("jax_enable_recoverability", survive)
        where = _ADDRESS.value or "the coordinator"
        _speak_before_abort(
            f"process 0 and the others could not meet at {where}: start all of them "
            "within 5 minutes, with the same --coordinator_address and --num_processes"
        )
        try:
            jax.distributed.initialize(
                _ADDRESS.value,
                _COUNT.value,
                _INDEX.value,
                shutdown_timeout_seconds=_SHUTDOWN,
            )
        except Exception as error:
            raise UsageError(_cannot_start(error)) from error
        _started = True
    from m3jax.engine import coordination

    store = coordination.connect("m3jax")
    if store is not None and _started:
        lost = "process 0" if store.index else "another process"
        _speak_before_abort(
            f"process {store.index} of {store.count} was ended by JAX for the reason "
            f"above, most likely because {lost} died or cannot be reached; nothing has "
            "the output's name, and what was done is kept for --resume"
        )
    return store is None or store.index == 0


def started() -> bool:
    """Whether `start` has started several processes."""
    return _started


def leave_after_failure(code: int) -> None:
    """Ends this process at once, if `start` has started several.

    JAX would wait for processes that may be dead, and end this one with its own
    message. The others know already why this one failed.
    """
    if _started:
        leave_at_once(code)


def several(environment: Mapping[str, str]) -> bool:
    """Whether the environment says that this is one of several processes.

    It looks for what JAX's argument-free initialization looks for.
    """

    slurm = {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"}
    counted = {"SLURM_NTASKS": slurm, "OMPI_COMM_WORLD_SIZE": {"OMPI_MCA_orte_hnp_uri"}}
    for name, others in counted.items():
        count = environment.get(name, "")
        if others <= environment.keys() and count.isdecimal() and int(count) > 1:
            return True
    return {
        "KUBERNETES_SERVICE_HOST",
        "JOB_COMPLETION_INDEX",
    } <= environment.keys() or (
        importlib.util.find_spec("libtpu") is not None and _tpu_pod(environment)
    )


def _tpu_pod(environment: Mapping[str, str]) -> bool:
    """Whether a machine with a TPU is one of several."""
    if environment.get("MEGASCALE_NUM_SLICES", "1") != "1":
        return True
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if name in environment:
            return "," in environment[name]
    if "TPU_SKIP_MDS_QUERY" in environment:
        return False
    import urllib.request  # takes as long to import as all else here

    host = environment.get("GCE_METADATA_IP", _METADATA)
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/attributes/"
        "worker-network-endpoints",
        headers={"Metadata-Flavor": "Google"},
    )
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:
            return b"," in answer.read()
    except OSError:  # no machine of Google's
        return False


def _cannot_start(error: Exception) -> str:
    text = " ".join(str(error).split())
    if _ADDRESS.value and None not in (_COUNT.value, _INDEX.value):
        return f"--distributed: JAX cannot start {_COUNT.value} processes: {text}"
    return (
        f"--distributed={_DISTRIBUTED.value}: JAX does not find the processes by "
        f"itself ({text}); pass --coordinator_address=HOST:PORT, --num_processes and "
        "--process_id to each, or --distributed=off"
    )


# JAX's service ends a process by SIGABRT, on a thread of its own, when it loses the
# coordinator. No Python handler runs then, so the handler is one of C's; `abort` was
# called in an orderly way, and Python may be used.
_keep: list[object] = []  # a handler has to outlive its installation


def _speak_before_abort(line: str) -> None:
    """Has `line` printed, and the process end as after an error, if JAX aborts it."""
    message = f"m3jax: {line}\n".encode()

    def handle(signum: int) -> None:
        os.write(2, message)
        os._exit(SYSTEM)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
    _keep.append(handler)
    install = ctypes.CDLL(None).signal
    install.argtypes = [ctypes.c_int, ctypes.c_void_p]
    install.restype = ctypes.c_void_p
    install(int(signal.SIGABRT), ctypes.cast(handler, ctypes.c_void_p))
