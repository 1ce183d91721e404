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
    FIRST_FIRST,
    LAST_FIRST,
    LAST_LAST,
    add_diagonals,
    at_tile,
    bias_start,
    bias_tile,
    dot,
    thresholds,
    visible,
)


class _Step:
    """One step's references, and what it does to each tile."""

    def __init__(self, plan: Plan, refs: Any):
        self.plan, self.refs = plan, refs
        self.batch, self.key_head, self.chunk = (pl.program_id(n) for n in range(3))
        self.member, self.query_tile = pl.program_id(3), pl.program_id(4)
        self.head = self.key_head * plan.group + self.member
        self.chunk_tiles = plan.padded_length // plan.backward_chunks // plan.keys
        self.base = self.chunk * self.chunk_tiles
        at = (self.batch * plan.heads + self.head) * plan.query_tiles + self.query_tile
        self.first = refs.first[at]
        self.live_tile = refs.live[at] if plan.has_offset else self.first
        self.diagonal = self.query_tile * plan.ratio

    def facts(self) -> None:
        """Before the tiles: delta, and the query's part in the gradient of the offset."""
        plan, refs = self.plan, self.refs
        d_out = refs.d_out[0, 0].astype(jnp.float32)
        out = refs.out[0, 0].astype(jnp.float32)
        if plan.half:
            out = out + refs.rounding[0, 0].astype(jnp.float32)
        delta = jnp.sum(d_out * out, axis=0, keepdims=True)
        if plan.has_offset:
            tau = refs.tau[self.head]
            pull = jnp.sum(d_out * refs.mean[0, 0].astype(jnp.float32), axis=0, keepdims=True)
            refs.pull[0, 0] = pull
            delta = delta - tau * pull
            refs.threshold[...] = thresholds(plan, tau, refs.scale[0], self.query_tile)
        refs.delta[...] = delta
        refs.sum[...] = jnp.zeros_like(refs.sum)

    def add(self, live: bool, tile: Any, skipped: int | None = None) -> None:
        """Adds a tile's part to all gradients."""
        plan, refs = self.plan, self.refs
        diagonal, cut = skipped is not None, slice(skipped or 0, None)
        at = at_tile(tile - self.base, plan.keys)
        key, query = refs.key[0, 0, :, at], refs.query[0, 0, :, cut]
        scores = dot(key, query, FIRST_FIRST) * plan.score_scale
        start = bias_start(plan, self.diagonal - tile)
        if plan.has_bias:
            window = refs.bias[0, :, pl.ds(start, plan.bias_window)]
            scores = scores + bias_tile(plan, window, cut.start)
        document = refs.document[0, :, cut] if plan.packed else None
        seen = visible(plan, document, tile, scores.shape, diagonal=diagonal)
        softmax = jnp.exp2(scores - refs.log_sum[0, 0, :, cut])
        if seen is not None:
            softmax = jnp.where(seen, softmax, 0)
        delta = refs.delta[:, cut]
        if live:
            d_out = refs.d_out[0, 0, :, cut]
            d_weights = dot(refs.value[0, 0, :, at], d_out, FIRST_FIRST)
            weights = softmax
            if plan.has_offset:
                weights = jnp.maximum(softmax - refs.threshold[:, cut], 0)
                if seen is not None:
                    weights = jnp.where(seen, weights, 0)
                d_weights = jnp.where(weights == 0, 0, d_weights)
            refs.d_value[0, 0, at, :] += dot(weights.astype(d_out.dtype), d_out, LAST_LAST)
            d_scores = softmax * (d_weights - delta)
        else:
            d_scores = -softmax * delta
        if plan.has_bias:
            add_diagonals(plan, refs.d_bias.at[0, 0, 0], start, d_scores, cut.start)
        d_scores = d_scores.astype(query.dtype)
        refs.d_key[0, 0, at, :] += dot(d_scores, query, LAST_LAST)
        refs.sum[:, cut] += dot(key, d_scores, LAST_FIRST)

    def tiles(self) -> None:
        """Adds all visited tiles of the chunk."""
        end = self.base + self.chunk_tiles
        stop = jnp.minimum(self.diagonal, end)
        first = jnp.minimum(jnp.maximum(self.first, self.base), stop)
        live = jnp.clip(self.live_tile, first, stop)
        if self.plan.has_offset and self.plan.skip_dead:

            @pl.loop(first, live)
            def _(tile):
                self.add(False, tile)
        else:
            live = first

        @pl.loop(live, stop)
        def _(tile):
            self.add(True, tile)

        def on_diagonal() -> None:
            for crossed in range(self.plan.ratio):
                self.add(True, self.diagonal + crossed, crossed * self.plan.keys)

        if self.plan.backward_chunks == 1:
            on_diagonal()
        else:
            pl.when((self.diagonal >= self.base) & (self.diagonal < end))(on_diagonal)

    def start(self) -> None:
        """Clears the sums over queries and over the heads of a group."""
        refs = self.refs

        @pl.when((self.member == 0) & (self.query_tile == 0))
        def _():
            refs.d_key[...] = jnp.zeros_like(refs.d_key)
            refs.d_value[...] = jnp.zeros_like(refs.d_value)

        if self.plan.has_bias:

            @pl.when(self.query_tile == 0)
            def _():
                refs.d_bias[...] = jnp.zeros_like(refs.d_bias)

    def run(self) -> None:
        """Does the step."""
        plan, refs = self.plan, self.refs
        self.start()
        self.facts()
        if plan.backward_chunks == 1:
            self.tiles()
            refs.d_query[0, 0] = (refs.sum[...] * plan.scale).astype(refs.d_query.dtype)
        else:
            end = self.base + self.chunk_tiles

            @pl.when((self.first < end) & (self.diagonal >= self.base))
            def _():
                at = at_tile(self.query_tile, plan.queries)
                stored = refs.d_query.at[self.batch, self.head, :, at]
                pltpu.sync_copy(stored, refs.before)
                self.tiles()
                refs.before[...] += refs.sum[...] * plan.scale
                pltpu.sync_copy(refs.before, stored)

        @pl.when((self.member == plan.group - 1) & (self.query_tile == plan.query_tiles - 1))
        def _():
            refs.d_key[...] *= plan.scale


def _kernel(plan: Plan, refs: Any) -> None:
    _Step(plan, refs).run()


def backward(
    plan: Plan,
    groups: int,
    query: Array,
    key: Array,
    value: Array,
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
      value: see `query`.
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
      gradients of query [batch, heads, head_dim, length]; of key and value
      [batch, kv_heads, length, head_dim], float32; of `Plan.bias` before its factor,
      [batch, heads, 8, bias_length], float32; and each query's part in that of the offset,
      [batch, heads, 1, length], float32. Dummies for what the call has not.
    """
    batch, heads, dim, length = query.shape
    queries, chunks, float32 = plan.queries, plan.backward_chunks, jnp.float32
    chunk = length // chunks

    def head(h, g):
        return h * plan.group + g

    def own(b, h, c, g, i, *refs):
        return b, head(h, g), 0, i

    def keys(b, h, c, g, i, *refs):
        return b, h, 0, c

    def row(b, h, c, g, i, *refs):
        return b, 0, i

    tile = (1, 1, dim, queries)
    inputs = [
        Operand("query", query, tile, own),
        Operand("key", key, (1, 1, dim, chunk), keys),
        Operand("value", value, (1, 1, dim, chunk), keys),
        Operand("log_sum", log_sum, (1, 1, 1, queries), own),
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
    }
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
        inputs.append(Operand("document", document, (1, 1, queries), row))
    scalars = {"first": plan.ranges(first)}
    if plan.has_offset:
        scalars |= {"live": plan.ranges(live), "tau": tau}
        inputs.append(Operand("scale", scale, (1, 1, queries), row))
        inputs.append(Operand("mean", mean, tile, own))
        rows = jax.ShapeDtypeStruct((batch, heads, 1, length), float32)
        outputs.append(Operand("pull", rows, (1, 1, 1, queries), own))
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
        (batch, plan.key_heads, chunks, plan.group, plan.query_tiles),
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
        found["pull"] if plan.has_offset else nothing,
    )
