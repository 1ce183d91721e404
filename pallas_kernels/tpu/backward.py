"""The backward pass: dQ, dK, dV and the gradient of the bias, one pass over visited tiles.

A step does one tile of queries of one head, with a chunk of its head's keys, and of their
gradients, in VMEM. With m the live entries, dP = V dO^T and
delta = dO . (O - offset/n M) (all tiles here are [keys, queries]):

    dS = P (m dP - delta)     dV += A dO     dK += dS Q     dQ += K^T dS

Dead tiles still have dS = -P delta, but need neither dP nor dV.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.tpu.call import Operand, launch
from pallas_kernels.tpu.plan import Plan
from pallas_kernels.tpu.tile import (
    LAST_FIRST,
    LAST_LAST,
    Bias,
    at_tile,
    dot,
    over_pairs,
    strips,
    thresholds,
    views,
    visible,
)

# References that hold the queries of a step.
_OF_QUERIES = ("query", "scale", "document", "out", "d_out", "log_sum", "mean", "rounding", "pull")


class _QueryTile:
    """One tile of queries, and what is done to each of its tiles."""

    def __init__(self, plan: Plan, refs: Any, within: Any):
        self.plan = plan
        self.batch, self.head = pl.program_id(0), _head(plan)
        self.query_tile = pl.program_id(4) * plan.tiles_a_step + within
        self.chunk_tiles = plan.padded_length // plan.backward_chunks // plan.keys
        self.base = pl.program_id(2) * self.chunk_tiles
        at = (self.batch * plan.heads + self.head) * plan.query_tiles + self.query_tile
        self.first = refs.first[at]
        self.live_tile = refs.live[at] if plan.has_offset else self.first
        self.diagonal = self.query_tile * plan.ratio
        names = _OF_QUERIES + (("d_query",) if plan.backward_chunks == 1 else ())
        self.refs = views(refs, names, at_tile(within, plan.queries))
        self.bias = Bias(plan, refs)

    def facts(self) -> None:
        """Before the tiles: delta, and the query's part in the gradient of the offset."""
        plan, refs = self.plan, self.refs
        d_out = refs.d_out[...].astype(jnp.float32)
        out = refs.out[...].astype(jnp.float32)
        if plan.half:
            out = out + refs.rounding[...].astype(jnp.float32)
        delta = jnp.sum(d_out * out, axis=0, keepdims=True)
        if plan.has_offset:
            tau = refs.tau[self.head]
            pull = jnp.sum(d_out * refs.mean[...].astype(jnp.float32), axis=0, keepdims=True)
            refs.pull[...] = pull
            delta = delta - tau * pull
            refs.threshold[...] = thresholds(plan, tau, refs.scale[...], self.query_tile)
        refs.delta[...] = delta
        refs.sum[...] = jnp.zeros_like(refs.sum)

    def raw_products(self, tile: Any, skipped: int, *, live: bool) -> tuple[Any, Any]:
        """Returns K Q and, for a live tile, V dO."""
        refs, at = self.refs, at_tile(tile - self.base, self.plan.keys)
        raw = dot(refs.key[0, 0, at, :], refs.query[:, skipped:], LAST_FIRST)
        if not live:
            return raw, None
        return raw, dot(refs.value[0, 0, at, :], refs.d_out[:, skipped:], LAST_FIRST)

    def prepare(self, tile: Any, *, live: bool) -> None:
        """Stores the products of the tile that the next turn works on."""
        raw, d_weights = self.raw_products(jnp.maximum(tile, self.base), 0, live=live)
        self.refs.scores[...] = raw
        if live:
            self.refs.d_weights[...] = d_weights

    def work(self, tile: Any, raw: Any, raw_d: Any, skipped: int | None = None) -> None:
        """Stores a tile's weights and dS, and adds dS to the gradient of the bias.

        Args:
          tile: index of the tile of keys.
          raw: K Q.
          raw_d: V dO; None: the tile is dead.
          skipped: queries cut off; None: not on the diagonal.
        """
        plan, refs = self.plan, self.refs
        cut, dtype = slice(skipped or 0, None), refs.d_scores.dtype
        for keys in strips(plan):
            scores = raw[keys, :] * plan.score_scale
            if plan.has_bias:
                scores = scores + self.bias.tile(self.diagonal - tile, keys, cut.start)
            document = refs.document[:, cut] if plan.packed else None
            key = tile * plan.keys + keys.start
            on_diagonal = None if skipped is None else keys.start
            seen = visible(document, key, scores.shape, on_diagonal)
            softmax = jnp.exp2(scores - refs.log_sum[:, cut])
            if seen is not None:
                softmax = jnp.where(seen, softmax, 0)
            if raw_d is None:
                d_scores = -softmax * refs.delta[:, cut]
            else:
                weights, d_weights = softmax, raw_d[keys, :]
                if plan.has_offset:
                    weights = jnp.maximum(softmax - refs.threshold[:, cut], 0)
                    if seen is not None:
                        weights = jnp.where(seen, weights, 0)
                    d_weights = jnp.where(weights == 0, 0, d_weights)
                refs.weights[keys, cut] = weights.astype(dtype)
                d_scores = softmax * (d_weights - refs.delta[:, cut])
            if plan.has_bias:
                self.bias.add(self.diagonal - tile, keys, d_scores, cut.start)
            refs.d_scores[keys, cut] = d_scores.astype(dtype)

    def multiply_weights(self, tile: Any, skipped: int = 0) -> None:
        """Adds what `work` stored of a live tile to dV."""
        refs, cut = self.refs, slice(skipped, None)
        at, d_out = at_tile(tile - self.base, self.plan.keys), refs.d_out[:, cut]
        refs.d_value[0, 0, at, :] += dot(refs.weights[:, cut], d_out, LAST_LAST)

    def multiply_d_scores(self, tile: Any, skipped: int = 0) -> None:
        """Adds what `work` stored to dQ and dK."""
        refs, cut = self.refs, slice(skipped, None)
        at, d_scores = at_tile(tile - self.base, self.plan.keys), refs.d_scores[:, cut]
        refs.d_key[0, 0, at, :] += dot(d_scores, refs.query[:, cut], LAST_LAST)
        refs.sum[:, cut] += dot(refs.key_columns[0, 0, :, at], d_scores, LAST_FIRST)

    def walk(self, first: Any, stop: Any, before: Any, *, live: bool) -> Any:
        """Goes over tiles from `stop` back to `first`, all live or all dead.

        Expects the products of the first of them, and leaves those of the tile after the
        last. `before` is the tile still to be multiplied; returns which one is, then.
        """

        def turn(n: Any) -> None:
            tile = stop - 1 - n
            pending = jnp.where(n == 0, before, tile + 1)
            if live:
                self.multiply_weights(pending)
            self.multiply_d_scores(pending)
            self.work(tile, self.refs.scores, self.refs.d_weights if live else None)
            self.prepare(tile - 1, live=live)

        over_pairs(stop - first, turn)
        return jnp.where(first == stop, before, first)

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
                if crossed:
                    self.multiply_weights(tile - 1, skipped - plan.keys)
                    self.multiply_d_scores(tile - 1, skipped - plan.keys)
                self.work(tile, raw, d_weights, skipped)
            if plan.ratio > 1:
                clear(slice(0, (plan.ratio - 1) * plan.keys))

        def clear(cut: slice) -> None:
            for ref in (refs.weights, refs.d_scores):
                ref[:, cut] = jnp.zeros_like(ref[:, cut])

        if plan.backward_chunks == 1:
            on_diagonal()
        else:
            own = (self.diagonal >= self.base) & (self.diagonal < end)
            pl.when(own)(on_diagonal)
            pl.when(jnp.logical_not(own))(lambda: clear(slice(0, None)))
        before = jnp.minimum(self.diagonal + plan.ratio - 1, end - 1)
        self.prepare(stop - 1, live=True)
        pending = self.walk(live, stop, before, live=True)
        if not has_dead:
            self.multiply_weights(pending)
            self.multiply_d_scores(pending)
            return

        @pl.when(first == live)
        def _():
            self.multiply_weights(pending)
            self.multiply_d_scores(pending)

        @pl.when(first < live)
        def _():
            self.multiply_weights(pending)
            self.multiply_d_scores(self.walk(first, live, pending, live=False))

    def run(self) -> None:
        """Does one query tile."""
        plan, refs = self.plan, self.refs
        self.facts()
        if plan.backward_chunks == 1:
            self.tiles()
            refs.d_query[...] = (refs.sum[...] * plan.scale).astype(refs.d_query.dtype)
            return
        end = self.base + self.chunk_tiles

        @pl.when((self.first < end) & (self.diagonal >= self.base))
        def _():
            at = at_tile(self.query_tile, plan.queries)
            stored = refs.d_query.at[self.batch, self.head, :, at]
            pltpu.sync_copy(stored, refs.before)
            self.tiles()
            refs.before[...] += refs.sum[...] * plan.scale
            pltpu.sync_copy(refs.before, stored)


def _head(plan: Plan) -> Any:
    return pl.program_id(1) * plan.group + pl.program_id(3)


def _start(plan: Plan, refs: Any) -> None:
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


def _kernel(plan: Plan, refs: Any) -> None:
    _start(plan, refs)
    if plan.tiles_a_step == 1:
        _QueryTile(plan, refs, 0).run()
    else:

        @pl.loop(0, plan.tiles_a_step)
        def _(within):
            _QueryTile(plan, refs, within).run()

    if plan.has_bias:
        pl.when(pl.program_id(4) == plan.steps - 1)(Bias(plan, refs).finish)


def backward(
    plan: Plan,
    groups: int,
    query: Array,
    key: Array,
    value: Array,
    key_columns: Array,
    bias: Array,
    tau: Array,
    scale: Array,
    document: Array,
    first: Array,
    live: Array,
    log_sum: Array,
    out: Array,
    mean: Array,
    rounding: Array,
    d_out: Array,
) -> tuple[Array, Array, Array, Array, Array]:
    """Launches the backward pass.

    Args:
      plan: of the call.
      groups: see `batching.over_batch`; only dummies need it.
      query: as in `forward.forward`, and so the others up to `first`.
      key: see `query`.
      value: likewise upright, [batch, kv_heads, length, head_dim].
      key_columns: `key` as [batch, kv_heads, head_dim, length].
      bias: see `query`.
      tau: see `query`.
      scale: see `query`.
      document: see `query`.
      first: see `query`.
      live: as returned by `forward.forward`, and so the others up to `rounding`.
      log_sum: see `live`.
      out: see `live`.
      mean: see `live`.
      rounding: see `live`.
      d_out: gradient of `out`.

    Returns:
      gradients of query [batch, heads, head_dim, length]; of key, before its factor `scale`,
      and of value [batch, kv_heads, length, head_dim], float32; of `Plan.bias`, before its
      factor, [batch, heads, 8, bias_length], float32; and each query's part in that of the
      offset, [batch, heads, 1, length], float32. Dummies for what the call has not.
    """
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

    block = queries * plan.tiles_a_step
    tile = (1, 1, dim, block)
    inputs = [
        Operand("query", query, tile, own),
        Operand("key", key, (1, 1, chunk, dim), rows),
        Operand("value", value, (1, 1, chunk, dim), rows),
        Operand("key_columns", key_columns, (1, 1, dim, chunk), columns),
        Operand("log_sum", log_sum, (1, 1, 1, block), own),
        Operand("out", out, tile, own),
        Operand("d_out", d_out, tile, own),
    ]
    outputs = [
        Operand(
            name,
            jax.ShapeDtypeStruct((batch, plan.key_heads, length, dim), float32),
            (1, 1, chunk, dim),
            lambda b, h, c, g, i, *refs: (b, h, c, 0),
        )
        for name in ("d_key", "d_value")
    ]
    scratch = {
        "sum": pltpu.VMEM((dim, queries), float32),
        "delta": pltpu.VMEM((1, queries), float32),
        "scores": pltpu.VMEM((plan.keys, queries), float32),
        "d_weights": pltpu.VMEM((plan.keys, queries), float32),
        "weights": pltpu.VMEM((plan.keys, queries), query.dtype),
        "d_scores": pltpu.VMEM((plan.keys, queries), query.dtype),
    } | Bias.scratch(plan, backward=True)
    aliases = {}
    if chunks == 1:
        same = jax.ShapeDtypeStruct(query.shape, query.dtype)
        outputs.append(Operand("d_query", same, tile, own))
    else:
        # Each chunk adds its part in place.
        inputs.append(Operand("no_d_query", jnp.zeros(query.shape, float32), None))
        outputs.append(Operand("d_query", jax.ShapeDtypeStruct(query.shape, float32), None))
        aliases = {"no_d_query": "d_query"}
        scratch["before"] = pltpu.VMEM((dim, queries), float32)
    if plan.half:
        inputs.append(Operand("rounding", rounding, tile, own))
    if plan.packed:
        inputs.append(Operand("document", document, (1, 1, block), row))
    scalars = {"first": plan.ranges(first)}
    if plan.has_offset:
        scalars |= {"live": plan.ranges(live), "tau": tau}
        inputs.append(Operand("scale", scale, (1, 1, block), row))
        inputs.append(Operand("mean", mean, tile, own))
        pulls = jax.ShapeDtypeStruct((batch, chunks, heads, 1, length), float32)
        outputs.append(
            Operand(
                "pull",
                pulls,
                (1, 1, 1, 1, block),
                lambda b, h, c, g, i, *refs: (b, c, head(h, g), 0, i),
            )
        )
        scratch["threshold"] = pltpu.VMEM((1, queries), float32)
    if plan.has_bias:
        inputs.append(
            Operand(
                "bias",
                bias,
                (1, *bias.shape[1:]),
                lambda b, h, c, g, i, *refs: (head(h, g), 0, 0),
            )
        )
        sums = jax.ShapeDtypeStruct((batch, chunks, *bias.shape), float32)
        outputs.append(
            Operand(
                "d_bias",
                sums,
                (1, 1, 1, *bias.shape[1:]),
                lambda b, h, c, g, i, *refs: (b, c, head(h, g), 0, 0),
            )
        )
    found = launch(
        functools.partial(_kernel, plan),
        "lazy_backward",
        (batch, plan.key_heads, chunks, plan.group, plan.steps),
        2,
        scalars,
        inputs,
        outputs,
        scratch,
        aliases,
    )
    nothing = jnp.zeros(groups, float32)
    return (
        found["d_query"],
        found["d_key"],
        found["d_value"],
        found["d_bias"].sum(axis=1) if plan.has_bias else nothing,
        found["pull"][:, 0] if plan.has_offset else nothing,
    )
