"""The backward pass: one kernel for dQ, one for dK and dV.

With m the live entries, dP = dO V^T and delta_i = dO_i . (O_i - tau/n_i M_i):

    dS = P (m dP - delta)     dV = A^T dO     dQ = dS K     dK = dS^T Q

A dead tile still has dS = -P delta, but needs neither dP nor dV. Live tiles are taken to
be one range from the diagonal on, for a tile of queries as for a tile of keys; a dead one
inside that range is only computed in full. The kernel for dK and dV walks all query heads
of its key head, so that nothing is summed by atomics and every run gives the same bits.
"""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array

from pallas_kernels.triton.call import launch
from pallas_kernels.triton.plan import Plan
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
    store_tile,
    thresholds,
)


@triton.jit
def _add_query_gradient(
    start,
    stop,
    state,
    inputs,
    of_rows,
    row0,
    static: tl.constexpr,
    CAUSAL: tl.constexpr,
    BIAS: tl.constexpr,
    LIVE: tl.constexpr,
):
    """Adds the part of key tiles start, ..., stop-1.

    state: d_query, and the sums of dS past the table. inputs: tiles of query and d_out,
    keys, values, bias. of_rows: log-sum-exp, delta, threshold, first key seen.
    """
    d_query, far_sum, far_moment = state
    query, d_out, key, value, bias = inputs
    log_total, delta, threshold, document = of_rows
    rows = tl.arange(0, static.queries)
    columns = tl.arange(0, static.keys)
    for step in tl.range(0, stop - start):
        column0 = (start + step) * static.keys
        apart = row0 - column0
        keys = load_keys(key, column0, static, CAUSAL)
        scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * static.score_scale
        scores, rest = biased(scores, bias, apart, static, False, BIAS)
        softmax = tl.exp2(scores - (log_total - rest)[:, None])
        if CAUSAL or static.packed:
            first = (document - column0)[:, None]
            visible = sees(rows[:, None], columns[None, :], apart, first, static, CAUSAL)
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
            far_sum += total
            far_moment += (apart + rows - (static.width - 1)).to(tl.float32) * total - moment
    return d_query, far_sum, far_moment


@triton.jit
def lazy_backward_query(
    query_ptr,
    key_ptr,
    value_ptr,
    table_ptr,
    slope_ptr,
    offset_ptr,
    offset_scale_ptr,
    document_ptr,
    first_ptr,
    live_ptr,
    log_total_ptr,
    out_ptr,
    value_mean_ptr,
    rounding_ptr,
    d_out_ptr,
    d_query_ptr,
    delta_ptr,
    threshold_ptr,
    d_offset_ptr,
    far_ptr,
    static: tl.constexpr,
):
    """One tile of queries of one head; grid (batch * heads, query tiles), longest first.

    Also leaves delta and the thresholds for the other kernels, this tile's part of the
    offset's gradient, and the sums of dS and of dS (i - j - (width - 1)) over tiles past
    the table.
    """
    near: tl.constexpr = static.near_bias
    far: tl.constexpr = static.far_bias
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
    delta = tl.sum(d_out.to(tl.float32) * pulled, 1)
    document = tl.full((static.queries,), 0, tl.int32)
    if static.packed:
        document = load_row(document_ptr + at_batch, row0, 0, static)
    threshold = tl.full((static.queries,), 0, tl.float32)
    if static.has_offset:
        scale = load_row(offset_scale_ptr + at_batch, row0, 0.0, static)
        value_mean = load_queries(value_mean_ptr + at_query, row0, static).to(tl.float32)
        pull = tl.sum(d_out.to(tl.float32) * value_mean, 1)
        pull *= scale * (rows - document + 1).to(tl.float32)
        tl.store(d_offset_ptr + at_tile, tl.sum(pull, 0))
        offset = tl.load(offset_ptr + head)
        delta -= offset * pull
        threshold = thresholds(offset, scale)
        tl.store(threshold_ptr + at_row + rows, threshold, mask=inside)
    tl.store(delta_ptr + at_row + rows, delta, mask=inside)

    slope = 0.0
    if static.has_slope:
        slope = tl.load(slope_ptr + head)
    bias = (table_ptr + head * static.pitch + static.lead, slope)
    query = load_queries(query_ptr + at_query, row0, static)
    inputs = (query, d_out, key_ptr + at_key, value_ptr + at_key, bias)
    # Rows past the end have no softmax weight.
    log_total = load_row(log_total_ptr + at_row, row0, UNREACHABLE, static)
    of_rows = (log_total, delta, threshold, document)

    at_forward = row * static.forward_tiles + row0 // static.forward_queries
    first = tl.load(first_ptr + at_forward) * static.forward_keys // static.keys
    stop = tl.cdiv(tl.minimum(row0 + static.queries, static.length), static.keys)
    diagonal = tl.maximum((row0 + 1) // static.keys, first)
    live = first
    if static.has_offset:
        live = tl.load(live_ptr + at_forward) * static.forward_keys // static.keys
        live = tl.minimum(live, diagonal)
    far_stop = diagonal
    if static.has_bias:
        far_stop = tl.maximum(tl.maximum(row0 + 1 - static.width, 0) // static.keys, first)

    d_query = tl.full((static.queries, static.padded_dim), 0, tl.float32)
    zeros = tl.full((static.queries,), 0, tl.float32)
    state = (d_query, zeros, zeros)
    if static.has_offset:
        if static.has_far:
            dead_stop = tl.minimum(far_stop, live)
            state = _add_query_gradient(
                first, dead_stop, state, inputs, of_rows, row0, static, False, far, False
            )
        if static.has_bias:
            state = _add_query_gradient(
                far_stop, live, state, inputs, of_rows, row0, static, False, near, False
            )
    if static.has_far:
        state = _add_query_gradient(
            live, far_stop, state, inputs, of_rows, row0, static, False, far, True
        )
    if static.has_bias:
        start = tl.maximum(far_stop, live)
        state = _add_query_gradient(
            start, diagonal, state, inputs, of_rows, row0, static, False, near, True
        )
    d_query, far_sum, far_moment = _add_query_gradient(
        diagonal, stop, state, inputs, of_rows, row0, static, True, near, True
    )
    store_queries(d_query_ptr + at_query, row0, d_query * static.scale, static)
    if static.has_slope:
        tl.store(far_ptr + at_tile * 2, tl.sum(far_sum, 0))
        tl.store(far_ptr + at_tile * 2 + 1, tl.sum(far_moment, 0))


@triton.jit
def _add_key_gradients(
    start,
    stop,
    state,
    tiles,
    inputs,
    of_rows,
    column0,
    static: tl.constexpr,
    CAUSAL: tl.constexpr,
    BIAS: tl.constexpr,
    LIVE: tl.constexpr,
):
    """Adds the part of query tiles start, ..., stop-1; tiles are [keys, queries] here.

    state: d_key and d_value. tiles: of keys and values. inputs: queries, d_out, bias.
    of_rows: where log-sum-exp, delta, threshold and first key seen stand.
    """
    d_key, d_value = state
    keys, values = tiles
    query, d_out, bias = inputs
    log_totals, deltas, thresholds_, documents = of_rows
    rows = tl.arange(0, static.queries)
    columns = tl.arange(0, static.keys)
    for step in tl.range(0, stop - start):
        row0 = (start + step) * static.queries
        apart = row0 - column0
        queries = load_queries(query, row0, static)
        # Rows past the end have no softmax weight.
        log_total = load_row(log_totals, row0, UNREACHABLE, static)
        delta = load_row(deltas, row0, 0.0, static)
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * static.score_scale
        scores, rest = biased(scores, bias, apart, static, True, BIAS)
        softmax = tl.exp2(scores - (log_total - rest)[None, :])
        if CAUSAL or static.packed:
            first = tl.full((static.queries,), 0, tl.int32)
            if static.packed:
                first = load_row(documents, row0, 0, static) - column0
            visible = sees(rows[None, :], columns[:, None], apart, first[None, :], static, CAUSAL)
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
def _last_query(first, column_stop, static: tl.constexpr, TILES: tl.constexpr):
    """Returns the end of the last query tile whose range begins before `column_stop`.

    first: where the forward pass's ranges stand. TILES: their number, rounded up.
    """
    tiles = tl.arange(0, TILES)
    starts = tl.load(first + tiles, mask=tiles < static.forward_tiles, other=static.length)
    stop = tl.max(tl.where(starts * static.forward_keys < column_stop, tiles + 1, 0), 0)
    return tl.minimum(stop * static.forward_queries, static.length)


@triton.jit
def lazy_backward_key(
    query_ptr,
    key_ptr,
    value_ptr,
    table_ptr,
    slope_ptr,
    document_ptr,
    first_ptr,
    live_ptr,
    log_total_ptr,
    delta_ptr,
    threshold_ptr,
    d_out_ptr,
    d_key_ptr,
    d_value_ptr,
    static: tl.constexpr,
):
    """One tile of keys of one key head; grid (batch * key heads, key tiles), longest first."""
    near: tl.constexpr = static.near_bias
    far: tl.constexpr = static.far_bias
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
    far_start = diagonal
    if static.has_bias:
        far_start = tl.cdiv(static.width + column0 + static.keys - 1, static.queries)
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
        of_rows = (log_total_ptr + at_row, delta_ptr + at_row, threshold, document_ptr + at_batch)

        tiles_pad: tl.constexpr = static.forward_tiles_padded
        at_forward = query_row * static.forward_tiles
        column_stop = column0 + static.keys
        visit_end = _last_query(first_ptr + at_forward, column_stop, static, tiles_pad)
        stop = tl.maximum(tl.cdiv(visit_end, static.queries), diagonal)
        live = stop
        if static.has_offset:
            live_end = _last_query(live_ptr + at_forward, column_stop, static, tiles_pad)
            live = tl.maximum(tl.cdiv(live_end, static.queries), diagonal)

        tiles = (keys, values)
        state = _add_key_gradients(
            start, diagonal, state, tiles, inputs, of_rows, column0, static, True, near, True
        )
        if static.has_bias:
            near_stop = tl.minimum(far_start, live)
            state = _add_key_gradients(
                diagonal,
                near_stop,
                state,
                tiles,
                inputs,
                of_rows,
                column0,
                static,
                False,
                near,
                True,
            )
        if static.has_far:
            state = _add_key_gradients(
                far_start, live, state, tiles, inputs, of_rows, column0, static, False, far, True
            )
        if static.has_offset:
            if static.has_bias:
                near_stop = tl.minimum(far_start, stop)
                state = _add_key_gradients(
                    live,
                    near_stop,
                    state,
                    tiles,
                    inputs,
                    of_rows,
                    column0,
                    static,
                    False,
                    near,
                    False,
                )
            if static.has_far:
                dead_start = tl.maximum(far_start, live)
                state = _add_key_gradients(
                    dead_start,
                    stop,
                    state,
                    tiles,
                    inputs,
                    of_rows,
                    column0,
                    static,
                    False,
                    far,
                    False,
                )
    d_key, d_value = state
    d_key *= static.scale
    store_tile(d_key_ptr + at_key, column0, d_key, static.keys, static.key_stride, static)
    store_tile(d_value_ptr + at_key, column0, d_value, static.keys, static.key_stride, static)


def backward_query(
    plan: Plan, groups: int, query: Array, key: Array, value: Array, *rest: Array
) -> Any:
    """Launches the kernel for dQ.

    Args:
      plan: of the call.
      groups: see `batching.over_batch`; only dummies need it.
      query: [batch, length, heads, head_dim].
      key: [batch, length, kv_heads, head_dim].
      value: the same.
      *rest: the other inputs of `lazy_backward_query`, in its order.

    Returns:
      d_query; delta and the thresholds [batch, heads, length]; the parts of the offset's
      gradient [batch, heads, tiles]; the sums of dS, and of dS times the distance past the
      table's end, over the tiles past it [batch, heads, tiles, 2].
    """
    block = plan.blocks.backward_query
    static = plan.static(query, key, block)
    batch, length, heads, _ = query.shape
    tiles = static.query_tiles
    rows = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
    return launch(
        lazy_backward_query,
        (query, key, value, *rest),
        (
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            rows,
            rows if plan.has_offset else jax.ShapeDtypeStruct((groups,), jnp.float32),
            jax.ShapeDtypeStruct((batch, heads, tiles), jnp.float32),
            jax.ShapeDtypeStruct((batch, heads, tiles, 2), jnp.float32),
        ),
        (batch * heads, tiles),
        block,
        static,
    )


def backward_key(
    plan: Plan, groups: int, query: Array, key: Array, value: Array, *rest: Array
) -> Any:
    """Launches the kernel for dK and dV, which it returns; arguments as above."""
    del groups
    block = plan.blocks.backward_key
    static = plan.static(query, key, block)
    gradient = jax.ShapeDtypeStruct(key.shape, key.dtype)
    return launch(
        lazy_backward_key,
        (query, key, value, *rest),
        (gradient, gradient),
        (key.shape[0] * key.shape[2], static.key_tiles),
        block,
        static,
    )
