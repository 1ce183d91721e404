"""Which NVIDIA GPU there is."""

import contextlib
from collections.abc import Iterator

import jax

_pretended: int | None = None


@contextlib.contextmanager
def pretend_capability(capability: int) -> Iterator[None]:
    """Takes the GPU to be of this compute capability, to lower for it without one."""
    global _pretended
    before, _pretended = _pretended, capability
    try:
        yield
    finally:
        _pretended = before


def compute_capability() -> int | None:
    """Returns the compute capability of the NVIDIA GPU in use, e.g. 90; None: none."""
    if _pretended is not None:
        return _pretended
    device = jax.local_devices()[0]
    capability = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or not str(capability).replace(".", "").isdigit():
        return None
    major, minor = str(capability).split(".")
    return 10 * int(major) + int(minor)
