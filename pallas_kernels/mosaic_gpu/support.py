"""What these kernels can do."""

from jax.typing import DTypeLike

from pallas_kernels import target
from pallas_kernels.gpu import compute_capability
from pallas_kernels.mosaic_gpu import config

MAX_HEAD_DIM = 256


def unsupported(
    head_dim: int, value_dim: int, dtype: DTypeLike, length: int, width: int
) -> str | None:
    """Returns why a call can't be done, as the end of "... since ..."; None: it can.

    Args:
      head_dim: of queries and keys.
      value_dim: of values.
      dtype: of all of them.
      length: of the sequence.
      width: of the bias table; 0: no bias.
    """
    capability = compute_capability()
    if capability is None:
        return f"it needs an NVIDIA Hopper GPU and JAX runs on {target.platform()!r}"
    if capability != 90:
        return f"the GPU's compute capability is {capability / 10}, not 9.0"
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim is {head_dim}, above {MAX_HEAD_DIM}"
    if value_dim != head_dim:
        return f"value_dim is {value_dim} and head_dim {head_dim}"
    if str(dtype) not in ("bfloat16", "float16"):
        return f"inputs are {dtype}, not bfloat16 or float16"
    widest = config.widest_table(config.padded_head_dim(head_dim))
    if min(width, length) > widest:
        return f"distance_bias has width {width}, above {widest}"
    return None
