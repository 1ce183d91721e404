"""What the backward pass knows of each query, and writes down for the kernels that follow.

Without an offset delta_i = sum_j P_ij dP_ij = dO_i . O_i. dQ's kernel begins each work tile with
it: dO is there in any case, and the output is fetched while the work tile before is in work. With
an offset it knows delta at the end.
"""

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.mosaic_gpu import layout, memory
from pallas_kernels.mosaic_gpu.kernel_types import Ref, Scalar
from pallas_kernels.mosaic_gpu.mlir import TILE
from pallas_kernels.mosaic_gpu.plan import BLOCK, UNREACHABLE, Plan, RowStat, threshold

if TYPE_CHECKING:  # It imports this.
    from pallas_kernels.mosaic_gpu import backward_dq


# What delta is found from without an offset, in the order it is fetched in.
_OUTPUTS = ("out", "rounding")


def outputs(plan: Plan, of_blocks: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the types of `rows`, and with an offset of what each query adds to its gradient."""
    kinds = 4 if plan.packed else 3
    types = {"rows": jax.ShapeDtypeStruct((*of_blocks, kinds, BLOCK), jnp.float32)}
    if plan.has_offset:
        types["of_offset"] = jax.ShapeDtypeStruct((*of_blocks, BLOCK), jnp.float32)
    return types


def fetch(work_tile: "backward_dq.WorkTile") -> None:
    """Fetches the output for a work tile; in the warp that fetches."""
    outs = work_tile.outs
    for number, name in enumerate(_OUTPUTS):
        slot = outs.producer_acquire(number)
        for n in range(work_tile.tuning.warpgroups):
            rows = work_tile.own_rows(n)
            source = work_tile.ref[name].at[work_tile.batch, rows, work_tile.head]
            target = work_tile.ref["out_smem"].at[slot, n]
            plgpu.copy_gmem_to_smem(source, target, outs.full.at[slot])


def prefetch(work_tile: "backward_dq.WorkTile") -> None:
    """Brings what `find` loads of the rows into the first cache; in all that fetch."""
    ref, plan = work_tile.ref, work_tile.plan
    rows = work_tile.tuning.rows
    found = [ref["lse"].at[work_tile.batch, work_tile.head]]
    if plan.has_offset:
        found.append(ref["offset_scale"].at[work_tile.batch])
    if plan.packed:
        found.append(ref["segment_start"].at[work_tile.batch])
    for x in found:
        memory.prefetch(x, work_tile.block0 * BLOCK, rows, interpret=work_tile.interpret)


class RowStats(NamedTuple):
    """Row vectors of 64 queries, see `RowStat`.

    Attributes:
      lse: of the scores.
      delta: see above; None with an offset.
      threshold: None without an offset, like the next.
      offset_scale: factor of tau.
      segment_start: first key in sight; None unless rows hold several documents.
      last_segment_start: the last query's; None where `segment_start` is.
    """

    lse: Array
    delta: Array | None
    threshold: Array | None
    offset_scale: Array | None
    segment_start: Array | None
    last_segment_start: Array | None


def find(work_tile: "backward_dq.WorkTile", block: Scalar) -> RowStats:
    """Returns the statistics of a block of queries, once the CTA's own operands have arrived."""
    ref, plan, interpret = work_tile.ref, work_tile.plan, work_tile.interpret
    b, h = work_tile.batch, work_tile.head

    def row(x: Ref) -> Array:
        return work_tile.load_row(x.at[pl.ds(block * BLOCK, BLOCK)])

    lse = row(ref["lse"].at[b, h])
    # Rows without mass, whose output is NaN, have no part in any gradient.
    massless = lse == UNREACHABLE
    segment_start = last_segment_start = None
    if plan.packed:
        segment_start = row(ref["segment_start"].at[b])
        # Documents and windows begin later and later: the last query's masks the most.
        last_segment_start = ref["segment_start"][b, block * BLOCK + BLOCK - 1]
    if plan.has_offset:
        offset_scale = row(ref["offset_scale"].at[b])
        limit = jnp.where(massless, UNREACHABLE, threshold(ref["offset"][h], offset_scale))
        return RowStats(lse, None, limit, offset_scale, segment_start, last_segment_start)

    def tile(x: Ref) -> Array:
        x = x[...] if interpret else plgpu.load(x, layout=TILE, optimized=False)
        return x.astype(jnp.float32)

    d_out = tile(ref["d_out_smem"].at[work_tile.warpgroup])

    def dot(number: int) -> Array:
        slot = work_tile.outs.consumer_wait(number)
        x = tile(ref["out_smem"].at[slot, work_tile.warpgroup])
        product = layout.lane_sums(d_out * x, False, interpret=interpret)
        work_tile.outs.consumer_release(number, loading=True)
        return product

    delta = layout.finish_sums(dot(0) + dot(1), interpret=interpret)
    delta = jnp.where(massless, 0.0, delta)
    return RowStats(lse, delta, None, None, segment_start, last_segment_start)


def write(
    work_tile: "backward_dq.WorkTile",
    row: RowStats,
    block: Scalar,
    delta: Array,
    of_offset: Array | None,
) -> None:
    """Writes down what `find` returned, delta, and what each query adds to the gradient of tau."""
    b, h = work_tile.batch, work_tile.head
    rows = work_tile.ref["rows"].at[b, h, block]
    rows[RowStat.LSE] = row.lse
    rows[RowStat.DELTA] = delta
    rows[RowStat.THRESHOLD] = delta * 0.0 if row.threshold is None else row.threshold
    if row.segment_start is not None:
        rows[RowStat.SEGMENT_START] = row.segment_start.astype(jnp.float32)
    if of_offset is not None:
        work_tile.ref["of_offset"][b, h, block] = of_offset
