"""What these kernels can do, decided without importing Triton."""

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import jax

MAX_HEAD_DIM = 256

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


def unsupported(head_dim: int, value_dim: int, dtype: Any) -> str | None:
    """Returns why a call can't be done, as the end of "... since ..."; None: it can."""
    capability = compute_capability()
    if capability is None:
        return f"it needs an NVIDIA GPU and JAX runs on {jax.default_backend()!r}"
    if capability < 80:
        return f"the GPU's compute capability is {capability / 10}, below 8.0"
    for package in ("triton", "jax_triton"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package!r} is not installed"
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim is {head_dim}, above {MAX_HEAD_DIM}"
    if value_dim != head_dim:
        return f"value_dim is {value_dim} and head_dim {head_dim}"
    if str(dtype) == "float64":
        return "inputs are float64"
    return None
