"""Which NVIDIA GPU there is."""

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
