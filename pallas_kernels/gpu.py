"""Which NVIDIA GPU there is."""

import importlib

import jax

from pallas_kernels import target


def compute_capability() -> int | None:
    """Returns the compute capability of the NVIDIA GPU in use, e.g. 90; None: none."""
    named = target.named()
    if named is not None:
        return named.capability
    device = jax.local_devices()[0]
    capability = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or not str(capability).replace(".", "").isdigit():
        return None
    major, minor = str(capability).split(".")
    return 10 * int(major) + int(minor)


def import_runtime() -> None:
    """Imports what compiled programs need, as whoever traces one does.

    A program that is read from disk is linked with Mosaic's runtime. Where that lies JAX tells it
    by a variable of the environment, when Mosaic is imported.
    """
    importlib.import_module("jax.experimental.pallas.mosaic_gpu")
