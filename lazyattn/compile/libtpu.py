"""Where the TPU compiler is, and how it is made to work without a TPU."""

import importlib.util
import os
from pathlib import Path

from lazyattn.errors import InputError
from lazyattn.paths import local_path

# Where `make test-tpu` puts it: out of the environment, since with it installed JAX
# would look for TPUs in every process.
FOLDER = Path(__file__).resolve().parents[2] / "build" / "libtpu"


def library() -> Path | None:
    """Returns where libtpu is: as named, as `make` puts it, or as pip does; None: nowhere."""
    named = os.environ.get("TPU_LIBRARY_PATH")
    if named:
        return local_path("TPU_LIBRARY_PATH", named)
    spec = importlib.util.find_spec("libtpu")
    installed = spec.submodule_search_locations if spec is not None else None
    for folder in (FOLDER / "libtpu", *(installed or ())):
        path = Path(folder) / "libtpu.so"
        if path.exists():
            return path
    return None


def prepare() -> None:
    """Sets the environment so that JAX compiles for TPUs, before it looks for any.

    Raises:
      InputError: if there is no libtpu.
    """
    found = library()
    if found is None:
        raise InputError(
            "--mode=compile needs libtpu, the TPU compiler, which is not here: `make libtpu` gets"
            " it, or set TPU_LIBRARY_PATH to a libtpu.so."
        )
    os.environ |= {
        "TPU_LIBRARY_PATH": str(found),
        "TPU_SKIP_MDS_QUERY": "1",
        # Nothing here uses a device, so that several processes may compile at once.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
