"""What a command may do where the process is its own, started for nothing else.

It keeps what JAX has compiled for the next command, looks for garbage less often, and
does not tidy up, object by object, what ends with the process.
"""

from __future__ import annotations

import gc
import hashlib
import io
import os
import stat
import sys
import tempfile
from pathlib import Path
from typing import Any

# Set by `python -m m3jax` alone; a program that calls a command decides for itself.
own = False
_leaves_at_once = False

_OFF = ("off", "0", "false", "no")
# Programs kept, at some ten kilobytes each; the oldest make room.
_MOST = 1000
# What of a processor's description decides which instructions it has.
_X86_FACTS = ("vendor_id", "cpu family", "model", "stepping", "flags")
_ARM_FACTS = ("CPU ", "Features")
_PROVEN, _UNFIT = "proven", "unfit"
_FILES = 65536  # open at a time; five models of 160 shards come near the usual 1024


def begin(command: str = "") -> None:
    """Takes the process as a command's own, before it imports NumPy.

    Matrix products of NumPy's then have one thread, since a merge calls them from its
    own threads, where those of OpenBLAS wait for each other by spinning: up to twenty
    times the CPU. `lora` and `align` work on one matrix at a time, and have them all.
    """
    global own
    own = True
    if command not in ("lora", "align"):
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # That there is no PyTorch is no news to those who run models in JAX.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # for whoever follows a log file
    gc.set_threshold(100_000, 50, 100)  # a tenth of all imports is a search for garbage


def keep_programs() -> None:
    """Has JAX keep compiled programs in the user's cache folder, where that is safe.

    Call it before anything is compiled. It does nothing where `M3JAX_CACHE=off` or one
    of JAX's own settings says what to do, where the folder cannot be had, and where
    XLA does not take back, without a word, what it has compiled on this machine: for
    some processors it then warns of instructions that are missing.
    """
    if not own:
        return
    asked = os.environ.get("M3JAX_CACHE", "").lower()
    theirs = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")
    if asked in _OFF or any(name in os.environ for name in theirs):
        return
    try:
        folder = _folder()
        if folder is None or (folder / _UNFIT).exists():
            return
        import jax

        try:
            _keep_in(folder, jax)
            if (folder / _PROVEN).exists():
                _make_room(folder)
                return
            proven = _comes_back_silently(jax)
        except Exception:
            _keep_in(None, jax)
            raise
        (folder / (_PROVEN if proven else _UNFIT)).touch()
        if not proven:
            _keep_in(None, jax)
    except (OSError, RuntimeError, AttributeError, ImportError):
        return  # there is no such folder, CPU or setting; it is only for speed


def _keep_in(folder: Path | None, jax: Any) -> None:
    """Tells JAX where to keep programs."""
    from jax.experimental.compilation_cache import compilation_cache

    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", folder and str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def open_many_files() -> None:
    """Lets this process open as many files as it may: models come in hundreds."""
    try:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (ImportError, OSError, ValueError):
        return  # another system; the default then stands


def leave_at_once() -> None:
    """Says that nothing is left to wait for when the command is done."""
    global _leaves_at_once
    _leaves_at_once = True


def end(code: int) -> int:
    """Ends the process if `leave_at_once` was called; otherwise returns the exit code.

    JAX takes a quarter of a second to take itself apart.
    """
    watched = sys.gettrace() or sys.getprofile()  # and has something to write
    if _leaves_at_once and code == 0 and not watched:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _folder() -> Path | None:
    """The user's folder for this machine and these versions; None without one."""
    facts = _machine()
    if not facts:
        return None
    import jaxlib

    import m3jax

    facts += [m3jax.__version__, jaxlib.__version__, sys.version]
    key = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    home = cache if cache.is_absolute() else Path.home() / ".cache"
    folder = home / "m3jax" / "programs" / key
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    # What lies there is run.
    others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    private = found.st_uid == os.getuid() and not others
    return folder if private and os.access(folder, os.W_OK) else None


def _machine() -> list[str]:
    """The processor, as far as compiled programs depend on it; nothing but on Linux."""
    try:
        with Path("/proc/cpuinfo").open("rb", buffering=0) as file:
            text = file.read(8192).decode(errors="replace")  # the first of many
    except OSError:
        return []
    lines = text.partition("\n\n")[0].splitlines()
    return [line for line in lines if line.startswith(_X86_FACTS + _ARM_FACTS)]


def _comes_back_silently(jax: Any) -> bool:
    """Whether a program that is compiled twice is loaded, without a word on stderr."""
    taken = []

    def listen(event: str, **more: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            taken.append(event)

    def compiled() -> None:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            jax.jit(lambda x: x * 3).lower(1.0).compile()

    compiled()
    jax.clear_caches()
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as said:
        jax.monitoring.register_event_listener(listen)
        os.dup2(said.fileno(), 2)
        try:
            compiled()
        finally:
            os.dup2(before, 2)
            os.close(before)
            jax.monitoring.unregister_event_listener(listen)
        return bool(taken) and os.fstat(said.fileno()).st_size == 0


def _make_room(folder: Path) -> None:
    with os.scandir(folder) as entries:
        ages = [(entry.stat().st_mtime, entry.path) for entry in entries]
    if len(ages) > _MOST:
        for _, path in sorted(ages)[: len(ages) // 2]:
            Path(path).unlink(missing_ok=True)
