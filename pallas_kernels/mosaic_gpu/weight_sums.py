"""Row sums of weights as the tensor cores take them, rounded to 16 bits: products with ones.

A sum of weights times keys, over such a sum of the same weights, is a mean of the keys however
the weights were rounded; and it costs no instruction an entry.
"""

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.mosaic_gpu import layout, pipeline
from pallas_kernels.mosaic_gpu.mlir import ROWS
from pallas_kernels.mosaic_gpu.plan import UNIT, Plan

# The fewest columns that a product may have.
_COLUMNS = 8
# What the sums are added up in.
ACC = plgpu.ACC((ROWS, _COLUMNS), jnp.float32)


def ones(dtype: Any) -> Float[Array, "8 64"]:
    """Returns the kernel's operand `ones`."""
    return jnp.ones((_COLUMNS, UNIT), dtype)


def scratch(dtype: Any) -> dict[str, Any]:
    """Returns the types of what holds the ones in SMEM."""
    return {"ones_smem": pipeline.tiled((_COLUMNS, UNIT), dtype), "ones_full": plgpu.Barrier()}


def prepare(plan: Plan, ref: dict[str, Any], fetches: bool) -> None:
    """Fetches the ones, or waits for them; before a block's first work tile."""
    if fetches:
        pipeline.fetching(plan)(
            lambda: plgpu.copy_gmem_to_smem(ref["ones"], ref["ones_smem"], ref["ones_full"])
        )
    else:
        plgpu.barrier_wait(ref["ones_full"])


def add(acc: Any, weights: Float[Array, "64 64"], ref: dict[str, Any], spare: Any) -> None:
    """Issues the product that adds weights of a tile, see `pipeline.multiply`."""
    pipeline.multiply(acc, weights, ref["ones_smem"].T, spare)


def total(acc: Any, *, interpret: bool) -> Float[Array, "64"]:
    """Returns the sums."""
    # All columns are equal.
    x = layout.lane_sums(acc[...], False, interpret=interpret)
    return layout.finish_sums(x, interpret=interpret) * (1 / _COLUMNS)
