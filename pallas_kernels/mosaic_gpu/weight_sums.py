"""Row sums of weights as the tensor cores take them, rounded to 16 bits: products with ones.

A sum of weights times keys, over such a sum of the same weights, is a mean of the keys however
the weights were rounded; and it costs no instruction an entry.
"""

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.mosaic_gpu import layout, pipeline
from pallas_kernels.mosaic_gpu.kernel_types import Ref, Refs, Scratch
from pallas_kernels.mosaic_gpu.mlir import ROWS
from pallas_kernels.mosaic_gpu.plan import BLOCK, Plan

# The fewest columns that a product may have.
_COLUMNS = 8
# What the sums are added up in.
ACC = plgpu.ACC((ROWS, _COLUMNS), jnp.float32)


def ones(dtype: DTypeLike) -> Float[Array, "8 64"]:
    """Returns the kernel's operand `ones`."""
    return jnp.ones((_COLUMNS, BLOCK), dtype)


def scratch(dtype: DTypeLike) -> Scratch:
    """Returns the types of what holds the ones in SMEM."""
    return {"ones_smem": pipeline.tiled((_COLUMNS, BLOCK), dtype), "ones_full": plgpu.Barrier()}


def fetch(plan: Plan, ref: Refs) -> None:
    """Fetches the ones; before a CTA's first work tile."""
    pipeline.fetching(plan)(
        lambda: plgpu.copy_gmem_to_smem(ref["ones"], ref["ones_smem"], ref["ones_full"])
    )


def wait(ref: Refs) -> None:
    """Waits for the ones."""
    plgpu.barrier_wait(ref["ones_full"])


def add(acc: Ref, weights: Float[Array, "64 64"], ref: Refs, spare: Ref | None) -> None:
    """Issues the product that adds weights of a tile, see `pipeline.multiply`."""
    pipeline.multiply(acc, weights, ref["ones_smem"].T, spare)


def total(acc: Ref, *, interpret: bool) -> Float[Array, "64"]:
    """Returns the sums."""
    # All columns are equal.
    x = layout.lane_sums(acc[...], False, interpret=interpret)
    return layout.finish_sums(x, interpret=interpret) * (1 / _COLUMNS)
