"""The mean of the keys, weighted by the softmax, which the forward pass leaves for dQ's kernel.

    Y_i = sum_j P_ij k_j      dQ_i = scale (sum_j P_ij m_ij dP_ij k_j - delta_i Y_i)

With it, dQ's kernel needs neither delta before its end nor any dead tile. Beside it there is
what the gradient of the bias's tail takes of dead tiles: sums over those past the table.
"""

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.mosaic_gpu import bias_table, launch, layout, memory, pipeline, weight_sums
from pallas_kernels.mosaic_gpu.bias_table import TileKind
from pallas_kernels.mosaic_gpu.kernel_types import Ref, Scalar
from pallas_kernels.mosaic_gpu.plan import BLOCK

# The left half of its columns and the right one: each is as large as an array of queries, so
# that the gradients, which come later, can have their memory.
NAMES = ("mean_k_left", "mean_k_right")


def outputs(head_dim: int, of_blocks: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the types of both halves, for a shape [batch, heads, blocks]."""
    half = (*of_blocks, *memory.registers_shape(head_dim // 2))
    return dict.fromkeys(NAMES, jax.ShapeDtypeStruct(half, jnp.float32))


def add(work_tile: launch.WorkTile, accs: tuple[Ref, ...], weights: Array, slot: Scalar) -> None:
    """Issues the products of weights with the keys in a slot, and with ones.

    All weights of a row may be times any one factor. `accs` are of sums of keys, and of weights.
    """
    weights = layout.pack(
        weights, work_tile.kernel.dtype, relu=False, interpret=work_tile.interpret
    )
    spare = work_tile.spare()
    pipeline.multiply(accs[0], weights, work_tile.ref["key_smem"].at[slot], spare)
    weight_sums.add(accs[1], weights, work_tile.ref, spare)


def add_past(
    work_tile: launch.WorkTile,
    past: tuple[Array, ...],
    weights: Array,
    key0: Scalar,
    kind: TileKind,
) -> tuple[Array, ...]:
    """Adds weights of a tile to these sums, see `bias_table.add_tail_sums`."""
    if not past:
        return past
    tile_distance = work_tile.query0 - key0
    return bias_table.add_tail_sums(
        work_tile.plan, past, weights, tile_distance, kind, interpret=work_tile.interpret
    )


def store(work_tile: launch.WorkTile, accs: tuple[Ref, ...], past: tuple[Array, ...]) -> None:
    """Stores the mean of the keys, and what is past the table, of sums not divided yet."""
    ref, b, h = work_tile.ref, work_tile.batch, work_tile.head
    block = lax.div(work_tile.query0, jnp.int32(BLOCK))
    sums = accs[0][...]
    total = weight_sums.total(accs[1], interpret=work_tile.interpret)
    # Where a row has no mass, nor has its mean.
    factor = jnp.where(total == 0, 0.0, 1 / total)

    @pl.when(work_tile.exists)
    def _():
        mean = sums * lax.broadcast_in_dim(factor, sums.shape, [0])
        targets = [ref[name].at[b, h, block] for name in NAMES]
        memory.store_registers(mean, targets, interpret=work_tile.interpret)
        for n, x in enumerate(past):
            whole = layout.finish_sums(x, interpret=work_tile.interpret)
            ref["past"][b, h, block, n] = whole * factor
