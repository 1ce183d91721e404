"""The backward pass: dQ, dK, dV and the gradient of the bias in one launch.

With m the live entries, dP = V dO and delta = dO . (O - offset/n M); all tiles are
[keys, queries]:

    dS = P (m dP - delta)     dV += A dO     dK += dS Q     dQ += K^T dS

Dead tiles still have dS = -P delta, but need neither dP nor dV.

A step does a few tiles of queries of one head, with a chunk of its head's keys, and of their
gradients, in VMEM.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import bias as bias_lib
from pallas_kernels.problem import Gradients, Inputs, Residuals
from pallas_kernels.tpu.buffers import ALONE, HALF, Buffers, Layout, Sets, over_pairs, strips
from pallas_kernels.tpu.call import Operand, launch
from pallas_kernels.tpu.config import LANES
from pallas_kernels.tpu.kernel_types import Index, Refs, Scalar, Strips
from pallas_kernels.tpu.plan import SUBLANES, Plan
from pallas_kernels.tpu.tile import (
    EVERY,
    LAST_FIRST,
    LAST_LAST,
    UNREACHABLE,
    Bias,
    at_tile,
    dot,
    thresholds,
    views,
    visible,
)

# References that hold the queries of a step.
_OF_QUERIES = (
    *("query", "scale", "segment_start", "out", "d_out"),
    *("lse", "live_v_mean", "rounding", "pull"),
)


def backward(
    plan: Plan,
    inputs: Inputs,
    table: Float[Array, "heads padded_length"] | None,
    ranges: Int[Array, "batch heads query_tiles"],
    residuals: Residuals,
    d_out: Float[Array, "batch length heads head_dim"],
    groups: int,
) -> Gradients:
    """Launches the backward pass; returns the gradients.

    Those of bias and offset are of each of `groups` of the batch.
    """
    found = _launch(plan, inputs, table, ranges, residuals, d_out)

    def from_keys(x: Array, like: Array) -> Array:
        return plan.from_kernel(x.swapaxes(2, 3)).astype(like.dtype)

    def by_group(x: Array) -> Array:
        return x.reshape(groups, -1, *x.shape[1:])

    d_bias = d_slope = d_offset = None
    if inputs.distance_bias is not None:
        sums = by_group(found["d_bias"].sum(axis=1)).sum(axis=1)
        width = inputs.distance_bias.shape[1]
        d_values = plan.bias_gradient(sums)
        d_bias, d_slope = bias_lib.adjoint(d_values, width, has_slope=plan.has_slope)
    if plan.has_offset:
        d_offset = by_group(found["pull"].sum(axis=1)).sum(axis=(1, 3, 4))
    return Gradients(
        query=plan.from_kernel(found["d_query"]).astype(inputs.query.dtype),
        key=from_keys(plan.scale * found["d_key"], inputs.key),
        value=from_keys(found["d_value"], inputs.value),
        distance_bias=d_bias,
        distance_slope=d_slope,
        offset=d_offset,
    )


def _launch(
    plan: Plan,
    inputs: Inputs,
    table: Array | None,
    ranges: Array,
    residuals: Residuals,
    d_out: Array,
) -> dict[str, Array]:
    """Returns what the kernel writes, by name.

    Gradients of query [batch, heads, padded_dim, padded]; of key, before its factor `scale`, and
    of value [batch, kv_heads, padded, padded_dim], float32; of `Plan.bias`, before its factor,
    [batch, chunks, heads, 8, bias_length], float32; and each query's part in that of the offset,
    [batch, chunks, heads, 1, padded], float32. The last two only if the call has them.
    """
    query, key_columns = plan.to_kernel(inputs.query), plan.to_kernel(inputs.key)
    key, value = plan.to_kernel_rows(inputs.key), plan.to_kernel_rows(inputs.value)
    assert residuals.out is not None
    out, d_out = plan.to_kernel(residuals.out), plan.to_kernel(d_out)
    batch, heads, dim, length = query.shape
    queries, chunks, float32 = plan.queries, plan.backward_chunks, jnp.float32
    chunk = length // chunks

    def head(h, g):
        return h * plan.group + g

    def own(b, h, c, g, i, *refs):
        return b, head(h, g), 0, i

    def rows(b, h, c, g, i, *refs):
        return b, h, c, 0

    def columns(b, h, c, g, i, *refs):
        return b, h, 0, c

    def row(b, h, c, g, i, *refs):
        return b, 0, i

    def pull_of(b, h, c, g, i, *refs):
        return b, c, head(h, g), 0, i

    def bias_of(b, h, c, g, i, *refs):
        return head(h, g), 0, 0

    def d_bias_of(b, h, c, g, i, *refs):
        return b, c, head(h, g), 0, 0

    block = queries * plan.tiles_a_step
    tile = (1, 1, dim, block)
    operands = [
        Operand("query", query, tile, own),
        Operand("key", key, (1, 1, chunk, dim), rows),
        Operand("value", value, (1, 1, chunk, dim), rows),
        Operand("key_columns", key_columns, (1, 1, dim, chunk), columns),
        Operand("lse", residuals.lse, (1, 1, 1, block), own),
        Operand("out", out, tile, own),
        Operand("d_out", d_out, tile, own),
    ]
    of_keys = jax.ShapeDtypeStruct((batch, plan.key_heads, length, dim), float32)
    outputs = [Operand(name, of_keys, (1, 1, chunk, dim), rows) for name in ("d_key", "d_value")]
    scratch = dict(sum=pltpu.VMEM((dim, queries), float32), delta=pltpu.VMEM((1, queries), float32))
    scratch |= layout(plan).scratch() | Bias.scratch(plan, backward=True)
    aliases = {}
    if chunks == 1:
        same = jax.ShapeDtypeStruct(query.shape, query.dtype)
        outputs.append(Operand("d_query", same, tile, own))
    else:
        # Each chunk adds its part in place.
        operands.append(Operand("no_d_query", jnp.zeros(query.shape, float32), None))
        outputs.append(Operand("d_query", jax.ShapeDtypeStruct(query.shape, float32), None))
        aliases = {"no_d_query": "d_query"}
        scratch["before"] = pltpu.VMEM((dim, queries), float32)
    if plan.half:
        assert residuals.rounding is not None
        operands.append(Operand("rounding", residuals.rounding, tile, own))
    if plan.packed:
        segment_start = plan.rows(inputs.segment_start, mode="edge")
        operands.append(Operand("segment_start", segment_start, (1, 1, block), row))
    scalars = {"first": ranges.reshape(-1)}
    if plan.has_offset:
        assert residuals.live is not None and residuals.live_v is not None
        assert inputs.offset is not None
        scalars |= {"live": residuals.live.reshape(-1), "tau": inputs.offset}
        operands.append(Operand("scale", plan.rows(inputs.offset_scale), (1, 1, block), row))
        operands.append(Operand("live_v_mean", residuals.live_v, tile, own))
        pulls = jax.ShapeDtypeStruct((batch, chunks, heads, 1, length), float32)
        outputs.append(Operand("pull", pulls, (1, 1, 1, 1, block), pull_of))
        scratch["threshold"] = pltpu.VMEM((1, queries), float32)
    if table is not None:
        bias = plan.bias(table)
        operands.append(Operand("bias", bias, (1, *bias.shape[1:]), bias_of))
        sums = jax.ShapeDtypeStruct((batch, chunks, *bias.shape), float32)
        outputs.append(Operand("d_bias", sums, (1, 1, 1, *bias.shape[1:]), d_bias_of))
    return launch(
        functools.partial(_kernel, plan),
        "lazy_backward",
        (batch, plan.key_heads, chunks, plan.group, plan.steps),
        2,
        scalars,
        operands,
        outputs,
        scratch,
        aliases,
        plan.interpret,
    )


def _start(plan: Plan, refs: Refs) -> None:
    """Clears the sums over queries and over the heads of a group."""
    member, step = pl.program_id(3), pl.program_id(4)

    @pl.when((member == 0) & (step == 0))
    def _():
        refs.d_key[...] = jnp.zeros_like(refs.d_key)
        refs.d_value[...] = jnp.zeros_like(refs.d_value)

    if plan.has_bias:

        @pl.when(step == 0)
        def _():
            Bias(plan, refs).start()
            Bias(plan, refs).clear()


def _kernel(plan: Plan, refs: Refs) -> None:
    _start(plan, refs)
    if plan.tiles_a_step == 1:
        QueryTile(plan, refs, 0).run()
    else:

        @pl.loop(0, plan.tiles_a_step)
        def _(within):
            QueryTile(plan, refs, within).run()

    if plan.has_bias:
        pl.when(pl.program_id(4) == plan.steps - 1)(Bias(plan, refs).finish)


def layout(plan: Plan) -> Layout:
    """Returns the buffers of a turn."""
    return Layout(plan, ("scores", "d_weights"), ("weights", "d_scores"))


def head_of(plan: Plan) -> Scalar:
    """Returns the head of a step."""
    return pl.program_id(1) * plan.group + pl.program_id(3)


class QueryTile:
    """One tile of queries, and what is done to each of its tiles."""

    def __init__(self, plan: Plan, refs: Refs, within: Index):
        self.plan = plan
        self.batch, self.head = pl.program_id(0), head_of(plan)
        self.query_tile = pl.program_id(4) * plan.tiles_a_step + within
        self.chunk_tiles = plan.padded_length // plan.backward_chunks // plan.keys
        self.base = pl.program_id(2) * self.chunk_tiles
        at = (self.batch * plan.heads + self.head) * plan.query_tiles + self.query_tile
        self.first = refs.first[at]
        self.live_tile = refs.live[at] if plan.has_offset else self.first
        self.diagonal = self.query_tile * plan.ratio
        names = _OF_QUERIES + (("d_query",) if plan.backward_chunks == 1 else ())
        self.refs = views(refs, names, at_tile(within, plan.queries))
        zero = jnp.minimum(refs.first[at], 0)
        self.buffers = Buffers(plan, refs, layout(plan))
        self.free = Bias(plan, refs), self.buffers
        self.in_order = Bias(plan, refs, zero), Buffers(plan, refs, layout(plan), zero)

    def run(self) -> None:
        """Does one query tile."""
        plan, refs = self.plan, self.refs
        if plan.backward_chunks == 1:
            self.row_stats()
            self.tiles()
            refs.d_query[...] = (refs.sum[...] * plan.scale).astype(refs.d_query.dtype)
            return
        end = self.base + self.chunk_tiles
        visited = jnp.logical_and(self.first < end, self.diagonal >= self.base)
        if plan.has_offset:
            nothing = jnp.zeros((1, plan.queries), jnp.float32)
            pl.when(jnp.logical_not(visited))(lambda: self.hand_over(nothing))

        @pl.when(visited)
        def _():
            at = at_tile(self.query_tile, plan.queries)
            self.row_stats()
            stored = refs.d_query.at[self.batch, self.head, :, at]
            pltpu.sync_copy(stored, refs.before)
            self.tiles()
            refs.before[...] += refs.sum[...] * plan.scale
            pltpu.sync_copy(refs.before, stored)

    def tiles(self) -> None:
        """Adds all visited tiles of the chunk."""
        plan, refs = self.plan, self.refs
        end = self.base + self.chunk_tiles
        stop = jnp.minimum(self.diagonal, end)
        first = jnp.minimum(jnp.maximum(self.first, self.base), stop)
        has_dead = plan.has_offset and plan.skip_dead
        live = jnp.clip(self.live_tile, first, stop) if has_dead else first

        def on_diagonal() -> None:
            for crossed in range(plan.ratio):
                tile, skipped = self.diagonal + crossed, crossed * plan.keys
                raw, d_weights = self.raw_products(tile, skipped, live=True)
                assert d_weights is not None
                if crossed:
                    self.multiply(tile - 1, ALONE.pending, skipped - plan.keys, live=True)
                self.work(tile, raw.__getitem__, d_weights.__getitem__, ALONE, skipped)
            if plan.ratio > 1:
                clear(slice(0, (plan.ratio - 1) * plan.keys))

        def clear(cut: slice) -> None:
            nothing = jnp.zeros((plan.keys, plan.queries), refs.query.dtype)
            for field in ("weights", "d_scores"):
                self.buffers.put(ALONE.results, field, nothing[:, cut], cut)

        if plan.backward_chunks == 1:
            on_diagonal()
        else:
            own = (self.diagonal >= self.base) & (self.diagonal < end)
            pl.when(own)(on_diagonal)
            pl.when(jnp.logical_not(own))(lambda: clear(slice(0, None)))
        before = jnp.minimum(self.diagonal + plan.ratio - 1, end - 1)
        self.prepare(stop - 1, ALONE.ahead, live=True)
        pending = self.walk(live, stop, before, live=True)
        if not has_dead:
            self.multiply(pending, ALONE.pending, live=True)
            return

        @pl.when(first == live)
        def _():
            self.multiply(pending, ALONE.pending, live=True)

        @pl.when(first < live)
        def _():
            self.multiply_weights(pending, ALONE.pending)
            last = self.walk(first, live, pending, live=False)
            self.multiply(last, ALONE.pending, live=False)

    def row_stats(self) -> None:
        """Before the tiles: delta, and the query's part in the gradient of the offset."""
        plan, refs = self.plan, self.refs
        d_out = refs.d_out[...].astype(jnp.float32)
        out = refs.out[...].astype(jnp.float32)
        if plan.half:
            out = out + refs.rounding[...].astype(jnp.float32)
        # Rows without mass, whose output is NaN, have no part in any gradient.
        massless = refs.lse[...] == UNREACHABLE
        delta = jnp.sum(d_out * out, axis=0, keepdims=True)
        if plan.has_offset:
            tau = refs.tau[self.head]
            pull = jnp.sum(d_out * refs.live_v_mean[...].astype(jnp.float32), axis=0, keepdims=True)
            pull = jnp.where(massless, 0, pull)
            self.hand_over(pull)
            delta = delta - tau * pull
            limit = thresholds(plan, tau, refs.scale[...], self.query_tile)
            refs.threshold[...] = jnp.where(massless, UNREACHABLE, limit)
        refs.delta[...] = jnp.where(massless, 0, delta)
        refs.sum[...] = jnp.zeros_like(refs.sum)

    def hand_over(self, pull: Array) -> None:
        """Stores the query's part in the gradient of the offset, in one of its chunks."""
        own = (self.diagonal >= self.base) & (self.diagonal < self.base + self.chunk_tiles)
        self.refs.pull[...] = pull if self.plan.backward_chunks == 1 else jnp.where(own, pull, 0)

    def raw_products(self, tile: Index, skipped: int, *, live: bool) -> tuple[Array, Array | None]:
        """Returns K Q and, for a live tile, V dO."""
        refs, at = self.refs, at_tile(tile - self.base, self.plan.keys)
        raw = dot(refs.key[0, 0, at, :], refs.query[:, skipped:], LAST_FIRST)
        if not live:
            return raw, None
        return raw, dot(refs.value[0, 0, at, :], refs.d_out[:, skipped:], LAST_FIRST)

    def prepare(self, tile: Index, into: int, *, live: bool) -> None:
        """Stores the products of the tile that the next turn works on."""
        raw, d_weights = self.raw_products(jnp.maximum(tile, self.base), 0, live=live)
        self.buffers.put(into, "scores", raw, EVERY)
        if d_weights is not None:
            self.buffers.put(into, "d_weights", d_weights, EVERY)

    def work(
        self, tile: Index, raw: Strips, raw_d: Strips | None, sets: Sets, skipped: int | None = None
    ) -> None:
        """Stores a tile's weights and dS, and adds dS to the gradient of the bias.

        `raw` gives K Q of some keys and `raw_d` V dO, None if the tile is dead. So many queries
        as are skipped are cut off; None: the tile is not on the diagonal.
        """
        plan, refs = self.plan, self.refs
        cut, dtype = slice(skipped or 0, None), refs.query.dtype
        bias, buffers = self.in_order if sets.in_order else self.free
        for keys in strips(plan, plan.strips.backward if sets.in_order else HALF):
            scores = raw(keys) * plan.score_scale
            if plan.has_bias:
                scores = scores + bias.tile(self.diagonal - tile, keys, cut.start)
            segment_start = refs.segment_start[:, cut] if plan.packed else None
            key = tile * plan.keys + keys.start
            on_diagonal = None if skipped is None else keys.start
            seen = visible(segment_start, key, scores.shape, on_diagonal)
            softmax = jnp.exp2(scores - refs.lse[:, cut])
            if seen is not None:
                softmax = jnp.where(seen, softmax, 0)
            if raw_d is None:
                d_scores = -softmax * refs.delta[:, cut]
            else:
                weights, d_weights = softmax, raw_d(keys)
                if plan.has_offset:
                    weights = jnp.maximum(softmax - refs.threshold[:, cut], 0)
                    if seen is not None:
                        weights = jnp.where(seen, weights, 0)
                    d_weights = jnp.where(weights == 0, 0, d_weights)
                buffers.store(sets.results, "weights", keys, weights.astype(dtype), cut)
                d_scores = softmax * (d_weights - refs.delta[:, cut])
            if plan.has_bias:
                bias.add(self.diagonal - tile, keys, d_scores, cut.start)
                bias.fence(keys, d_scores[:SUBLANES, :LANES])
            buffers.store(sets.results, "d_scores", keys, d_scores.astype(dtype), cut)

    def multiply_weights(self, tile: Index, of: int, skipped: int = 0) -> None:
        """Adds what `work` stored of a live tile to dV."""
        refs, cut = self.refs, slice(skipped, None)
        weights = self.buffers.whole(of, "weights", cut)
        at = at_tile(tile - self.base, self.plan.keys)
        refs.d_value[0, 0, at, :] += dot(weights, refs.d_out[:, cut], LAST_LAST)

    def multiply_for_key(self, tile: Index, of: int, skipped: int = 0) -> None:
        """Adds what `work` stored to dK."""
        refs, cut = self.refs, slice(skipped, None)
        d_scores = self.buffers.whole(of, "d_scores", cut)
        at = at_tile(tile - self.base, self.plan.keys)
        refs.d_key[0, 0, at, :] += dot(d_scores, refs.query[:, cut], LAST_LAST)

    def multiply_for_query(self, tile: Index, of: int, skipped: int = 0, parts: int = 1) -> None:
        """Adds what `work` stored to dQ, in so many parts of the queries."""
        refs = self.refs
        at = at_tile(tile - self.base, self.plan.keys)
        size = max(LANES, self.plan.queries // parts)
        for first in range(skipped, self.plan.queries, size):
            cut = slice(first, min(first + size, self.plan.queries))
            d_scores = self.buffers.whole(of, "d_scores", cut)
            refs.sum[:, cut] += dot(refs.key_columns[0, 0, :, at], d_scores, LAST_FIRST)

    def multiply(self, tile: Index, of: int, skipped: int = 0, *, live: bool) -> None:
        """Adds what `work` stored to all gradients."""
        if live:
            self.multiply_weights(tile, of, skipped)
        self.multiply_for_key(tile, of, skipped)
        self.multiply_for_query(tile, of, skipped)

    def walk(self, first: Index, stop: Index, before: Index, *, live: bool) -> Index:
        """Goes over tiles from `stop` back to `first`, all live or all dead.

        Expects the products of the first of them, and leaves those of the tile after the
        last. `before` is the tile still to be multiplied; returns which one is, then.
        """

        plan = self.plan

        def turn(n: Index, sets: Sets) -> None:
            tile = stop - 1 - n
            pending = jnp.where(n == 0, before, tile + 1)
            if plan.query_first:
                # Found by trying: in this order there are fewer bundles, and with these parts
                # no spills. v4 and v6e do better with the other one.
                self.multiply_for_query(pending, sets.pending, parts=1 if live else 2)
                if live:
                    self.multiply_weights(pending, sets.pending)
                self.multiply_for_key(pending, sets.pending)
            else:
                self.multiply(pending, sets.pending, live=live)

            def raw(field: str, keys: slice) -> Array:
                return self.buffers.load(sets.scores, field, keys, EVERY)

            raw_d = functools.partial(raw, "d_weights") if live else None
            self.work(tile, functools.partial(raw, "scores"), raw_d, sets)
            self.prepare(tile - 1, sets.ahead, live=live)

        over_pairs(stop - first, turn)
        return jnp.where(first == stop, before, first)
