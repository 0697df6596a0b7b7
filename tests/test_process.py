"""What a command's own process keeps for the next one, and how it ends."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import checkpoints
import jax
import pytest
from interruptions import write_models

from m3jax.commands import process


@pytest.fixture(scope="module")
def merge(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


def environment(cache: Path, **more: str) -> dict[str, str]:
    """With a cache folder of its own, in an environment that says nothing about it."""
    names = ("M3JAX_CACHE", "JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return {**kept, "XDG_CACHE_HOME": str(cache), **more}


def m3jax(*arguments: object, env: dict[str, str], **more):
    return subprocess.run(
        [sys.executable, "-m", "m3jax", *map(str, arguments)],
        **{"capture_output": True, "text": True, "check": False, "env": env, **more},
    )


def programs_in(cache: Path) -> set[str]:
    return {path.name for path in cache.rglob("*-cache")}


class TestPrograms:
    def test_the_next_command_takes_them(self, merge, tmp_path):
        """Nothing is compiled again, nothing more is said, the bytes are the same."""
        env, found = environment(tmp_path / "cache"), []
        for name in ("first", "second"):
            done = m3jax(*merge.arguments(tmp_path / name, []), env=env)
            assert done.returncode == 0, done.stderr
            lines = done.stderr.splitlines()
            assert all(line.startswith("m3jax: merging") for line in lines), lines
            found.append(programs_in(tmp_path / "cache"))
        assert found[0] == found[1]
        assert any(name.startswith("jit_merge") for name in found[0])
        off = {**env, "M3JAX_CACHE": "off"}
        assert m3jax(*merge.arguments(tmp_path / "third", []), env=off).returncode == 0
        first, *others = (
            checkpoints.digest(tmp_path / name) for name in ("first", "second", "third")
        )
        assert others == [first, first]

    @pytest.mark.parametrize(
        "more",
        [
            {"M3JAX_CACHE": "off"},
            {"JAX_ENABLE_COMPILATION_CACHE": "false"},
            {"JAX_COMPILATION_CACHE_DIR": "theirs"},
        ],
    )
    def test_the_environment_decides(self, more, tmp_path):
        if "JAX_COMPILATION_CACHE_DIR" in more:
            more = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "theirs")}
        done = keep(environment(tmp_path / "cache", **more))
        assert done.stdout.split() == [str(more.get("JAX_COMPILATION_CACHE_DIR"))]
        assert not (tmp_path / "cache").exists()

    def test_a_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").touch()
        assert keep(environment(tmp_path / "file")).stdout.split() == ["None"]

    def test_a_folder_that_others_may_write_to(self, tmp_path):
        """They could have their programs run."""
        env = environment(tmp_path / "cache")
        (kept,) = keep(env).stdout.split()
        assert Path(kept).is_relative_to(tmp_path / "cache")
        assert (Path(kept) / "proven").exists()
        assert not Path(kept).stat().st_mode & 0o077
        Path(kept).chmod(0o777)
        assert keep(env).stdout.split() == ["None"]

    @pytest.mark.parametrize(
        "how",
        [
            "lambda loaded: loaded and (os.write(2, b'E machine feature'), loaded)[1]",
            "lambda loaded: None",
        ],
        ids=["with a warning", "not at all"],
    )
    def test_a_machine_on_which_they_do_not_come_back(self, how, tmp_path):
        prepare = f"""
            import os
            from jax._src import compilation_cache as jax_cache
            real, how = jax_cache.get_executable_and_time, {how}

            def load(*arguments, **named):
                found = real(*arguments, **named)
                return (None, None) if how(found[0]) is None else found

            jax_cache.get_executable_and_time = load
        """
        env = environment(tmp_path / "cache")
        assert keep(env, prepare).stdout.split() == ["None"]
        assert [path.name for path in (tmp_path / "cache").rglob("unfit")] == ["unfit"]
        assert keep(env).stdout.split() == ["None"]  # it is not tried again

    def test_without_a_cpu_to_try_it_on(self, tmp_path):
        prepare = """
            import jax
            def local_devices(**asked):
                raise RuntimeError("Unknown backend cpu")
            jax.local_devices = local_devices
        """
        env = environment(tmp_path / "cache")
        assert keep(env, prepare).stdout.split() == ["None"]
        assert not list((tmp_path / "cache").rglob("unfit"))  # another time, perhaps

    def test_there_are_never_too_many(self, tmp_path, monkeypatch):
        monkeypatch.setattr(process, "_MOST", 10)
        for number in range(11):
            path = tmp_path / f"{number}-cache"
            path.touch()
            os.utime(path, (number, number))
        process._make_room(tmp_path)
        kept = {path.name for path in tmp_path.iterdir()}
        assert kept == {f"{number}-cache" for number in range(5, 11)}

    def test_not_in_a_program_that_calls_a_command(self, merge, run, tmp_path):
        before = jax.config.jax_compilation_cache_dir  # conftest's
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("M3JAX_CACHE")
            patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
            assert run(*merge.arguments(tmp_path / "merged", [])).code == 0
        assert jax.config.jax_compilation_cache_dir == before
        assert not (tmp_path / "cache").exists()


def keep(env: dict[str, str], prepare: str = ""):
    """Keeps programs in a process of its own, which says where."""
    script = """
        from m3jax.commands import process
        process.begin()
        process.keep_programs()
        import jax
        print(jax.config.jax_compilation_cache_dir)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(prepare) + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
        env=env,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done


class TestEnd:
    """A merge that is done ends at once, and all that it said is there."""

    def test_its_output_is_whole(self, merge, tmp_path):
        done = m3jax(*merge.arguments(tmp_path / "merged", []), env=dict(os.environ))
        assert done.returncode == 0
        assert done.stdout.splitlines()[-1].split() == [
            "output",
            str(tmp_path / "merged"),
        ]

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has /dev/full")
    def test_where_nothing_can_be_said(self, merge, tmp_path):
        with Path("/dev/full").open("w") as full:
            done = m3jax(
                *merge.arguments(tmp_path / "merged", []),
                env=dict(os.environ),
                capture_output=False,
                stdout=full,
                stderr=subprocess.PIPE,
            )
        assert done.returncode == 4
        assert "No space left on device" in done.stderr.splitlines()[-1]

    def test_errors_have_their_codes(self, merge, tmp_path):
        arguments = merge.arguments(tmp_path / "merged", [])
        arguments[1] = "--base=nowhere"
        assert m3jax(*arguments, env=dict(os.environ)).returncode == 3

    def test_a_profiler_has_its_say(self, tmp_path):
        script = """
            import sys
            from m3jax.commands import process
            sys.setprofile(lambda *event: None)
            process.leave_at_once()
            print(process.end(0))
        """
        command = [sys.executable, "-c", textwrap.dedent(script)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["0"]


def test_as_many_files_as_may_be():
    """Models come in hundreds of shards; shells allow 1024 files, and more if asked."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
        process.open_many_files()
        now = resource.getrlimit(resource.RLIMIT_NOFILE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    most = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    assert now == (most, hard)
