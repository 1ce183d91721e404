"""Settings of every test."""

import gc
import hashlib
import os
import platform
import shutil
from pathlib import Path

import pytest

# A compiled function takes a second or two, and many tests compile the same one: what one
# compiled, the others read, workers and the commands that tests start included. A function
# is looked up by its whole program, XLA's flags and the version of JAX, so that changed code
# is compiled anew. `JAX_ENABLE_COMPILATION_CACHE=0` leaves the cache out.
_MOST_BYTES = 2**30

# XLA's newer emitters of fused loops for CPUs make their code with MLIR. That is two thirds of
# what compiling a small function takes without optimizations; the older emitters are still there.
_OLDER_EMITTERS = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"


def _folder() -> Path:
    """Returns the cache's folder, one for each kind of processor."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    processor = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        pass
    key = hashlib.sha256(processor.encode()).hexdigest()[:12]
    return Path(base) / "lazyattn" / "compiled_tests" / key


def _is_running(mark: Path) -> bool:
    try:
        os.kill(int(mark.name.removeprefix("running-")), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, ValueError):
        pass
    return True


def _prepare(folder: Path) -> Path:
    """Makes the folder; empties one that is large or was in use when a run was killed."""
    marks = list(folder.glob("running-*"))
    alive = [mark for mark in marks if _is_running(mark)]
    size = sum(path.stat().st_size for path in folder.glob("*-cache"))
    if not alive and (marks or size > _MOST_BYTES):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / f"running-{os.getpid()}"
    mark.touch()
    return mark


def pytest_configure(config: pytest.Config) -> None:
    """Sets XLA's flags and the cache in the environment, before anything imports JAX."""
    if config.option.markexpr != "gpu":
        flags = os.environ.get("XLA_FLAGS", "")
        if _OLDER_EMITTERS not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} {_OLDER_EMITTERS}".strip()
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    # Without a folder of theirs, commands would use that of the user.
    if config.option.markexpr == "gpu":
        os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "0")
        return
    folder = _folder()
    try:
        config.stash[_MARK] = _prepare(folder)
    except OSError:
        os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "0")
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


_MARK = pytest.StashKey[Path]()


def pytest_collection_finish() -> None:
    """Lets the garbage collector pass over what imports made: a tenth of what tests take."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Says that no one is writing anymore."""
    gc.unfreeze()
    if mark := config.stash.get(_MARK, None):
        mark.unlink(missing_ok=True)


@pytest.fixture(autouse=True, scope="session")
def quick_compilation():
    """Small arrays run for microseconds and compile for seconds: leave optimising out.

    Tests of memory and of whole commands run in processes of their own, without this.
    """
    import jax

    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def data_folder():
    """Folder of data that is not part of the project, or None."""
    path = os.environ.get("LAZYATTN_TEST_DATA")
    return Path(path) if path and Path(path).is_dir() else None
