"""The gradient of the bias table, without atomics.

All tiles of a head at one distance from the diagonal share one bias tile, so the gradients
of these tiles are summed elementwise first. One program does one distance of one head, for
a part of the batch and of the rows, with the sum in registers; its diagonals are summed
later, once. Entries past the table are left to the kernel for dQ, whose tiles are the same.
"""

import dataclasses

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from pallas_kernels import bias as bias_lib
from pallas_kernels.problem import Inputs, Residuals
from pallas_kernels.triton.backward_dq import RowStats
from pallas_kernels.triton.call import launch
from pallas_kernels.triton.config import Block
from pallas_kernels.triton.plan import Plan, Static, Table
from pallas_kernels.triton.tile import (
    MASKED,
    PRECISION,
    UNREACHABLE,
    gather,
    load_keys,
    load_queries,
    load_row,
)

# Programs wanted, so that uneven ones share out well over the largest GPUs, and query
# tiles that a program should at least have.
_PROGRAMS = 1024
_TILES_A_PROGRAM = 8


@triton.jit
def _add_scores_gradient(
    start, stop, total, bias, inputs, row_stats, tile_distance,
    static: tl.constexpr, LIVE: tl.constexpr,
):  # fmt: skip
    """Adds dS of the tiles at query tiles start, ..., stop-1.

    bias: of these tiles, with causality. inputs: queries, d_out, keys, values. row_stats:
    where log-sum-exp, delta, threshold and first key seen stand.
    """
    query, d_out, key, value = inputs
    lses, deltas, thresholds, segment_starts = row_stats
    columns = tl.arange(0, static.keys)[None, :]
    for step in tl.range(0, stop - start):
        row0 = (start + step) * static.queries
        column0 = row0 - tile_distance
        queries = load_queries(query, row0, static)
        keys = load_keys(key, column0, static, True)
        # Rows past the end have no softmax weight.
        lse = load_row(lses, row0, UNREACHABLE, static)
        delta = load_row(deltas, row0, 0.0, static)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        softmax = tl.exp2(scores * static.score_scale + bias - lse[:, None])
        if static.packed:
            first = load_row(segment_starts, row0, 0, static) - column0
            softmax = tl.where(columns >= first[:, None], softmax, 0.0)
        if LIVE:
            d_outs = load_queries(d_out, row0, static)
            values = load_keys(value, column0, static, True)
            d_weights = tl.dot(d_outs, tl.trans(values), input_precision=PRECISION)
            if static.has_offset:
                threshold = load_row(thresholds, row0, 0.0, static)
                d_weights = tl.where(softmax > threshold[:, None], d_weights, 0.0)
            total += softmax * (d_weights - delta[:, None])
        else:
            total -= softmax * delta[:, None]
    return total


@triton.jit
def lazy_backward_dbias(
    query_ptr, key_ptr, value_ptr, table_ptr, segment_start_ptr,
    first_ptr, live_ptr, lse_ptr, delta_ptr, threshold_ptr, d_out_ptr,
    d_bias_ptr,
    static: tl.constexpr,
):  # fmt: skip
    """One distance of one head; grid (distances * heads, parts).

    A part is static.batches rows of the batch, or one of the static.chunks runs of query
    tiles of one. d_bias is [parts, heads, distances, queries, keys].
    """
    chunk: tl.constexpr = -(-static.query_tiles // static.chunks)
    ratio: tl.constexpr = static.queries // static.keys
    step = tl.program_id(0) // static.heads
    head = tl.program_id(0) % static.heads
    part = tl.program_id(1)
    # The nearest distance is the last key tile's that a query tile sees.
    tile_distance = (step - (ratio - 1)) * static.keys
    chunk_start = part % static.chunks * chunk
    chunk_stop = chunk_start + chunk

    rows = tl.arange(0, static.queries)
    columns = tl.arange(0, static.keys)
    table = table_ptr + head * static.pitch + static.lead
    bias = gather((table + tile_distance + rows)[:, None] - columns[None, :])
    bias = tl.where(rows[:, None] + tile_distance >= columns[None, :], bias, MASKED)
    tiles = tl.arange(0, triton.next_power_of_2(static.query_tiles))
    total = tl.full((static.queries, static.keys), 0, tl.float32)
    for member in tl.range(0, static.batches):
        batch = (part // static.chunks * static.batches + member).to(tl.int64)
        row = batch * static.heads + head
        at_row = row * static.length
        at_batch = batch * static.length
        at_query = at_batch * static.query_stride + head * static.head_dim
        at_key = at_batch * static.key_stride + head // static.group * static.head_dim
        inputs = (query_ptr + at_query, d_out_ptr + at_query, key_ptr + at_key, value_ptr + at_key)
        threshold = threshold_ptr
        if static.has_offset:
            threshold += at_row
        row_stats = (lse_ptr + at_row, delta_ptr + at_row, threshold, segment_start_ptr + at_batch)

        # Query tiles from the first to the last that visits a tile at this distance, and
        # from the first on for which it may be live.
        column_start = tiles * static.queries - tile_distance
        column_stop = column_start + static.keys
        known = tiles < static.query_tiles
        exists = known & (column_start >= 0) & (column_start < static.length)
        exists = exists & (tiles >= chunk_start) & (tiles < chunk_stop)
        at_tile = row * static.forward_tiles + tiles * static.queries // static.forward_queries
        first = tl.load(first_ptr + at_tile, mask=known, other=static.length)
        visited = exists & (first * static.forward_keys < column_stop)
        start = tl.min(tl.where(visited, tiles, static.query_tiles), 0)
        stop = tl.max(tl.where(visited, tiles + 1, 0), 0)
        live_start = start
        if static.has_offset:
            live = tl.load(live_ptr + at_tile, mask=known, other=static.length)
            alive = visited & (live * static.forward_keys < column_stop)
            live_start = tl.min(tl.where(alive, tiles, stop), 0)
            total = _add_scores_gradient(
                start, live_start, total, bias, inputs, row_stats, tile_distance, static, False
            )
        total = _add_scores_gradient(
            live_start, stop, total, bias, inputs, row_stats, tile_distance, static, True
        )
    at = ((part * static.heads + head) * static.distances + step).to(tl.int64)
    at = d_bias_ptr + at * (static.queries * static.keys)
    tl.store(at + rows[:, None] * static.keys + columns[None, :], total)


def _parts(batch: int, groups: int, tiles: int, programs: int) -> tuple[int, int]:
    """Returns rows of the batch a part, and parts a row; one of them is 1."""
    wanted = -(-_PROGRAMS // programs)
    if wanted >= batch:
        return 1, max(1, min(-(-wanted // batch), tiles // _TILES_A_PROGRAM))
    in_group = batch // groups
    rows = max(n for n in range(1, in_group + 1) if in_group % n == 0 and batch // n >= wanted)
    return rows, 1


def backward_dbias(
    plan: Plan,
    inputs: Inputs,
    table: Table,
    first: Int[Array, "batch heads forward_tiles"],
    residuals: Residuals,
    row_stats: RowStats,
    d_out: Float[Array, "batch length heads head_dim"],
    groups: int,
) -> Float[Array, "groups heads near"]:
    """Launches the kernel and sums its diagonals.

    Returns:
      the gradient of b(x), over tiles with a distance inside the table, for each of `groups`
      parts of the batch.
    """
    block = plan.blocks.backward_dbias
    static: Static = plan.static(block)
    batch, heads, tiles = inputs.query.shape[0], static.heads, static.query_tiles
    ratio = block.queries // block.keys
    distances = min(-(-(plan.width + block.keys - 1) // block.keys), ratio * (tiles - 1) + 1)
    distances += ratio - 1
    rows, chunks = _parts(batch, groups, tiles, heads * distances)
    parts = batch // rows * chunks
    shape = (parts, heads, distances, block.queries, block.keys)
    live = residuals.live
    (sums,) = launch(
        lazy_backward_dbias,
        (
            *(inputs.query, inputs.key, inputs.value),
            *(table.values, plan.segment_start(inputs)),
            *(first, first if live is None else live, residuals.lse),
            *(*row_stats, d_out),
        ),
        (jax.ShapeDtypeStruct(shape, jnp.float32),),
        (heads * distances, parts),
        block,
        dataclasses.replace(static, distances=distances, chunks=chunks, batches=rows),
    )
    return _by_distance(sums.reshape(groups, -1, *shape[1:]).sum(axis=1), block)


def _by_distance(
    sums: Float[Array, "groups heads distances queries keys"], block: Block
) -> Float[Array, "groups heads near"]:
    """Sums the diagonals of tiles that lie `block.keys` tile_distance."""
    groups, heads, distances, _, keys = sums.shape
    ratio = block.queries // keys
    diagonals = bias_lib.sum_diagonals(sums)
    # A tile's diagonals reach over the next ratio tiles' first ones.
    pieces = jnp.pad(diagonals, ((0, 0),) * 3 + ((0, 1),))
    pieces = pieces.reshape(groups, heads, distances, ratio + 1, keys)
    total = jnp.zeros((groups, heads, distances + ratio, keys), sums.dtype)
    for n in range(ratio + 1):
        total += jnp.pad(pieces[:, :, :, n], ((0, 0), (0, 0), (n, ratio - n), (0, 0)))
    # The first entry is that of distance 1 - ratio keys.
    return total.reshape(groups, heads, -1)[..., ratio * keys - 1 :]
