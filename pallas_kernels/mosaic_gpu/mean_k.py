"""The mean of the keys, weighted by the softmax, which the forward pass leaves for dQ's kernel.

    Y_i = sum_j P_ij k_j      dQ_i = scale (sum_j P_ij m_ij dP_ij k_j - delta_i Y_i)

With it, dQ's kernel needs neither delta before its end nor any dead tile. Beside it there is
what the gradient of the bias's tail takes of dead tiles: sums over those past the table.
"""

from typing import TYPE_CHECKING

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.mosaic_gpu import bias_table, layout, memory, pipeline, weight_sums
from pallas_kernels.mosaic_gpu.bias_table import TileKind
from pallas_kernels.mosaic_gpu.kernel_types import Ref, Scalar
from pallas_kernels.mosaic_gpu.plan import BLOCK, reachable

if TYPE_CHECKING:  # It imports this.
    from pallas_kernels.mosaic_gpu import forward

# The left half of its columns and the right one: each is as large as an array of queries, so
# that the gradients, which come later, can have their memory.
NAMES = ("mean_k_left", "mean_k_right")
# Weights of `find` are computed 2^10 times as large, for float16 has no small numbers.
_SHIFT = 10


def outputs(head_dim: int, of_blocks: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the types of both halves, for a shape [batch, heads, blocks]."""
    half = (*of_blocks, *memory.registers_shape(head_dim // 2))
    return dict.fromkeys(NAMES, jax.ShapeDtypeStruct(half, jnp.float32))


def add(work_tile: "forward.WorkTile", accs: tuple[Ref, ...], weights: Array, slot: Scalar) -> None:
    """Issues the products of weights with the keys in a slot, and with ones.

    All weights of a row may be times any one factor. `accs` are of sums of keys, and of weights.
    """
    weights = layout.pack(
        weights, work_tile.kernel.dtype, relu=False, interpret=work_tile.interpret
    )
    spare = work_tile.spare()
    pipeline.multiply(accs[0], weights, work_tile.ref["key_smem"].at[slot], spare)
    weight_sums.add(accs[1], weights, work_tile.ref, spare)


def no_past(work_tile: "forward.WorkTile") -> tuple[Array, ...]:
    """Returns sums over tiles past the table before the first, or () if none are wanted."""
    return (work_tile.per_row(0.0),) * 2 if work_tile.kernel.want_tail else ()


def add_past(
    work_tile: "forward.WorkTile",
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


def store(work_tile: "forward.WorkTile", accs: tuple[Ref, ...], past: tuple[Array, ...]) -> None:
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


def find(work_tile: "forward.WorkTile", lse: Array) -> None:
    """Finds and stores the mean in a sweep of its own.

    For sums with a running maximum, and for float16, which takes no large exponentials.
    """
    lse = reachable(lse)
    again = (work_tile.keys, work_tile.total_steps)
    pipeline.skip(work_tile.end, work_tile.total_steps, (work_tile.keys, 0))
    pipeline.skip(0, work_tile.begin, again)

    def run(*accs):
        def step(kind, n, slots, wait, past):
            (slot,) = slots
            x, rest, key0 = work_tile.scores(kind, n, slot, wait, keep=True)
            x = work_tile.hide_segments(x, key0, kind)
            p = jnp.exp2(x - work_tile.spread(lse - (rest + _SHIFT)))
            add(work_tile, accs, p, slot)
            past = add_past(work_tile, past, p, key0, kind)
            plgpu.wgmma_wait(0)
            work_tile.keys.consumer_release_slot(slot)
            return past

        past = no_past(work_tile)
        past = work_tile.steps(work_tile.end, step, past, again, by_distance=False)
        store(work_tile, accs, past)

    pl.run_scoped(run, work_tile.kernel.sums, weight_sums.ACC)
