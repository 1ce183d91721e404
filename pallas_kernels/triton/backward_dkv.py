"""The gradients of keys and values; `backward_dq` says how.

The kernel walks all query heads of its key head, so that nothing is summed by atomics and
every run gives the same bits.
"""

import jax
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from pallas_kernels.problem import Inputs, Residuals
from pallas_kernels.triton.backward_dq import RowStats
from pallas_kernels.triton.call import launch
from pallas_kernels.triton.plan import Plan, Table
from pallas_kernels.triton.tile import (
    PRECISION,
    UNREACHABLE,
    biased,
    load_keys,
    load_queries,
    load_row,
    sees,
    store_tile,
)


@triton.jit
def _add_key_gradients(
    start, stop, state, known,
    static: tl.constexpr, CAUSAL: tl.constexpr, BIAS: tl.constexpr, LIVE: tl.constexpr,
):  # fmt: skip
    """Adds the part of query tiles start, ..., stop-1; tiles are [keys, queries] here.

    state: d_key and d_value. known: tiles of keys and values; queries, d_out, bias; where
    log-sum-exp, delta, threshold and first key seen stand; the tile's first key.
    """
    d_key, d_value = state
    tiles, inputs, row_stats, column0 = known
    keys, values = tiles
    query, d_out, bias = inputs
    lses, deltas, thresholds_, segment_starts = row_stats
    rows = tl.arange(0, static.queries)
    columns = tl.arange(0, static.keys)
    for step in tl.range(0, stop - start):
        row0 = (start + step) * static.queries
        tile_distance = row0 - column0
        queries = load_queries(query, row0, static)
        # Rows past the end have no softmax weight.
        lse = load_row(lses, row0, UNREACHABLE, static)
        delta = load_row(deltas, row0, 0.0, static)
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * static.score_scale
        scores, rest = biased(scores, bias, tile_distance, static, True, BIAS)
        softmax = tl.exp2(scores - (lse - rest)[None, :])
        if CAUSAL or static.packed:
            first = tl.full((static.queries,), 0, tl.int32)
            if static.packed:
                first = load_row(segment_starts, row0, 0, static) - column0
            visible = sees(
                rows[None, :], columns[:, None], tile_distance, first[None, :], static, CAUSAL
            )
            softmax = tl.where(visible, softmax, 0.0)
        if LIVE:
            d_outs = load_queries(d_out, row0, static)
            weights = softmax
            d_weights = tl.dot(values, tl.trans(d_outs), input_precision=PRECISION)
            if static.has_offset:
                threshold = load_row(thresholds_, row0, 0.0, static)[None, :]
                weights = tl.maximum(softmax - threshold, 0.0, propagate_nan=tl.PropagateNan.ALL)
                if CAUSAL or static.packed:
                    weights = tl.where(visible, weights, 0.0)
                d_weights = tl.where(softmax > threshold, d_weights, 0.0)
            d_value = tl.dot(weights.to(d_outs.dtype), d_outs, d_value, input_precision=PRECISION)
            d_scores = softmax * (d_weights - delta[None, :])
        else:
            d_scores = softmax * (-delta)[None, :]
        d_key = tl.dot(d_scores.to(queries.dtype), queries, d_key, input_precision=PRECISION)
    return d_key, d_value


@triton.jit
def _last_query(first, column_stop, static: tl.constexpr):
    """Returns the end of the last query tile whose range, at `first`, begins before a column."""
    tiles = tl.arange(0, triton.next_power_of_2(static.forward_tiles))
    starts = tl.load(first + tiles, mask=tiles < static.forward_tiles, other=static.length)
    stop = tl.max(tl.where(starts * static.forward_keys < column_stop, tiles + 1, 0), 0)
    return tl.minimum(stop * static.forward_queries, static.length)


@triton.jit
def lazy_backward_dkv(
    query_ptr, key_ptr, value_ptr, table_ptr, slope_ptr, segment_start_ptr,
    first_ptr, live_ptr, lse_ptr, delta_ptr, threshold_ptr, d_out_ptr,
    d_key_ptr, d_value_ptr,
    static: tl.constexpr,
):  # fmt: skip
    """One tile of keys of one key head; grid (batch * key heads, key tiles), longest first."""
    near: tl.constexpr = static.near_bias
    past: tl.constexpr = static.past_bias
    row = tl.program_id(0)
    batch = (row // static.key_heads).to(tl.int64)
    key_head = row % static.key_heads
    column0 = tl.program_id(1) * static.keys
    at_key = batch * (static.length * static.key_stride) + key_head * static.head_dim
    at_batch = batch * static.length
    keys = load_keys(key_ptr + at_key, column0, static, True)
    values = load_keys(value_ptr + at_key, column0, static, True)

    start = column0 // static.queries
    diagonal_end = tl.minimum(column0 + static.keys - 1, static.length)
    diagonal = tl.cdiv(diagonal_end, static.queries)
    past_start = diagonal
    if static.has_bias:
        past_start = tl.cdiv(static.width + column0 + static.keys - 1, static.queries)
    zeros = tl.full((static.keys, static.padded_dim), 0, tl.float32)
    state = (zeros, zeros)
    for member in tl.range(0, static.group):
        head = key_head * static.group + member
        query_row = (batch * static.heads + head).to(tl.int32)
        at_query = batch * (static.length * static.query_stride) + head * static.head_dim
        at_row = query_row.to(tl.int64) * static.length
        slope = 0.0
        if static.has_slope:
            slope = tl.load(slope_ptr + head)
        bias = (table_ptr + head * static.pitch + static.lead, slope)
        inputs = (query_ptr + at_query, d_out_ptr + at_query, bias)
        threshold = threshold_ptr
        if static.has_offset:
            threshold += at_row
        row_stats = (lse_ptr + at_row, delta_ptr + at_row, threshold, segment_start_ptr + at_batch)

        at_forward = query_row * static.forward_tiles
        column_stop = column0 + static.keys
        visit_end = _last_query(first_ptr + at_forward, column_stop, static)
        stop = tl.maximum(tl.cdiv(visit_end, static.queries), diagonal)
        live = stop
        if static.has_offset:
            live_end = _last_query(live_ptr + at_forward, column_stop, static)
            live = tl.maximum(tl.cdiv(live_end, static.queries), diagonal)

        known = ((keys, values), inputs, row_stats, column0)
        state = _add_key_gradients(start, diagonal, state, known, static, True, near, True)
        if static.has_bias:
            near_stop = tl.minimum(past_start, live)
            state = _add_key_gradients(diagonal, near_stop, state, known, static, False, near, True)
        if static.has_past:
            state = _add_key_gradients(past_start, live, state, known, static, False, past, True)
        if static.has_offset:
            if static.has_bias:
                near_stop = tl.minimum(past_start, stop)
                state = _add_key_gradients(
                    live, near_stop, state, known, static, False, near, False
                )
            if static.has_past:
                dead_start = tl.maximum(past_start, live)
                state = _add_key_gradients(
                    dead_start, stop, state, known, static, False, past, False
                )
    d_key, d_value = state
    d_key *= static.scale
    store_tile(d_key_ptr + at_key, column0, d_key, static.keys, static.key_stride, static)
    store_tile(d_value_ptr + at_key, column0, d_value, static.keys, static.key_stride, static)


def backward_dkv(
    plan: Plan,
    inputs: Inputs,
    table: Table | None,
    first: Int[Array, "batch heads forward_tiles"],
    residuals: Residuals,
    row_stats: RowStats,
    d_out: Float[Array, "batch length heads head_dim"],
) -> tuple[
    Float[Array, "batch length kv_heads head_dim"], Float[Array, "batch length kv_heads head_dim"]
]:
    """Launches the kernel; returns d_key and d_value."""
    block = plan.blocks.backward_dkv
    static = plan.static(block)
    key, live = inputs.key, residuals.live
    gradient = jax.ShapeDtypeStruct(key.shape, key.dtype)
    d_key, d_value = launch(
        lazy_backward_dkv,
        (
            *(inputs.query, key, inputs.value),
            *(*plan.bias(table), plan.segment_start(inputs)),
            *(first, first if live is None else live, residuals.lse),
            *(*row_stats, d_out),
        ),
        (gradient, gradient),
        (key.shape[0] * key.shape[2], static.key_tiles),
        block,
        static,
    )
    return d_key, d_value
