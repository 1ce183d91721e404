"""The forward pass: log-sum-exp first, then what survives.

One program does one tile of queries of one head. Its first sweep walks from the diagonal
backwards over the tiles that are not negligible, sums the exponentials and notes the
farthest tile that may be live; the second goes over the live ones only. Without an offset
one sweep does it all.

Loops count from 0, since Triton does not fetch ahead in loops that don't.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from pallas_kernels.problem import Inputs, Residuals
from pallas_kernels.triton.call import launch
from pallas_kernels.triton.plan import Plan, Table
from pallas_kernels.triton.tile import (
    DEAD_SLACK,
    LOWEST,
    MASKED,
    PRECISION,
    UNREACHABLE,
    biased,
    load_keys,
    load_queries,
    load_row,
    ones_where_positive,
    sees,
    store_queries,
    thresholds,
)


@triton.jit
def _scores(
    query, key, column0, row0, bias,
    static: tl.constexpr, CAUSAL: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Returns a tile's scores and what is still to be added to each row."""
    keys = load_keys(key, column0, static, CAUSAL)
    scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * static.score_scale
    return biased(scores, bias, row0 - column0, static, False, BIAS)


@triton.jit
def _visible(column0, row0, segment_start, static: tl.constexpr, CAUSAL: tl.constexpr):
    rows = tl.arange(0, static.queries)[:, None]
    columns = tl.arange(0, static.keys)[None, :]
    return sees(rows, columns, row0 - column0, (segment_start - column0)[:, None], static, CAUSAL)


@triton.jit
def _sum_exponentials(
    start, stop, state, inputs, bar, row0,
    static: tl.constexpr, CAUSAL: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """First sweep, over key tiles stop-1, ..., start; without an offset the only one.

    state: maximum and sum of each row; its farthest live tile, or without an offset its sum of
    weighted values. inputs: query tile, keys, values, first key seen, bias. bar: what a tile
    must stay below to be dead.
    """
    maximum, total, found = state
    query, key, value, segment_start, bias = inputs
    for step in tl.range(0, stop - start):
        tile = stop - 1 - step
        column0 = tile * static.keys
        scores, rest = _scores(query, key, column0, row0, bias, static, CAUSAL, BIAS)
        if CAUSAL or static.packed:
            visible = _visible(column0, row0, segment_start, static, CAUSAL)
            scores = tl.where(visible, scores, MASKED)
        highest = tl.max(scores, 1) + rest
        new_maximum = tl.maximum(maximum, highest)
        if not static.has_offset:
            # Its place decides the order of instructions; the same below costs none.
            shrink = tl.exp2(maximum - new_maximum)[:, None]
        exponentials = tl.exp2(scores - (new_maximum - rest)[:, None])
        total = total * tl.exp2(maximum - new_maximum) + tl.sum(exponentials, 1)
        maximum = new_maximum
        if not static.has_offset:
            values = load_keys(value, column0, static, CAUSAL)
            found = found * shrink
            weights = exponentials.to(values.dtype)
            found = tl.dot(weights, values, found, input_precision=PRECISION)
        elif static.skip_dead:
            # The sum only grows, so this never calls a live tile dead; and a NaN is
            # not below anything, nor is what has no mass yet.
            dead = tl.exp2(highest - maximum) < total * bar
            found = tl.where(dead, found, tile)
    return maximum, total, found


@triton.jit
def _add_values(
    start, stop, state, inputs, row_stats, row0,
    static: tl.constexpr, CAUSAL: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Second sweep, over key tiles start, ..., stop-1.

    state: sum of weighted values, and of the values of live entries. inputs: as above.
    row_stats: log-sum-exp and threshold.
    """
    out, live_v_sum = state
    query, key, value, segment_start, bias = inputs
    lse, threshold = row_stats
    for step in tl.range(0, stop - start):
        column0 = (start + step) * static.keys
        scores, rest = _scores(query, key, column0, row0, bias, static, CAUSAL, BIAS)
        weights = tl.exp2(scores - (lse - rest)[:, None]) - threshold[:, None]
        # A NaN must come through.
        weights = tl.maximum(weights, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if CAUSAL or static.packed:
            visible = _visible(column0, row0, segment_start, static, CAUSAL)
            weights = tl.where(visible, weights, 0.0)
        values = load_keys(value, column0, static, CAUSAL)
        rounded = weights.to(values.dtype)
        out = tl.dot(rounded, values, out, input_precision=PRECISION)
        if static.training:
            live = ones_where_positive(weights, rounded, static)
            live_v_sum = tl.dot(live, values, live_v_sum, input_precision=PRECISION)
    return out, live_v_sum


@triton.jit
def lazy_forward(
    query_ptr, key_ptr, value_ptr,
    table_ptr, slope_ptr, offset_ptr, offset_scale_ptr, segment_start_ptr, first_ptr,
    out_ptr, live_v_mean_ptr, rounding_ptr, lse_ptr, live_ptr,
    static: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head; grid (batch * heads, query tiles), longest first."""
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
    at_tile = row * static.query_tiles + query_tile

    slope = 0.0
    if static.has_slope:
        slope = tl.load(slope_ptr + head)
    bias = (table_ptr + head * static.pitch + static.lead, slope)
    segment_start = tl.full((static.queries,), 0, tl.int32)
    if static.packed:
        segment_start = load_row(segment_start_ptr + at_batch, row0, 0, static)
    query = load_queries(query_ptr + at_query, row0, static)
    inputs = (query, key_ptr + at_key, value_ptr + at_key, segment_start, bias)

    # Key tiles first..stop: past the table up to past_stop, below the diagonal up to
    # diagonal, the rest across it.
    first = tl.load(first_ptr + at_tile)
    stop = tl.cdiv(tl.minimum(row0 + static.queries, static.length), static.keys)
    diagonal = tl.maximum((row0 + 1) // static.keys, first)
    past_stop = diagonal
    if static.has_bias:
        past_stop = tl.maximum(tl.maximum(row0 + 1 - static.width, 0) // static.keys, first)

    rows = row0 + tl.arange(0, static.queries)
    inside = rows < static.length
    maximum = tl.full((static.queries,), LOWEST, tl.float32)
    total = tl.full((static.queries,), 0, tl.float32)
    zeros = tl.full((static.queries, static.padded_dim), 0, tl.float32)
    threshold = total
    found = zeros
    if static.has_offset:
        offset = tl.load(offset_ptr + head)
        scale = load_row(offset_scale_ptr + at_batch, row0, 0.0, static)
        # Rows past the end are dead.
        threshold = tl.where(inside, thresholds(offset, scale), UNREACHABLE)
        found = tl.full((static.queries,), 0, tl.int32) + stop
    bar = threshold * (1 - DEAD_SLACK)
    state = (maximum, total, found)
    state = _sum_exponentials(diagonal, stop, state, inputs, bar, row0, static, True, near)
    if static.has_bias:
        state = _sum_exponentials(
            past_stop, diagonal, state, inputs, bar, row0, static, False, near
        )
    if static.has_past:
        state = _sum_exponentials(first, past_stop, state, inputs, bar, row0, static, False, past)
    maximum, total, found = state
    lse = maximum + tl.log2(total)
    if static.has_offset:
        live = first
        if static.skip_dead:
            live = tl.min(found, 0)
        sums, stats = (zeros, zeros), (lse, threshold)
        if static.has_past:
            sums = _add_values(live, past_stop, sums, inputs, stats, row0, static, False, past)
        if static.has_bias:
            start = tl.maximum(past_stop, live)
            sums = _add_values(start, diagonal, sums, inputs, stats, row0, static, False, near)
        start = tl.maximum(diagonal, live)
        sums = _add_values(start, stop, sums, inputs, stats, row0, static, True, near)
        out, live_v_sum = sums
        if static.training:
            # Not the sum, which float16 may be too small for.
            visible = (rows - segment_start + 1).to(tl.float32)
            live_v_mean = live_v_sum / visible[:, None]
            store_queries(live_v_mean_ptr + at_query, row0, live_v_mean, static)
            if static.keep_rounding:
                rounding = live_v_mean - live_v_mean.to(query.dtype).to(tl.float32)
                rounding = rounding * (offset * scale * visible)[:, None]
                rounding = (out - out.to(query.dtype).to(tl.float32)) - rounding
                store_queries(rounding_ptr + at_query, row0, rounding, static)
            tl.store(live_ptr + at_tile, live)
    else:
        out = found / total[:, None]
        if static.keep_rounding:
            rounding = out - out.to(query.dtype).to(tl.float32)
            store_queries(rounding_ptr + at_query, row0, rounding, static)
    store_queries(out_ptr + at_query, row0, out, static)
    if static.training:
        at_row = row.to(tl.int64) * static.length
        # With this a row without mass adds nothing to any gradient.
        lse = tl.where(total == 0, UNREACHABLE, lse)
        tl.store(lse_ptr + at_row + rows, lse, mask=inside)


def forward(
    plan: Plan,
    inputs: Inputs,
    table: Table | None,
    first: Int[Array, "batch heads query_tiles"],
    *,
    training: bool,
) -> tuple[Float[Array, "batch length heads head_dim"], Residuals | None]:
    """Launches the forward pass.

    Returns:
      the output; with `training` the residuals: `lse` the log2-sum-exp2 of each row [batch,
      heads, length], `live_v` the sum of the values of live entries over the number of all
      visible ones, `rounding` what rounding takes from delta's sum of both, `live` the first
      live key tile of each query tile [batch, heads, query_tiles].
    """
    block = plan.blocks.forward if training else plan.blocks.inference
    static = plan.static(block, training=training)
    batch, length, heads, _ = inputs.query.shape
    same = jax.ShapeDtypeStruct(inputs.query.shape, inputs.query.dtype)
    rows = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
    tiles = jax.ShapeDtypeStruct((batch, heads, static.query_tiles), jnp.int32)
    with_offset = training and plan.has_offset
    out, live_v, rounding, lse, live = launch(
        lazy_forward,
        (*plan.arrays(inputs, table), first),
        (
            same,
            same if with_offset else None,
            same if static.keep_rounding else None,
            rows if training else None,
            tiles if with_offset else None,
        ),
        (batch * heads, static.query_tiles),
        block,
        static,
    )
    if not training:
        return out, None
    residuals = Residuals(lse=lse, out=out, rounding=rounding, live=live, live_v=live_v)
    # Where a scan stacks residuals, XLA would run the kernel twice: once into the stack.
    residuals = jax.lax.optimization_barrier(residuals)
    return residuals.out, residuals
