"""What these kernels can do."""

from pallas_kernels import target
from pallas_kernels.gpu import compute_capability
from pallas_kernels.mosaic_gpu import config
from pallas_kernels.problem import Problem

MAX_HEAD_DIM = 256


def unsupported(problem: Problem, batch: int) -> str | None:
    """Returns why a call can't be done, as the end of "... since ..."; None: it can."""
    del batch
    capability = compute_capability()
    if capability is None:
        return f"it needs an NVIDIA Hopper GPU and JAX runs on {target.platform()!r}"
    if capability != 90:
        return f"the GPU's compute capability is {capability / 10}, not 9.0"
    if problem.head_dim > MAX_HEAD_DIM:
        return f"head_dim is {problem.head_dim}, above {MAX_HEAD_DIM}"
    if problem.value_dim != problem.head_dim:
        return f"value_dim is {problem.value_dim} and head_dim {problem.head_dim}"
    if problem.dtype not in ("bfloat16", "float16"):
        return f"inputs are {problem.dtype}, not bfloat16 or float16"
    widest = config.widest_table(config.padded_head_dim(problem.head_dim))
    if problem.width > widest:
        return f"distance_bias has width {problem.width}, above {widest}"
    return None
