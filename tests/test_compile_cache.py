"""Compiled programs on disk: written, read, limited, mended, and never in the way."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from absl import flags
from jax.experimental.compilation_cache import compilation_cache

from lazyattn import compile_cache
from lazyattn.errors import InputError

_CHANGED = (
    *("jax_enable_compilation_cache", "jax_compilation_cache_dir"),
    *("jax_compilation_cache_max_size", "jax_persistent_cache_min_compile_time_secs"),
    "jax_persistent_cache_min_entry_size_bytes",
    # Programs that profile a step turn it on, and it stays on in a process of tests.
    "jax_compilation_cache_include_metadata_in_key",
)


def _flags(*arguments):
    values = flags.FlagValues()
    compile_cache.define(values)
    values(["program", *arguments])
    return values


@pytest.fixture
def set_up(monkeypatch):
    """Sets up the cache as flags say; afterwards it is that of the tests again."""
    before = {name: getattr(jax.config, name) for name in _CHANGED}
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_include_metadata_in_key", False)
    # As the environment of the tests says, unless JAX was imported before it was set.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

    def call(*arguments):
        said = compile_cache.set_up(_flags(*arguments))
        compilation_cache.reset_cache()
        return said

    yield call
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def _entries(folder):
    return sorted(folder.rglob("*-cache"))


@pytest.fixture
def reads():
    """Counts programs that were read, not compiled."""
    count = []

    def listen(name, **_):
        if name == "/jax/compilation_cache/cache_hits":
            count.append(name)

    jax.monitoring.register_event_listener(listen)
    yield count
    jax.monitoring.unregister_event_listener(listen)


def _compile(number):
    jax.clear_caches()
    return (
        jax.jit(lambda x: jnp.sin(x) * number)
        .lower(jax.ShapeDtypeStruct((3,), jnp.float32))
        .compile()
    )


def test_what_was_compiled_is_read(set_up, tmp_path, reads):
    assert set_up(f"--compile_cache_dir={tmp_path / 'new' / 'folder'}") is None
    _compile(2.5)
    assert len(_entries(tmp_path)) == 1 and not reads
    _compile(2.5)
    assert len(_entries(tmp_path)) == 1 and len(reads) == 1


def test_a_program_cut_short_is_compiled_and_written_again(set_up, tmp_path, reads):
    where = f"--compile_cache_dir={tmp_path}"
    set_up(where)
    _compile(3.5)
    (entry,) = _entries(tmp_path)
    whole = entry.stat().st_size
    # As a kill leaves it: JAX writes the time of an entry last.
    entry.write_bytes(entry.read_bytes()[:100])
    entry.with_name(entry.name.removesuffix("-cache") + "-atime").unlink()
    assert set_up(where) is None
    _compile(3.5)
    assert _entries(tmp_path) == [entry] and entry.stat().st_size >= 0.9 * whole and not reads


def test_the_size_is_limited(set_up, tmp_path):
    set_up(f"--compile_cache_dir={tmp_path}")
    _compile(4.5)
    (first,) = _entries(tmp_path)
    gib = 1.5 * first.stat().st_size / 2**30
    set_up(f"--compile_cache_dir={tmp_path}", f"--compile_cache_gib={gib:.12f}")
    _compile(5.5)
    (second,) = _entries(tmp_path)
    assert second != first


def test_a_folder_that_cannot_be_written_is_one_sentence(set_up, tmp_path):
    (tmp_path / "file").write_text("")
    said = set_up(f"--compile_cache_dir={tmp_path / 'file' / 'folder'}")
    assert re.fullmatch(r"Compiled programs are not kept: '.*file/folder/.*' cannot .*\.", said)
    _compile(6.5)


def test_off(set_up, tmp_path):
    assert set_up("--nocompile_cache", f"--compile_cache_dir={tmp_path}") is None
    _compile(7.5)
    assert not jax.config.jax_enable_compilation_cache and not _entries(tmp_path)


def test_variables_of_jax_hold(set_up, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    assert set_up() is None
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    jax.config.update("jax_enable_compilation_cache", False)
    assert set_up(f"--compile_cache_dir={tmp_path / 'other'}") is None
    assert not (tmp_path / "other").exists()


def test_the_default_is_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LAZYATTN_CACHE", str(tmp_path / "shared"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compile_cache.default_folder() == tmp_path / "lazyattn" / "compiled"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compile_cache.default_folder() == tmp_path / ".cache" / "lazyattn" / "compiled"


@pytest.mark.parametrize("gib", ["0", "-1"])
def test_a_size_that_is_none_is_refused(set_up, gib):
    with pytest.raises(InputError, match=r"--compile_cache_gib is .*, but it must be positive"):
        set_up(f"--compile_cache_gib={gib}")


@dataclasses.dataclass
class _Device:
    process_index: int


@pytest.mark.parametrize(
    ("processes", "told", "found"),
    [
        ((0, 0), None, True),  # of this process alone: nobody is asked
        ((0, 1), ["found", "found"], True),
        ((0, 1), ["found", ""], False),
        ((0, 2), None, False),  # process 1 is not asked, so nobody reads
    ],
)
def test_processes_read_a_program_together(monkeypatch, processes, told, found):
    asked = []
    monkeypatch.setattr(jax, "process_count", lambda: max(processes) + 1)
    monkeypatch.setattr(compile_cache, "tell_all", lambda *what: asked.append(what) or told)
    read = compile_cache._read_by_all(lambda *_: ("program", 3))
    devices = [_Device(process) for process in processes]
    result = read("jit_step", "key", None, None, devices, ())
    assert result == (("program", 3) if found else (None, None))
    assert len(asked) == (told is not None)
