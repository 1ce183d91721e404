"""What the kernels do to one tile: read it, score it, mask it.

Scores are in units of log2: the table and the slope come multiplied by log2(e), and so
does the factor of the scores.

The bias of a tile takes one of three forms:

- NONE: no bias, or past a table without a slope;
- TABLE: some distance lies inside the table, which is padded so that every distance of
  such a tile has an entry;
- TAIL: every distance lies past the table, where the bias is affine: a part a query
  plus a part a key, both free of gathers.
"""

from typing import Any

import triton
import triton.language as tl

from pallas_kernels.triton import plan

TABLE = tl.constexpr(plan.TABLE)
TAIL = tl.constexpr(plan.TAIL)

# A running maximum below any other, finite so that differences stay numbers. Masked scores
# are -inf themselves: a row that sees nothing else sums up to 0, and is no number then.
LOWEST = tl.constexpr(-1.0e30)
MASKED = tl.constexpr(float("-inf"))
# A threshold, or a log-sum-exp, that no weight passes.
UNREACHABLE = tl.constexpr(1.0e30)
# Part of the threshold by which a tile must miss it to be called dead: more than the
# rounding of its scores.
DEAD_SLACK = tl.constexpr(1.0e-4)
# float32 products without tensor cores or loss; half precision has but one kind.
PRECISION = tl.constexpr("ieee")

_BY_PTX = tl.constexpr(not triton.knobs.runtime.interpret)


def constant(value: Any) -> Any:
    """Returns a constant's attribute in the form in which a kernel can pass it on.

    Triton 3.6 takes a constexpr alone; its interpreter reads no attributes of one.
    """
    return tl.constexpr(value) if isinstance(gather, triton.JITFunction) else value


@triton.jit
def load_tile(
    base, start, ROWS: tl.constexpr, STRIDE: tl.constexpr, static: tl.constexpr, CHECK: tl.constexpr
):
    """Returns rows start..start+ROWS of [length, head_dim] at `base`, 0 past the edges.

    CHECK: the tile may reach past the length.
    """
    rows = tl.arange(0, ROWS)
    features = tl.arange(0, static.padded_dim)
    at = base + start.to(tl.int64) * STRIDE + (rows[:, None] * STRIDE + features[None, :])
    if CHECK and static.length % ROWS != 0:
        mask = (start + rows < static.length)[:, None]
        if static.head_dim != static.padded_dim:
            mask = mask & (features < static.head_dim)[None, :]
        tile = tl.load(at, mask=mask, other=0.0)
    elif static.head_dim == static.padded_dim:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=(features < static.head_dim)[None, :], other=0.0)
    return tile


@triton.jit
def load_queries(base, start, static: tl.constexpr):
    """Returns a tile of queries, or of what has their shape."""
    return load_tile(base, start, static.queries, static.query_stride, static, True)


@triton.jit
def load_keys(base, start, static: tl.constexpr, CHECK: tl.constexpr):
    """Returns a tile of keys or values."""
    return load_tile(base, start, static.keys, static.key_stride, static, CHECK)


@triton.jit
def store_tile(base, start, tile, ROWS: tl.constexpr, STRIDE: tl.constexpr, static: tl.constexpr):
    """Writes what `load_tile` reads."""
    rows = tl.arange(0, ROWS)
    features = tl.arange(0, static.padded_dim)
    at = base + start.to(tl.int64) * STRIDE + (rows[:, None] * STRIDE + features[None, :])
    mask = (start + rows < static.length)[:, None] & (features < static.head_dim)[None, :]
    tl.store(at, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def store_queries(base, start, tile, static: tl.constexpr):
    """Writes a tile of queries, or of what has their shape."""
    store_tile(base, start, tile, static.queries, static.query_stride, static)


@triton.jit
def load_row(base, start, OTHER: tl.constexpr, static: tl.constexpr):
    """Returns a number for each query of a tile from [length] at `base`, OTHER past it."""
    rows = start + tl.arange(0, static.queries)
    if static.length % static.queries == 0:
        values = tl.load(base + rows)
    else:
        values = tl.load(base + rows, mask=rows < static.length, other=OTHER)
    return values


@triton.jit
def thresholds(offset, scale):
    """Returns what a softmax weight must exceed to be live, -tau/n.

    No weight exceeds 1. Said outright, since the only weight of a document's first query
    is 1 and its threshold is 1 too where tau is -1: rounding must not tell one kernel that
    it is live and another that it is dead.
    """
    threshold = -offset * scale
    return tl.where(threshold >= 1, UNREACHABLE, threshold)


@triton.jit
def ones_where_positive(x, rounded, static: tl.constexpr):
    """Returns 1 where x > 0 and 0 elsewhere, in the dtype of `rounded`, which is x."""
    if static.packed_compare and _BY_PTX:
        # Two bfloat16 numbers at a time. None of float32's positive numbers that matter is
        # 0 in bfloat16; in float16 many are.
        ones = tl.inline_asm_elementwise(
            "{ .reg .b32 zero; mov.b32 zero, 0; set.gt.bf16x2.bf16x2 $0, $1, zero; }",
            "=r,r",
            [rounded],
            dtype=rounded.dtype,
            is_pure=True,
            pack=2,
        )
    else:
        ones = tl.where(x > 0, 1.0, 0.0).to(rounded.dtype)
    return ones


@triton.jit
def gather(at):
    """Returns float32 values at a tile of addresses.

    By PTX, since Triton stages a plain gather that feeds a matrix product through
    shared memory, four bytes at a time.
    """
    if _BY_PTX:
        values = tl.inline_asm_elementwise(
            "ld.global.nc.b32 $0, [$1];",
            "=f,l",
            [at.to(tl.int64)],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        values = tl.load(at)
    return values


@triton.jit
def biased(
    scores, bias, tile_distance, static: tl.constexpr, TRANSPOSED: tl.constexpr, BIAS: tl.constexpr
):
    """Adds the bias of a tile, but for a part that is the same along a query's row.

    Args:
      scores: q . k of the tile, in units of log2, [queries, keys] or [keys, queries].
      bias: where b(0) of the head stands, and the slope of the tail.
      tile_distance: index of the tile's first query minus that of its first key.
      static: of the kernel.
      TRANSPOSED: the scores are [keys, queries].
      BIAS: NONE, TABLE or TAIL.

    Returns:
      the scores, and what is still to be added to them, one number a query.
    """
    table, slope = bias
    queries = tl.arange(0, static.queries)
    keys = tl.arange(0, static.keys)
    rest = tl.full((static.queries,), 0, tl.float32)
    if BIAS == TABLE:
        # Written so that the entries of a thread that lie on one diagonal share a load,
        # and that all addresses are constants away from few registers. It matters which
        # axis comes first and how wide the integers are: count LDG in the machine code
        # (18 a thread for 64 x 64 entries in four warps) after any change.
        near = table + tile_distance
        if TRANSPOSED:
            scores += gather((near + queries.to(tl.int64))[None, :] - keys.to(tl.int64)[:, None])
        else:
            scores += gather((near + queries)[:, None] - keys[None, :])
    if BIAS == TAIL:
        last: tl.constexpr = static.width - 1
        end = tl.load(table + last)
        rest = (end - slope * (tile_distance - last).to(tl.float32)) - slope * queries.to(
            tl.float32
        )
        by_key = slope * keys.to(tl.float32)
        if TRANSPOSED:
            scores += by_key[:, None]
        else:
            scores += by_key[None, :]
    return scores, rest


@triton.jit
def sees(query, key, tile_distance, segment_start, static: tl.constexpr, CAUSAL: tl.constexpr):
    """Returns which keys each query of a tile sees.

    Args:
      query: index in the tile, and `segment_start`: first key it sees minus the tile's first
        key; both along one axis of the result, of size 1 along the other.
      key: index in the tile along the other axis.
      tile_distance: index of the tile's first query minus that of its first key.
      segment_start: see `query`.
      static: of the kernel.
      CAUSAL: the tile may hold keys after a query.
    """
    if CAUSAL and static.packed:
        visible = (query + tile_distance >= key) & (key >= segment_start)
    elif CAUSAL:
        visible = query + tile_distance >= key
    else:
        visible = key >= segment_start
    return visible
