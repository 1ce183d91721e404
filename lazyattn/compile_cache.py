"""Compiled programs on disk, so that a restart does not compile again.

It is JAX's persistent compilation cache, in a folder of the user and of the kind of processor: a
program for CPUs must not be read where instructions are missing. JAX tells programs apart by all
that goes into them, XLA's flags and the versions of JAX and of the device's library. It reads and
writes; what is added here:

- Entries that a kill left half written are removed. JAX would read them in vain for ever.
- Of several processes each writes, not the first alone, since hosts may have folders of their own.
- Of several processes all read a program or all compile it. On GPUs they share out the trials by
  which XLA chooses kernels, and one that compiles alone would wait for the others.

JAX has no public name for what reads and writes, nor for the process's number that it writes by:
the last two are changes to `jax._src`, made only where there are several processes.
"""

import functools
import hashlib
import os
import platform
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import jax
from absl import flags
from jax._src import compiler
from jax._src import distributed as jax_distributed

from lazyattn import buckets, paths
from lazyattn.distributed import joined, tell_all
from lazyattn.errors import require

_GIB = 2**30
_PATIENCE = 10.0  # seconds that JAX waits for the folder's lock, too
_used: list[str | None] = [None]  # the folder that was set up here, last
# Compiling less long than this costs less than a file.
_LEAST_SECONDS = 0.2


def define(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags."""
    modes = "train, check, eval, inspect, sample, export"
    flags.DEFINE_bool(
        "compile_cache",
        True,
        f"{modes}: keep compiled programs on disk, so that a restart does not compile again.",
        flag_values=values,
    )
    paths.define(
        "compile_cache_dir",
        None,
        f"{modes}: folder for compiled programs; default: JAX_COMPILATION_CACHE_DIR or the user's"
        " cache.",
        values,
        buckets=True,
    )
    flags.DEFINE_float(
        "compile_cache_gib",
        4.0,
        f"{modes}: GiB of compiled programs to keep; what was used longest ago goes first.",
        flag_values=values,
    )


def set_up(values: flags.FlagValues = flags.FLAGS) -> str | None:
    """Has JAX keep what it compiles, as the flags say; before anything is compiled.

    JAX's own settings count where they are given: JAX_COMPILATION_CACHE_DIR names a folder for
    which the flags of the size do not hold, JAX_ENABLE_COMPILATION_CACHE=0 is off.

    Returns:
      A sentence, if there can be no cache though one is asked for.

    Raises:
      InputError: for a size that is not positive, or a folder that is a URL; one in a bucket
        must be one that can be written to.
    """
    size = values.compile_cache_gib
    require(size > 0, "--compile_cache_gib", size, "positive, or give --nocompile_cache")
    if not values.compile_cache:
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    if not jax.config.jax_enable_compilation_cache:
        return None
    if joined():
        _together()
    named = values.compile_cache_dir
    if named is None and jax.config.jax_compilation_cache_dir:
        return None
    base = default_folder() if named is None else paths.folder("--compile_cache_dir", named)
    folder = (base if buckets.is_bucket(base) else base.absolute()) / _processor()
    limit = round(size * _GIB)
    if buckets.is_bucket(folder):
        buckets.check_writable("--compile_cache_dir", folder)
        limit = -1  # none: JAX would need a lock, which buckets don't have
    else:
        try:
            prepare(folder)
        except (OSError, NotImplementedError, filelock.Timeout) as error:
            why = getattr(error, "strerror", None) or error
            return f"Compiled programs are not kept: {str(folder)!r} cannot be written to ({why})."
    use(folder, limit)
    return None


def use(folder: Path, limit: int) -> None:
    """Has JAX keep what it compiles in a folder.

    Args:
      folder: it exists.
      limit: bytes; -1: there is none.
    """
    _used.append(str(folder))
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", limit)
    for name, value in (
        ("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS),
        ("jax_persistent_cache_min_entry_size_bytes", -1),
    ):
        if name.upper() not in os.environ:
            jax.config.update(name, value)


def steps_folder() -> Path | None:
    """Returns where whole training steps are kept; None: nowhere, as in a bucket."""
    folder = jax.config.jax_compilation_cache_dir
    ours = jax.config.jax_enable_compilation_cache and folder and folder == _used[-1]
    return Path(folder) / "steps" if ours and not buckets.is_bucket(folder) else None


def default_folder() -> Path:
    """Returns where compiled programs lie unless told otherwise.

    It is never that of LAZYATTN_CACHE, which several users may share: who writes there would
    decide what the others run.

    Raises:
      InputError: if XDG_CACHE_HOME is a URL.
    """
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return paths.local_path("XDG_CACHE_HOME", shared) / "lazyattn" / "compiled"
    return Path.home() / ".cache" / "lazyattn" / "compiled"


def _processor() -> str:
    """Returns a name of this kind of processor."""
    kind = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        kind += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        pass
    return hashlib.sha256(kind.encode()).hexdigest()[:12]


def prepare(folder: Path) -> None:
    """Makes the folder, and removes entries that a kill or a full disk left half written.

    Args:
      folder: of JAX's cache with a limit of size.

    Raises:
      OSError: if it can't be written to.
      filelock.Timeout: if another process has its lock all the time.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # JAX writes an entry and then its time, all under this lock.
    with filelock.FileLock(folder / ".lockfile").acquire(timeout=_PATIENCE):
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"\0")
        probe.unlink()
        for entry in folder.glob("*-cache"):
            if not entry.with_name(entry.name.removesuffix("-cache") + "-atime").exists():
                entry.unlink(missing_ok=True)


def _processes(devices: Any) -> set[int]:
    return {device.process_index for device in devices}


@functools.cache
def _together() -> None:
    """Changes how JAX reads and writes the cache where there are several processes."""
    read, write = compiler._cache_read, compiler._cache_write
    compiler._cache_read = _read_by_all(read)
    compiler._cache_write = _write_on_each(write)


def _read_by_all(read: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a `read` that finds a program of several processes only if all of them do."""
    counts: Counter[str] = Counter()

    def read_by_all(
        module_name: str, key: str, options: Any, backend: Any, devices: Any, callbacks: Any
    ) -> tuple[Any, int | None]:
        found = read(module_name, key, options, backend, devices, callbacks)
        processes = len(_processes(devices))
        if processes == 1:
            return found
        if processes < jax.process_count():
            return None, None
        counts[module_name] += 1
        has = "" if found[0] is None else "found"
        told = tell_all(f"compiled/{module_name}/{counts[module_name]}", has)
        return found if all(told) else (None, None)

    return read_by_all


def _write_on_each(write: Callable[..., None]) -> Callable[..., None]:
    """Returns a `write` that does not leave it to the first process."""

    def write_on_each(*arguments: Any) -> None:
        state = jax_distributed.global_state
        process, state.process_id = state.process_id, 0
        try:
            write(*arguments)
        finally:
            state.process_id = process

    return write_on_each
