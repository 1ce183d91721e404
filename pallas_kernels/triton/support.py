"""What these kernels can do, decided without importing Triton."""

import importlib.metadata
import importlib.util

from jax.typing import DTypeLike

from pallas_kernels import target
from pallas_kernels.gpu import compute_capability
from pallas_kernels.problem import Problem

MAX_HEAD_DIM = 256


def unsupported(problem: Problem, batch: int) -> str | None:
    """Returns why a call can't be done, as the end of "... since ..."; None: it can."""
    del batch
    return refusal(problem.head_dim, problem.value_dim, problem.dtype)


def refusal(head_dim: int, value_dim: int, dtype: DTypeLike) -> str | None:
    """Returns why kernels can't do these sizes here, like `unsupported`."""
    capability = compute_capability()
    if capability is None:
        return f"it needs an NVIDIA GPU and JAX runs on {target.platform()!r}"
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


def refuses_in_place() -> str | None:
    """Returns why kernels can't write to their inputs here, like `unsupported`."""
    version = importlib.metadata.version("jax-triton")
    if tuple(map(int, version.split(".")[:2])) < (0, 4):
        return f"jax-triton is {version}, below 0.4, whose kernels can't write to their inputs"
    return None
