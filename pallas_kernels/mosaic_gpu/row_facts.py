"""What the backward pass knows of each query, and writes down for the kernels that follow.

Without an offset delta_i = sum_j P_ij dP_ij = dO_i . O_i. dQ's kernel begins each piece with
it: dO is there in any case, and the output is fetched while the piece before is in work. With
an offset it knows delta at the end.
"""

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.mosaic_gpu import lanes, memory, rings
from pallas_kernels.mosaic_gpu.mlir import ROW, ROWS, TILE
from pallas_kernels.mosaic_gpu.plan import UNIT, Plan, Rows, threshold


class Residuals(NamedTuple):
    """What the forward pass leaves for the backward pass, see `forward.forward`.

    Attributes:
      log_total: log2-sum-exp2 of each row's scores less b(0) [batch, heads, padded].
      out: the output [batch, length, heads, head_dim]; None with an offset, like the next.
      rounding: what rounding took from it.
      mean_key_left, mean_key_right: the mean of the keys; None without an offset.
      past: sums over tiles past the bias table; None unless there are some, and an offset.
    """

    log_total: Float[Array, "batch heads padded"]
    out: Array | None
    rounding: Array | None
    mean_key_left: Array | None
    mean_key_right: Array | None
    past: Array | None

    @property
    def given(self) -> dict[str, Array]:
        """Those that are there."""
        return {name: x for name, x in self._asdict().items() if x is not None}


# What delta is found from without an offset, in the order it is fetched in.
_OUTPUTS = ("out", "rounding")


def outputs(plan: Plan, first: Any) -> list[Any]:
    """Returns the types of what is written: facts of the rows; with an offset its gradient.

    Args:
      plan: of the call.
      first: an array [batch, heads, units].
    """
    kinds = 4 if plan.packed else 3
    types = [jax.ShapeDtypeStruct((*first.shape, kinds, UNIT), jnp.float32)]
    if plan.has_offset:
        types.append(jax.ShapeDtypeStruct((*first.shape, UNIT), jnp.float32))
    return types


def scratch(stages: int, warpgroups: int, head_dim: int, dtype: Any) -> dict[str, Any]:
    """Returns the types of the ring that the output comes by."""
    tile = rings.tiled((stages, warpgroups, ROWS, head_dim), dtype)
    return {"out_smem": tile} | rings.barriers("out", stages, warpgroups, copies=warpgroups)


def fetch(piece: Any) -> None:
    """Fetches the output for a piece; in the warp that fetches."""
    for number, name in enumerate(_OUTPUTS):
        slot = piece.outs.acquire(number)
        for n in range(piece.block.warpgroups):
            rows = pl.ds((piece.unit0 + n) * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(
                piece.ref[name].at[piece.batch, rows, piece.head],
                piece.ref["out_smem"].at[slot, n],
                piece.outs.full.at[slot],
            )


def prefetch(piece: Any) -> None:
    """Brings what `find` loads of the rows into the first cache; in all that fetch."""
    ref, plan = piece.ref, piece.plan
    rows = piece.block.rows
    found = [ref["log_total"].at[piece.batch, piece.head]]
    if plan.has_offset:
        found.append(ref["offset_scale"].at[piece.batch])
    if plan.packed:
        found.append(ref["document"].at[piece.batch])
    for x in found:
        memory.prefetch(x, piece.unit0 * UNIT, rows, interpret=piece.interpret)


class RowFacts(NamedTuple):
    """Row vectors of 64 queries, see `Rows`.

    Attributes:
      log_total: of the scores.
      delta: see above; None with an offset.
      threshold: None without an offset, like the next.
      offset_scale: factor of tau.
      document: first key in sight; None unless rows hold several documents.
      document_last: the last query's; likewise.
    """

    log_total: Array
    delta: Any
    threshold: Any
    offset_scale: Any
    document: Any
    document_last: Any


def find(piece: Any, unit: Any) -> RowFacts:
    """Returns the facts of a warpgroup's queries.

    Args:
      piece: of dQ's kernel; its own operands have arrived.
      unit: of queries.
    """
    ref, plan, interpret = piece.ref, piece.plan, piece.interpret
    b, h = piece.batch, piece.head

    def row(x: Any) -> Array:
        return plgpu.load(x.at[pl.ds(unit * UNIT, UNIT)], layout=ROW, optimized=False)

    log_total = row(ref["log_total"].at[b, h])
    document = document_last = None
    if plan.packed:
        document = row(ref["document"].at[b])
        # Documents and windows begin later and later: the last query's masks the most.
        document_last = ref["document"][b, unit * UNIT + UNIT - 1]
    if plan.has_offset:
        offset_scale = row(ref["offset_scale"].at[b])
        limit = threshold(ref["offset"][h], offset_scale)
        return RowFacts(log_total, None, limit, offset_scale, document, document_last)

    def tile(x: Any) -> Array:
        x = x[...] if interpret else plgpu.load(x, layout=TILE, optimized=False)
        return x.astype(jnp.float32)

    d_out = tile(ref["d_out_smem"].at[piece.warpgroup])

    def dot(number: int) -> Array:
        slot = piece.outs.wait(number)
        x = tile(ref["out_smem"].at[slot, piece.warpgroup])
        product = lanes.lane_sums(d_out * x, False, interpret=interpret)
        piece.outs.release(number)
        return product

    delta = lanes.finish_sums(dot(0) + dot(1), interpret=interpret)
    return RowFacts(log_total, delta, None, None, document, document_last)


def write(piece: Any, row: RowFacts, unit: Any, delta: Array, of_offset: Array | None) -> None:
    """Writes down the facts of a warpgroup's queries.

    Args:
      piece: as for `find`.
      row: what that returned.
      unit: of queries.
      delta: see above.
      of_offset: what each query adds to the gradient of tau; None without an offset.
    """
    b, h = piece.batch, piece.head
    rows = piece.ref["rows"].at[b, h, unit]
    rows[Rows.LOG_TOTAL] = row.log_total
    rows[Rows.DELTA] = delta
    rows[Rows.THRESHOLD] = delta * 0.0 if row.threshold is None else row.threshold
    if row.document is not None:
        rows[Rows.DOCUMENT] = row.document.astype(jnp.float32)
    if of_offset is not None:
        piece.ref["of_offset"][b, h, unit] = of_offset
