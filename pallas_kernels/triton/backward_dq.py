"""The gradient of the queries, and what the other kernels of the backward pass want to know.

With m the live entries, dP = dO V^T and delta_i = dO_i . (O_i - tau/n_i M_i):

    dS = P (m dP - delta)     dV = A^T dO     dQ = dS K     dK = dS^T Q

A dead tile still has dS = -P delta, but needs neither dP nor dV. Live tiles are taken to
be one range from the diagonal on, for a tile of queries as for a tile of keys; a dead one
inside that range is only computed in full.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from pallas_kernels.problem import Inputs, Residuals
from pallas_kernels.triton.call import launch
from pallas_kernels.triton.plan import Plan, Table
from pallas_kernels.triton.tile import (
    PRECISION,
    TAIL,
    UNREACHABLE,
    biased,
    load_keys,
    load_queries,
    load_row,
    sees,
    store_queries,
    thresholds,
)


@triton.jit
def _add_query_gradient(
    start, stop, state, known,
    static: tl.constexpr, CAUSAL: tl.constexpr, BIAS: tl.constexpr, LIVE: tl.constexpr,
):  # fmt: skip
    """Adds the part of key tiles start, ..., stop-1.

    state: d_query, and the sums of dS past the table. known: tiles of query and d_out, keys,
    values, bias; log-sum-exp, delta, threshold, first key seen; the tile's first query.
    """
    d_query, past_sum, past_moment = state
    inputs, row_stats, row0 = known
    query, d_out, key, value, bias = inputs
    lse, delta, threshold, segment_start = row_stats
    rows = tl.arange(0, static.queries)
    columns = tl.arange(0, static.keys)
    for step in tl.range(0, stop - start):
        column0 = (start + step) * static.keys
        tile_distance = row0 - column0
        keys = load_keys(key, column0, static, CAUSAL)
        scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * static.score_scale
        scores, rest = biased(scores, bias, tile_distance, static, False, BIAS)
        softmax = tl.exp2(scores - (lse - rest)[:, None])
        if CAUSAL or static.packed:
            first = (segment_start - column0)[:, None]
            visible = sees(rows[:, None], columns[None, :], tile_distance, first, static, CAUSAL)
            softmax = tl.where(visible, softmax, 0.0)
        if LIVE:
            values = load_keys(value, column0, static, CAUSAL)
            d_weights = tl.dot(d_out, tl.trans(values), input_precision=PRECISION)
            if static.has_offset:
                d_weights = tl.where(softmax > threshold[:, None], d_weights, 0.0)
            d_scores = softmax * (d_weights - delta[:, None])
        else:
            d_scores = softmax * (-delta)[:, None]
        d_query = tl.dot(d_scores.to(keys.dtype), keys, d_query, input_precision=PRECISION)
        if BIAS == TAIL:
            total = tl.sum(d_scores, 1)
            moment = tl.sum(d_scores * columns.to(tl.float32)[None, :], 1)
            past_sum += total
            past_moment += (tile_distance + rows - (static.width - 1)).to(
                tl.float32
            ) * total - moment
    return d_query, past_sum, past_moment


@triton.jit
def lazy_backward_dq(
    query_ptr, key_ptr, value_ptr,
    table_ptr, slope_ptr, offset_ptr, offset_scale_ptr, segment_start_ptr,
    first_ptr, live_ptr, lse_ptr, out_ptr, live_v_mean_ptr, rounding_ptr, d_out_ptr,
    d_query_ptr, delta_ptr, threshold_ptr, d_offset_ptr, past_ptr,
    static: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head; grid (batch * heads, query tiles), longest first.

    Also leaves delta and the thresholds for the other kernels, this tile's part of the
    offset's gradient, and the sums of dS and of dS (i - j - (width - 1)) over tiles past
    the table.
    """
    near: tl.constexpr = static.near_bias
    past: tl.constexpr = static.past_bias
    row = tl.program_id(0)
    batch = (row // static.heads).to(tl.int64)
    head = row % static.heads
    query_tile = static.query_tiles - 1 - tl.program_id(1)
    row0 = query_tile * static.queries
    at_query = batch * (static.length * static.query_stride) + head * static.head_dim
    at_key = batch * (static.length * static.key_stride) + head // static.group * static.head_dim
    at_batch = batch * static.length
    at_row = row.to(tl.int64) * static.length
    at_tile = row * static.query_tiles + query_tile
    rows = row0 + tl.arange(0, static.queries)
    inside = rows < static.length

    d_out = load_queries(d_out_ptr + at_query, row0, static)
    pulled = load_queries(out_ptr + at_query, row0, static).to(tl.float32)
    if static.keep_rounding:
        # delta is taken from every weight's gradient alike: a systematic error, which
        # half precision's rounding of out would make several times the others'.
        pulled += load_queries(rounding_ptr + at_query, row0, static).to(tl.float32)
    # Rows past the end have no softmax weight, nor have those without mass, whose out is NaN.
    lse = load_row(lse_ptr + at_row, row0, UNREACHABLE, static)
    massless = lse == UNREACHABLE
    delta = tl.where(massless, 0.0, tl.sum(d_out.to(tl.float32) * pulled, 1))
    segment_start = tl.full((static.queries,), 0, tl.int32)
    if static.packed:
        segment_start = load_row(segment_start_ptr + at_batch, row0, 0, static)
    threshold = tl.full((static.queries,), 0, tl.float32)
    if static.has_offset:
        scale = load_row(offset_scale_ptr + at_batch, row0, 0.0, static)
        live_v_mean = load_queries(live_v_mean_ptr + at_query, row0, static).to(tl.float32)
        pull = tl.sum(d_out.to(tl.float32) * live_v_mean, 1)
        pull *= scale * (rows - segment_start + 1).to(tl.float32)
        tl.store(d_offset_ptr + at_tile, tl.sum(pull, 0))
        offset = tl.load(offset_ptr + head)
        delta -= offset * pull
        threshold = tl.where(massless, UNREACHABLE, thresholds(offset, scale))
        tl.store(threshold_ptr + at_row + rows, threshold, mask=inside)
    tl.store(delta_ptr + at_row + rows, delta, mask=inside)

    slope = 0.0
    if static.has_slope:
        slope = tl.load(slope_ptr + head)
    bias = (table_ptr + head * static.pitch + static.lead, slope)
    query = load_queries(query_ptr + at_query, row0, static)
    inputs = (query, d_out, key_ptr + at_key, value_ptr + at_key, bias)
    known = (inputs, (lse, delta, threshold, segment_start), row0)

    at_forward = row * static.forward_tiles + row0 // static.forward_queries
    first = tl.load(first_ptr + at_forward) * static.forward_keys // static.keys
    stop = tl.cdiv(tl.minimum(row0 + static.queries, static.length), static.keys)
    diagonal = tl.maximum((row0 + 1) // static.keys, first)
    live = first
    if static.has_offset:
        live = tl.load(live_ptr + at_forward) * static.forward_keys // static.keys
        live = tl.minimum(live, diagonal)
    past_stop = diagonal
    if static.has_bias:
        past_stop = tl.maximum(tl.maximum(row0 + 1 - static.width, 0) // static.keys, first)

    d_query = tl.full((static.queries, static.padded_dim), 0, tl.float32)
    zeros = tl.full((static.queries,), 0, tl.float32)
    state = (d_query, zeros, zeros)
    if static.has_offset:
        if static.has_past:
            dead_stop = tl.minimum(past_stop, live)
            state = _add_query_gradient(first, dead_stop, state, known, static, False, past, False)
        if static.has_bias:
            state = _add_query_gradient(past_stop, live, state, known, static, False, near, False)
    if static.has_past:
        state = _add_query_gradient(live, past_stop, state, known, static, False, past, True)
    if static.has_bias:
        start = tl.maximum(past_stop, live)
        state = _add_query_gradient(start, diagonal, state, known, static, False, near, True)
    state = _add_query_gradient(diagonal, stop, state, known, static, True, near, True)
    d_query, past_sum, past_moment = state
    store_queries(d_query_ptr + at_query, row0, d_query * static.scale, static)
    if static.has_slope:
        tl.store(past_ptr + at_tile * 2, tl.sum(past_sum, 0))
        tl.store(past_ptr + at_tile * 2 + 1, tl.sum(past_moment, 0))


class RowStats(NamedTuple):
    """What the backward pass knows of each query.

    Attributes:
      delta: sum over keys of P m dP.
      threshold: what a softmax weight must exceed to live; None without an offset.
    """

    delta: Float[Array, "batch heads length"]
    threshold: Float[Array, "batch heads length"] | None


def backward_dq(
    plan: Plan,
    inputs: Inputs,
    table: Table | None,
    first: Int[Array, "batch heads forward_tiles"],
    residuals: Residuals,
    d_out: Float[Array, "batch length heads head_dim"],
) -> tuple[
    Float[Array, "batch length heads head_dim"],
    RowStats,
    Float[Array, "batch heads tiles"],
    Float[Array, "batch heads tiles 2"],
]:
    """Launches the kernel.

    Returns:
      d_query; what the other kernels want; the parts of the offset's gradient; the sums of dS,
      and of dS times the distance past the table's end, over the tiles past it.
    """
    block = plan.blocks.backward_dq
    static = plan.static(block)
    batch, length, heads, _ = inputs.query.shape
    tiles = static.query_tiles
    rows = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
    d_query, delta, threshold, d_offset, past = launch(
        lazy_backward_dq,
        (
            *plan.arrays(inputs, table),
            *(first, first if residuals.live is None else residuals.live, residuals.lse),
            *(residuals.out, residuals.live_v, residuals.rounding, d_out),
        ),
        (
            jax.ShapeDtypeStruct(inputs.query.shape, inputs.query.dtype),
            rows,
            rows if plan.has_offset else None,
            jax.ShapeDtypeStruct((batch, heads, tiles), jnp.float32),
            jax.ShapeDtypeStruct((batch, heads, tiles, 2), jnp.float32),
        ),
        (batch * heads, tiles),
        block,
        static,
    )
    return d_query, RowStats(delta, threshold), d_offset, past
