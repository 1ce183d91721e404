"""What the backward pass knows of each query, from what the forward pass left.

    delta_i = sum_j P_ij m_ij dP_ij = dO_i . (O_i - tau/n_i M_i)      dtau = sum_i dO_i . M_i / n_i

dQ's kernel begins each piece with it: dO is there in any case, and the rest is fetched while
the piece before is in work. It writes the numbers down for the kernels that follow.
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
    """What the forward pass leaves for the backward pass.

    Attributes:
      out: the output [batch, length, heads, head_dim], 16 bits like the next two.
      rounding: what rounding took from out - tau/n M.
      mean: M / n; None without an offset.
      log_total: log2-sum-exp2 of each row's scores less b(0) [batch, heads, padded].
    """

    out: Array
    rounding: Array
    mean: Array | None
    log_total: Float[Array, "batch heads padded"]

    @property
    def tiles(self) -> dict[str, Array]:
        """Those of the query's shape."""
        found = {"out": self.out, "rounding": self.rounding}
        return found if self.mean is None else found | {"mean": self.mean}


def outputs(plan: Plan, first: Any) -> list[Any]:
    """Returns the types of what is written: facts of the rows; and dO . M / n with an offset.

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
    """Returns the types of the ring that the arrays come by."""
    tile = rings.tiled((stages, warpgroups, ROWS, head_dim), dtype)
    return {"fact_smem": tile} | rings.barriers("fact", stages, warpgroups, copies=warpgroups)


def names(plan: Plan) -> tuple[str, ...]:
    """Returns the arrays that come by the ring, in order."""
    return ("out", "rounding", "mean") if plan.has_offset else ("out", "rounding")


def fetch(piece: Any) -> None:
    """Fetches the arrays for a piece; in the warp that fetches."""
    for number, name in enumerate(names(piece.plan)):
        slot = piece.facts.acquire(number)
        for n in range(piece.block.warpgroups):
            rows = pl.ds((piece.unit0 + n) * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(
                piece.ref[name].at[piece.batch, rows, piece.head],
                piece.ref["fact_smem"].at[slot, n],
                piece.facts.full.at[slot],
            )


def prefetch(piece: Any) -> None:
    """Brings what `find` loads of the rows into the first cache; in all that fetch."""
    ref, plan = piece.ref, piece.plan
    rows = piece.block.rows
    found = [ref["log_total"].at[piece.batch, piece.head]]
    if plan.has_offset:
        found += [ref[name].at[piece.batch] for name in ("offset_scale", "count_inverse")]
    if plan.packed:
        found.append(ref["document"].at[piece.batch])
    for x in found:
        memory.prefetch(x, piece.unit0 * UNIT, rows, interpret=piece.interpret)


class RowFacts(NamedTuple):
    """Row vectors of 64 queries, see `Rows`.

    Attributes:
      log_total: of the scores.
      delta: see above.
      threshold: None without an offset.
      document: first key in sight; None unless rows hold several documents.
      document_last: the last query's; likewise.
    """

    log_total: Array
    delta: Array
    threshold: Array | None
    document: Array | None
    document_last: Any


def find(piece: Any, unit: Any, exists: Any) -> RowFacts:
    """Returns the facts of a warpgroup's queries, and writes them down.

    Args:
      piece: of dQ's kernel; its own operands have arrived.
      unit: of queries.
      exists: whether it is one.
    """
    ref, plan, interpret = piece.ref, piece.plan, piece.interpret
    b, h = piece.batch, piece.head

    def row(x: Any) -> Array:
        return plgpu.load(x.at[pl.ds(unit * UNIT, UNIT)], layout=ROW, optimized=False)

    log_total = row(ref["log_total"].at[b, h])
    document = document_last = None
    if plan.packed:
        document = row(ref["document"].at[b])
        # Documents begin later and later: the last query's masks the most.
        document_last = ref["document"][b, unit * UNIT + UNIT - 1]

    def tile(x: Any) -> Array:
        x = x[...] if interpret else plgpu.load(x, layout=TILE, optimized=False)
        return x.astype(jnp.float32)

    d_out = tile(ref["d_out_smem"].at[piece.warpgroup])

    def dot(number: int) -> Array:
        slot = piece.facts.wait(number)
        x = tile(ref["fact_smem"].at[slot, piece.warpgroup])
        product = lanes.lane_sums(d_out * x, False, interpret=interpret)
        piece.facts.release(number)
        return product

    def finish(x: Array) -> Array:
        return lanes.finish_sums(x, interpret=interpret)

    # Loaded before the arrays are waited for.
    names_of_rows = ("offset_scale", "count_inverse") if plan.has_offset else ()
    rows_of = [row(ref[name].at[b]) for name in names_of_rows]
    delta, limit, of_mean = finish(dot(0) + dot(1)), None, None
    if plan.has_offset:
        offset_scale, count_inverse = rows_of
        tau = ref["offset"][h]
        of_mean = finish(dot(2)) * (offset_scale / count_inverse)
        delta = delta - tau * of_mean
        limit = threshold(tau, offset_scale)

    @pl.when(exists)
    def _():
        rows = ref["rows"].at[b, h, unit]
        rows[Rows.LOG_TOTAL] = log_total
        rows[Rows.DELTA] = delta
        rows[Rows.THRESHOLD] = delta * 0.0 if limit is None else limit
        if document is not None:
            rows[Rows.DOCUMENT] = document.astype(jnp.float32)
        if of_mean is not None:
            ref["of_mean"][b, h, unit] = of_mean

    return RowFacts(log_total, delta, limit, document, document_last)
