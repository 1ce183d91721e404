"""The forward pass: log-sum-exp first, then what survives.

A step does one tile of queries of one head, with the keys of its head in VMEM. The first
sweep walks from the diagonal backwards over the tiles that are not negligible, sums the
exponentials and keeps each tile's largest scores; these and the final log-sum-exp tell the
farthest live tile. The second sweep goes over the live ones. Without an offset one sweep
does it all.

Keys that don't fit into VMEM are cut into chunks, a step each: from the diagonal's chunk
to the first for the first sweep, and back for the second.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.tpu.call import Operand, launch
from pallas_kernels.tpu.plan import SUBLANES, Plan
from pallas_kernels.tpu.tile import (
    DEAD_SLACK,
    FIRST_FIRST,
    LAST_FIRST,
    LOWEST,
    UNREACHABLE,
    at_tile,
    bias_start,
    bias_tile,
    dot,
    thresholds,
    visible,
)


def _fold(x: Array, combine: Any) -> Array:
    """Combines keys that are a multiple of eight apart: [keys, queries] -> [8, queries]."""
    parts = [x[at : at + SUBLANES] for at in range(0, x.shape[0], SUBLANES)]
    while len(parts) > 1:
        pairs = list(zip(parts[::2], parts[1::2], strict=False))
        parts = [combine(a, b) for a, b in pairs] + parts[2 * len(pairs) :]
    return parts[0]


class _Step:
    """One step's references, and the sweeps over them."""

    def __init__(self, plan: Plan, training: bool, refs: Any):
        self.plan, self.training, self.refs = plan, training, refs
        self.batch, self.head = pl.program_id(0), pl.program_id(1)
        self.query_tile, self.step = pl.program_id(2), pl.program_id(3)
        self.chunk_tiles = plan.padded_length // plan.forward_chunks // plan.keys
        at = (self.batch * plan.heads + self.head) * plan.query_tiles + self.query_tile
        self.first = refs.first[at]
        self.diagonal = self.query_tile * plan.ratio

    def scores(self, tile: Any, base: Any, *, skipped: int | None = None) -> tuple[Array, Any]:
        """Returns a tile's scores, and what its queries see.

        Args:
          tile: index of the tile of keys.
          base: index of the first one in VMEM.
          skipped: queries cut off; None: not on the diagonal.
        """
        plan, refs = self.plan, self.refs
        diagonal, skipped = skipped is not None, skipped or 0
        key = refs.key[0, 0, :, at_tile(tile - base, plan.keys)]
        scores = dot(key, refs.query[0, 0, :, skipped:], FIRST_FIRST) * plan.score_scale
        if plan.has_bias:
            start = bias_start(plan, self.diagonal - tile)
            window = refs.bias[0, :, pl.ds(start, plan.bias_window)]
            scores = scores + bias_tile(plan, window, skipped)
        document = refs.document[0, :, skipped:] if plan.packed else None
        return scores, visible(plan, document, tile, scores.shape, diagonal=diagonal)

    def values(self, tile: Any, base: Any) -> Array:
        return self.refs.value[0, 0, :, at_tile(tile - base, self.plan.keys)]

    def over_diagonal(self, body: Any) -> None:
        for crossed in range(self.plan.ratio):
            body(self.diagonal + crossed, crossed * self.plan.keys)

    def add_exponentials(self, tile: Any, base: Any, skipped: int | None = None) -> None:
        """First sweep: keys that are equal modulo eight have a maximum and a sum each."""
        refs, cut = self.refs, slice(skipped or 0, None)
        scores, seen = self.scores(tile, base, skipped=skipped)
        if seen is not None:
            scores = jnp.where(seen, scores, LOWEST)
        highest = _fold(scores, jnp.maximum)
        maximum = jnp.maximum(refs.maximum[:, cut], highest)
        vectors = scores.shape[0] // SUBLANES
        shifted = scores.reshape(vectors, SUBLANES, -1) - maximum[None]
        total = _fold(jnp.exp2(shifted).reshape(scores.shape), jnp.add)
        refs.total[:, cut] = refs.total[:, cut] * jnp.exp2(refs.maximum[:, cut] - maximum) + total
        refs.maximum[:, cut] = maximum
        if skipped is None and self.plan.skip_dead and self.plan.has_offset:
            refs.highest[pl.ds(tile, 1), :] = jnp.max(highest, axis=0, keepdims=True)

    def add_values(self, tile: Any, base: Any, skipped: int | None = None) -> None:
        """Second sweep."""
        refs, cut = self.refs, slice(skipped or 0, None)
        scores, seen = self.scores(tile, base, skipped=skipped)
        softmax = jnp.exp2(scores - refs.log_total[:, cut])
        weights = jnp.maximum(softmax - refs.threshold[:, cut], 0)
        if seen is not None:
            weights = jnp.where(seen, weights, 0)
        value = self.values(tile, base)
        refs.sum[:, cut] += dot(value, weights.astype(value.dtype), LAST_FIRST)
        if self.training:
            # Not a number must come through.
            live = jnp.where(weights == 0, 0.0, 1.0).astype(value.dtype)
            refs.live_sum[:, cut] += dot(value, live, LAST_FIRST)

    def add_softmax(self, tile: Any, base: Any, skipped: int | None = None) -> None:
        """The only sweep where there is no offset."""
        refs, cut = self.refs, slice(skipped or 0, None)
        scores, seen = self.scores(tile, base, skipped=skipped)
        if seen is not None:
            scores = jnp.where(seen, scores, LOWEST)
        highest = jnp.max(_fold(scores, jnp.maximum), axis=0, keepdims=True)
        maximum = jnp.maximum(refs.log_total[:, cut], highest)
        shrink = jnp.exp2(refs.log_total[:, cut] - maximum)
        weights = jnp.exp2(scores - maximum)
        refs.total[:, cut] = refs.total[:, cut] * shrink + _fold(weights, jnp.add)
        refs.log_total[:, cut] = maximum
        value = self.values(tile, base)
        product = dot(value, weights.astype(value.dtype), LAST_FIRST)
        refs.sum[:, cut] = refs.sum[:, cut] * shrink + product

    def sweep(self, body: Any, chunk: Any, first: Any, *, backwards: bool) -> None:
        """Runs `body` over the tiles of a chunk from `first` to the diagonal."""
        base = chunk * self.chunk_tiles
        start = jnp.maximum(first, base)
        stop = jnp.minimum(self.diagonal, base + self.chunk_tiles)

        def on_diagonal() -> None:
            self.over_diagonal(lambda tile, skipped: body(tile, base, skipped))

        def below() -> None:
            @pl.loop(0, jnp.maximum(stop - start, 0))
            def _(n):
                body(stop - 1 - n if backwards else start + n, base)

        own = (self.diagonal >= base) & (self.diagonal < base + self.chunk_tiles)
        if self.plan.forward_chunks == 1:
            on_diagonal()
        else:
            pl.when(own)(on_diagonal)
        below()

    def start(self) -> None:
        """Before the first sweep."""
        refs = self.refs
        refs.total[...] = jnp.zeros_like(refs.total)
        if self.plan.has_offset:
            refs.maximum[...] = jnp.full_like(refs.maximum, LOWEST)
        else:
            refs.log_total[...] = jnp.full_like(refs.log_total, LOWEST)
            refs.sum[...] = jnp.zeros_like(refs.sum)

    def between(self) -> None:
        """After the first sweep: log-sum-exp, thresholds, and the first live tile."""
        plan, refs = self.plan, self.refs
        maximum = jnp.max(refs.maximum[...], axis=0, keepdims=True)
        total = jnp.sum(refs.total[...] * jnp.exp2(refs.maximum[...] - maximum), 0, keepdims=True)
        log_total = maximum + jnp.log2(total)
        threshold = thresholds(plan, refs.tau[self.head], refs.scale[0], self.query_tile)
        refs.log_total[...] = log_total
        refs.threshold[...] = threshold
        refs.sum[...] = jnp.zeros_like(refs.sum)
        if self.training:
            refs.live_sum[...] = jnp.zeros_like(refs.live_sum)
        refs.live_tile[0] = self.first
        if plan.skip_dead:
            logarithm = jnp.log2(jnp.where(threshold > 0, threshold, 1))
            bar = jnp.where(threshold > 0, log_total + logarithm - DEAD_SLACK, -UNREACHABLE)

            def farthest(n: Any, found: Array) -> Array:
                tile = self.diagonal - 1 - n
                # Not a number is not below anything.
                dead = refs.highest[pl.ds(tile, 1), :] <= bar
                return jnp.where(dead, found, tile.astype(jnp.float32))

            none = jnp.full(bar.shape, self.diagonal, jnp.float32)
            found = jax.lax.fori_loop(0, self.diagonal - self.first, farthest, none)
            refs.live_tile[0] = jnp.min(found).astype(jnp.int32)

    def finish(self) -> None:
        """After the last sweep: outputs."""
        plan, refs = self.plan, self.refs
        dtype = refs.out.dtype
        if plan.has_offset:
            out = refs.sum[...]
        else:
            total = jnp.sum(refs.total[...], axis=0, keepdims=True)
            out = refs.sum[...] / total
        refs.out[0, 0] = out.astype(dtype)
        if not self.training:
            return
        rounding = out - out.astype(dtype).astype(jnp.float32)
        if plan.has_offset:
            mean = refs.live_sum[...] * refs.scale[0]
            refs.mean[0, 0] = mean.astype(dtype)
            left = mean - mean.astype(dtype).astype(jnp.float32)
            rounding = rounding - refs.tau[self.head] * left
            refs.log_sum[0, 0] = refs.log_total[...]
            tile = jax.lax.broadcasted_iota(jnp.int32, refs.live.shape[2:], 1)
            before = jnp.where(self.query_tile == 0, 0, refs.live[0, 0])
            refs.live[0, 0] = jnp.where(tile == self.query_tile, refs.live_tile[0], before)
        else:
            refs.log_sum[0, 0] = refs.log_total[...] + jnp.log2(total)
        if plan.half:
            refs.rounding[0, 0] = rounding.astype(dtype)

    def run(self) -> None:
        """Does the step."""
        chunks, last = self.plan.forward_chunks, pl.num_programs(3) - 1
        if not self.plan.has_offset:
            pl.when(self.step == 0)(self.start)
            self.sweep(self.add_softmax, chunks - 1 - self.step, self.first, backwards=True)
            pl.when(self.step == last)(self.finish)
        elif chunks == 1:
            self.start()
            self.sweep(self.add_exponentials, 0, self.first, backwards=True)
            self.between()
            self.sweep(self.add_values, 0, self.refs.live_tile[0], backwards=False)
            self.finish()
        else:
            pl.when(self.step == 0)(self.start)

            @pl.when(self.step < chunks)
            def _():
                chunk = chunks - 1 - self.step
                self.sweep(self.add_exponentials, chunk, self.first, backwards=True)

            pl.when(self.step == chunks)(self.between)

            @pl.when(self.step >= chunks)
            def _():
                chunk = self.step - chunks
                self.sweep(self.add_values, chunk, self.refs.live_tile[0], backwards=False)

            pl.when(self.step == last)(self.finish)


def _chunk_index(plan: Plan, refs: Any, b: Any, h: Any, i: Any, step: Any, second: bool) -> Any:
    """Returns the chunk of keys, or of values, that a step wants: never an unvisited one."""
    chunks = plan.forward_chunks
    if chunks == 1:
        return 0
    tiles = plan.padded_length // chunks // plan.keys
    first = refs[0][(b * plan.heads + h) * plan.query_tiles + i] // tiles
    own = i * plan.ratio // tiles
    if not plan.has_offset:
        wanted = chunks - 1 - step
    elif second:
        wanted = step - chunks
    else:
        wanted = jnp.where(step < chunks, chunks - 1 - step, step - chunks)
    return jnp.clip(wanted, first, own)


def _kernel(plan: Plan, training: bool, refs: Any) -> None:
    _Step(plan, training, refs).run()


def forward(
    plan: Plan,
    training: bool,
    groups: int,
    query: Array,
    key: Array,
    value: Array,
    bias: Array,
    tau: Array,
    scale: Array,
    document: Array,
    first: Array,
) -> Any:
    """Launches the forward pass.

    Args:
      plan: of the call.
      training: also return residuals.
      groups: see `batching.over_batch`; only dummies need it.
      query: [batch, heads, head_dim, length], and so `key` and `value`: `Plan.to_kernel`.
      key: see `query`.
      value: see `query`.
      bias: `Plan.bias`.
      tau: [heads], offset.
      scale: [batch, 1, length], of tau.
      document: [batch, 1, length], first key each query sees.
      first: [batch, heads, query_tiles], first key tile each query tile visits.

    Returns:
      out [batch, heads, head_dim, length]; the mean of the values of live entries over all
      visible ones, and what out - offset * mean lost to rounding, the same shape; the
      log2-sum-exp2 of each query [batch, heads, 1, length]; the first live key tile of each
      query tile [batch, heads, query_tiles]. Dummies for what is not wanted.
    """
    batch, heads, dim, length = query.shape
    queries, float32 = plan.queries, jnp.float32
    chunk = length // plan.forward_chunks
    steps = plan.forward_chunks * (2 if plan.has_offset and plan.forward_chunks > 1 else 1)

    def own(b, h, i, step, *refs):
        return b, h, 0, i

    def keys(second):
        def index(b, h, i, step, *refs):
            return b, h // plan.group, 0, _chunk_index(plan, refs, b, h, i, step, second)

        return index

    def row(b, h, i, step, *refs):
        return b, 0, i

    inputs = [
        Operand("query", query, (1, 1, dim, queries), own),
        Operand("key", key, (1, 1, dim, chunk), keys(False)),
        Operand("value", value, (1, 1, dim, chunk), keys(True)),
    ]
    if plan.has_bias:
        inputs.append(
            Operand("bias", bias, (1, *bias.shape[1:]), lambda b, h, i, step, *refs: (h, 0, 0))
        )
    if plan.has_offset:
        inputs.append(Operand("scale", scale, (1, 1, queries), row))
    if plan.packed:
        inputs.append(Operand("document", document, (1, 1, queries), row))
    same = jax.ShapeDtypeStruct(query.shape, query.dtype)
    outputs = [Operand("out", same, (1, 1, dim, queries), own)]
    if training:
        rows = jax.ShapeDtypeStruct((batch, heads, 1, length), float32)
        outputs.append(Operand("log_sum", rows, (1, 1, 1, queries), own))
        if plan.half:
            outputs.append(Operand("rounding", same, (1, 1, dim, queries), own))
        if plan.has_offset:
            live = jax.ShapeDtypeStruct((batch, heads, 1, plan.query_tiles), jnp.int32)
            outputs.append(Operand("mean", same, (1, 1, dim, queries), own))
            outputs.append(
                Operand(
                    "live",
                    live,
                    (1, 1, 1, plan.query_tiles),
                    lambda b, h, i, step, *refs: (b, h, 0, 0),
                )
            )
    one_row = pltpu.VMEM((1, queries), float32)
    scratch = {
        "sum": pltpu.VMEM((dim, queries), float32),
        "total": pltpu.VMEM((SUBLANES, queries), float32),
        "log_total": one_row,
    }
    if plan.has_offset:
        scratch |= {
            "maximum": pltpu.VMEM((SUBLANES, queries), float32),
            "threshold": one_row,
            "live_sum": pltpu.VMEM((dim, queries), float32),
            "highest": pltpu.VMEM((length // plan.keys, queries), float32),
            "live_tile": pltpu.SMEM((1,), jnp.int32),
        }
    found = launch(
        functools.partial(_kernel, plan, training),
        "lazy_forward" if training else "lazy_inference",
        (batch, heads, plan.query_tiles, steps),
        2,
        {"first": plan.ranges(first), "tau": tau},
        inputs,
        outputs,
        scratch,
    )
    nothing = jnp.zeros(groups, query.dtype)
    live_tiles = found["live"][:, :, 0] if "live" in found else first
    return (
        found["out"],
        found.get("mean", nothing),
        found.get("rounding", nothing),
        found.get("log_sum", nothing),
        live_tiles,
    )
