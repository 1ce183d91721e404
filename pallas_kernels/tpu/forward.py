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
    LAST_FIRST,
    LOWEST,
    UNREACHABLE,
    Bias,
    at_tile,
    dot,
    over_pairs,
    strips,
    thresholds,
    views,
    visible,
)


def _fold(x: Array, combine: Any) -> Array:
    """Combines keys that are a multiple of eight apart: [keys, queries] -> [8, queries]."""
    parts = [x[at : at + SUBLANES] for at in range(0, x.shape[0], SUBLANES)]
    while len(parts) > 1:
        pairs = list(zip(parts[::2], parts[1::2], strict=False))
        parts = [combine(a, b) for a, b in pairs] + parts[2 * len(pairs) :]
    return parts[0]


# References that hold the queries of a step.
_OF_QUERIES = ("query", "scale", "document", "out", "log_sum", "mean", "rounding")


class _QueryTile:
    """One tile of queries, and the sweeps over its keys.

    A sweep's loop is a pipeline: one turn stores the raw scores of the next tile, works on
    those the turn before stored, and multiplies values by the weights of the tile before
    that. So the matrix units have work that waits for nothing, and what a turn holds in
    registers is little.
    """

    def __init__(self, plan: Plan, training: bool, refs: Any, within: Any):
        self.plan, self.training = plan, training
        self.head, self.step = pl.program_id(1), pl.program_id(3)
        self.query_tile = pl.program_id(2) * _tiles_a_step(plan) + within
        self.chunk_tiles = plan.padded_length // plan.forward_chunks // plan.keys
        row = pl.program_id(0) * plan.heads + self.head
        self.first = refs.first[row * plan.query_tiles + self.query_tile]
        self.diagonal = self.query_tile * plan.ratio
        self.refs = views(refs, _OF_QUERIES, at_tile(within, plan.queries))
        self.bias = Bias(plan, refs)

    def raw_scores(self, tile: Any, base: Any, skipped: int = 0) -> Array:
        """Returns K Q of a tile; `base` is the first tile in VMEM."""
        refs = self.refs
        key = refs.key[0, 0, at_tile(tile - base, self.plan.keys), :]
        return dot(key, refs.query[:, skipped:], LAST_FIRST)

    def scores(self, tile: Any, raw: Array, keys: slice, skipped: int | None) -> Any:
        """Returns the scores of some keys of a tile, and what is seen of them.

        Args:
          tile: index of the tile.
          raw: `raw_scores` of these keys.
          keys: which ones.
          skipped: queries cut off; None: not on the diagonal.
        """
        plan, refs = self.plan, self.refs
        on_diagonal, skipped = None if skipped is None else keys.start, skipped or 0
        scores = raw * plan.score_scale
        if plan.has_bias:
            scores = scores + self.bias.tile(self.diagonal - tile, keys, skipped)
        document = refs.document[:, skipped:] if plan.packed else None
        key = tile * plan.keys + keys.start
        return scores, visible(document, key, scores.shape, on_diagonal)

    def add_exponentials(self, tile: Any, raw: Any, skipped: int | None = None) -> None:
        """First sweep: keys that are equal modulo eight have a maximum and a sum each."""
        refs, cut = self.refs, slice(skipped or 0, None)
        maximum, total = refs.maximum[:, cut], refs.total[:, cut]
        every = jnp.full(maximum.shape, LOWEST)
        for keys in strips(self.plan):
            scores, seen = self.scores(tile, raw[keys, :], keys, skipped)
            if seen is not None:
                scores = jnp.where(seen, scores, LOWEST)
            highest = _fold(scores, jnp.maximum)
            every = jnp.maximum(every, highest)
            new = jnp.maximum(maximum, highest)
            vectors = scores.reshape(-1, SUBLANES, scores.shape[1])
            exponentials = jnp.exp2(vectors - new[None]).reshape(scores.shape)
            total = total * jnp.exp2(maximum - new) + _fold(exponentials, jnp.add)
            maximum = new
        refs.maximum[:, cut], refs.total[:, cut] = maximum, total
        if skipped is None and self.plan.skip_dead:
            refs.highest[pl.ds(tile, 1), :] = jnp.max(every, axis=0, keepdims=True)

    def weigh(self, tile: Any, raw: Any, skipped: int | None = None) -> None:
        """Second sweep: stores a tile's weights."""
        refs, cut = self.refs, slice(skipped or 0, None)
        dtype = refs.weights.dtype
        for keys in strips(self.plan):
            scores, seen = self.scores(tile, raw[keys, :], keys, skipped)
            softmax = jnp.exp2(scores - refs.log_total[:, cut])
            weights = jnp.maximum(softmax - refs.threshold[:, cut], 0)
            if seen is not None:
                weights = jnp.where(seen, weights, 0)
            refs.weights[keys, cut] = weights.astype(dtype)
            if self.training:
                # Not a number must come through.
                refs.alive[keys, cut] = jnp.where(weights == 0, 0.0, 1.0).astype(dtype)

    def multiply(self, tile: Any, base: Any, skipped: int = 0) -> None:
        """Second sweep: multiplies values by the weights that `weigh` stored."""
        refs, cut = self.refs, slice(skipped, None)
        value = refs.value[0, 0, :, at_tile(tile - base, self.plan.keys)]
        refs.sum[:, cut] += dot(value, refs.weights[:, cut], LAST_FIRST)
        if self.training:
            refs.live_sum[:, cut] += dot(value, refs.alive[:, cut], LAST_FIRST)

    def add_softmax(self, tile: Any, base: Any, raw: Any, skipped: int | None = None) -> None:
        """The only sweep where there is no offset."""
        refs, cut = self.refs, slice(skipped or 0, None)

        def masked(keys: slice) -> Array:
            scores, seen = self.scores(tile, raw[keys, :], keys, skipped)
            return scores if seen is None else jnp.where(seen, scores, LOWEST)

        parts = [_fold(masked(keys), jnp.maximum) for keys in strips(self.plan)]
        highest = jnp.max(functools.reduce(jnp.maximum, parts), axis=0, keepdims=True)
        maximum = jnp.maximum(refs.log_total[:, cut], highest)
        shrink = jnp.exp2(refs.log_total[:, cut] - maximum)
        total = refs.total[:, cut] * shrink
        for keys in strips(self.plan):
            weights = jnp.exp2(masked(keys) - maximum)
            total += _fold(weights, jnp.add)
            refs.weights[keys, cut] = weights.astype(refs.weights.dtype)
        refs.log_total[:, cut], refs.total[:, cut] = maximum, total
        refs.sum[:, cut] *= shrink
        value = refs.value[0, 0, :, at_tile(tile - base, self.plan.keys)]
        refs.sum[:, cut] += dot(value, refs.weights[:, cut], LAST_FIRST)

    def chunk_range(self, chunk: Any, first: Any) -> tuple[Any, Any, Any]:
        """Returns a chunk's first tile, and its tiles from `first` to the diagonal."""
        base = chunk * self.chunk_tiles
        stop = jnp.minimum(self.diagonal, base + self.chunk_tiles)
        return base, jnp.minimum(jnp.maximum(first, base), stop), stop

    def if_visited(self, chunk: Any, first: Any, sweep: Any) -> None:
        """Runs `sweep(chunk, first)` if the chunk has tiles from `first` to the diagonal."""
        base = chunk * self.chunk_tiles
        visited = (base <= self.diagonal) & (base + self.chunk_tiles > first)
        pl.when(visited)(lambda: sweep(chunk, first))

    def on_own_chunk(self, base: Any, then: Any, otherwise: Any) -> None:
        """Does what is to be done at the diagonal if it lies in this chunk."""
        if self.plan.forward_chunks == 1:
            then()
        else:
            own = (self.diagonal >= base) & (self.diagonal < base + self.chunk_tiles)
            pl.when(own)(then)
            pl.when(jnp.logical_not(own))(otherwise)

    def one_by_one(self, chunk: Any, first: Any, body: Any) -> None:
        """Runs `body(tile, base, raw scores, skipped)`, from the diagonal backwards.

        Leaves the diagonal's raw scores, unless keys are cut into chunks.
        """
        plan, refs = self.plan, self.refs
        base, start, stop = self.chunk_range(chunk, first)

        def prefetch(tile: Any) -> None:
            after = self.diagonal if plan.forward_chunks == 1 else base
            refs.scores[...] = self.raw_scores(jnp.where(tile < start, after, tile), base)

        def on_diagonal() -> None:
            for crossed in range(plan.ratio):
                tile, skipped = self.diagonal + crossed, crossed * plan.keys
                body(tile, base, self.raw_scores(tile, base, skipped), skipped)

        self.on_own_chunk(base, on_diagonal, lambda: None)
        prefetch(stop - 1)

        def turn(n: Any) -> None:
            tile = stop - 1 - n
            body(tile, base, refs.scores, None)
            prefetch(tile - 1)

        over_pairs(stop - start, turn)

    def second_sweep(self, chunk: Any, first: Any) -> None:
        """Adds the values of a chunk's tiles, from the diagonal backwards."""
        plan, refs = self.plan, self.refs
        base, start, stop = self.chunk_range(chunk, first)
        last = self.diagonal + plan.ratio - 1

        def on_diagonal() -> None:
            for crossed in range(plan.ratio):
                tile, skipped = self.diagonal + crossed, crossed * plan.keys
                raw: Any = refs.scores
                if crossed or plan.forward_chunks > 1:
                    raw = self.raw_scores(tile, base, skipped)
                if crossed:
                    self.multiply(tile - 1, base, skipped - plan.keys)
                self.weigh(tile, raw, skipped)
            if plan.ratio > 1:
                clear(slice(0, (plan.ratio - 1) * plan.keys))

        def clear(cut: slice) -> None:
            for ref in [refs.weights, *([refs.alive] if self.training else [])]:
                ref[:, cut] = jnp.zeros_like(ref[:, cut])

        self.on_own_chunk(base, on_diagonal, lambda: clear(slice(0, None)))
        before = jnp.minimum(last, base + self.chunk_tiles - 1)
        refs.scores[...] = self.raw_scores(jnp.maximum(stop - 1, base), base)

        def turn(n: Any) -> None:
            tile = stop - 1 - n
            self.multiply(jnp.where(n == 0, before, tile + 1), base)
            self.weigh(tile, refs.scores)
            refs.scores[...] = self.raw_scores(jnp.maximum(tile - 1, base), base)

        over_pairs(stop - start, turn)
        self.multiply(jnp.where(start == stop, before, start), base)

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
        threshold = thresholds(plan, refs.tau[self.head], refs.scale[...], self.query_tile)
        refs.log_total[...] = log_total
        refs.threshold[...] = threshold
        refs.sum[...] = jnp.zeros_like(refs.sum)
        if self.training:
            refs.live_sum[...] = jnp.zeros_like(refs.live_sum)
        refs.live_tile[0] = self.first
        if plan.skip_dead:
            logarithm = jnp.log2(jnp.where(threshold > 0, threshold, 1))
            bar = jnp.where(threshold > 0, log_total + logarithm - DEAD_SLACK, -UNREACHABLE)

            def farthest(group: Any, found: Array) -> Array:
                tile = group * SUBLANES + jax.lax.broadcasted_iota(jnp.int32, found.shape, 0)
                inside = (tile >= self.first) & (tile < self.diagonal)
                # Not a number is not below anything.
                dead = refs.highest[at_tile(group, SUBLANES), :] <= bar
                nearer = jnp.minimum(found, tile.astype(jnp.float32))
                return jnp.where(inside & jnp.logical_not(dead), nearer, found)

            none = jnp.full((SUBLANES, plan.queries), self.diagonal, jnp.float32)
            stop = (self.diagonal + SUBLANES - 1) // SUBLANES
            found = jax.lax.fori_loop(self.first // SUBLANES, stop, farthest, none)
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
        refs.out[...] = out.astype(dtype)
        if not self.training:
            return
        rounding = out - out.astype(dtype).astype(jnp.float32)
        if plan.has_offset:
            mean = refs.live_sum[...] * refs.scale[...]
            refs.mean[...] = mean.astype(dtype)
            left = mean - mean.astype(dtype).astype(jnp.float32)
            rounding = rounding - refs.tau[self.head] * left
            refs.log_sum[...] = refs.log_total[...]
            tile = jax.lax.broadcasted_iota(jnp.int32, refs.live.shape[2:], 1)
            before = jnp.where(self.query_tile == 0, 0, refs.live[0, 0])
            refs.live[0, 0] = jnp.where(tile == self.query_tile, refs.live_tile[0], before)
        else:
            refs.log_sum[...] = refs.log_total[...] + jnp.log2(total)
        if plan.half:
            refs.rounding[...] = rounding.astype(dtype)

    def run(self) -> None:
        """Does one query tile."""
        chunks, last = self.plan.forward_chunks, pl.num_programs(3) - 1

        def first_sweep(chunk: Any, first: Any) -> None:
            def body(tile: Any, base: Any, raw: Any, skipped: int | None) -> None:
                self.add_exponentials(tile, raw, skipped)

            self.one_by_one(chunk, first, body)

        def only_sweep(chunk: Any, first: Any) -> None:
            self.one_by_one(chunk, first, self.add_softmax)

        if chunks == 1:
            self.start()
            if self.plan.has_offset:
                first_sweep(0, self.first)
                self.between()
                self.second_sweep(0, self.refs.live_tile[0])
            else:
                only_sweep(0, self.first)
            self.finish()
            return
        pl.when(self.step == 0)(self.start)
        chunk = chunks - 1 - self.step
        if self.plan.has_offset:

            @pl.when(self.step < chunks)
            def _():
                self.if_visited(chunk, self.first, first_sweep)

            pl.when(self.step == chunks)(self.between)

            @pl.when(self.step >= chunks)
            def _():
                live = self.refs.live_tile[0]
                self.if_visited(self.step - chunks, live, self.second_sweep)
        else:
            self.if_visited(chunk, self.first, only_sweep)
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


def _tiles_a_step(plan: Plan) -> int:
    return plan.tiles_a_step if plan.forward_chunks == 1 else 1


def _kernel(plan: Plan, training: bool, refs: Any) -> None:
    start = (pl.program_id(2) == 0) & (pl.program_id(3) == 0)
    pl.when(start)(Bias(plan, refs).start)
    tiles = _tiles_a_step(plan)
    if tiles == 1:
        _QueryTile(plan, training, refs, 0).run()
    else:

        @pl.loop(0, tiles)
        def _(within):
            _QueryTile(plan, training, refs, within).run()


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
      query: [batch, heads, head_dim, length]: `Plan.to_kernel`.
      key: [batch, kv_heads, length, head_dim]: `Plan.to_kernel_rows`.
      value: [batch, kv_heads, head_dim, length].
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
    tiles = _tiles_a_step(plan)
    block = queries * tiles
    steps = plan.forward_chunks * (2 if plan.has_offset and plan.forward_chunks > 1 else 1)

    def own(b, h, i, step, *refs):
        return b, h, 0, i

    def keys(b, h, i, step, *refs):
        return b, h // plan.group, _chunk_index(plan, refs, b, h, i, step, False), 0

    def values(b, h, i, step, *refs):
        return b, h // plan.group, 0, _chunk_index(plan, refs, b, h, i, step, True)

    def row(b, h, i, step, *refs):
        return b, 0, i

    inputs = [
        Operand("query", query, (1, 1, dim, block), own),
        Operand("key", key, (1, 1, chunk, dim), keys),
        Operand("value", value, (1, 1, dim, chunk), values),
    ]
    if plan.has_bias:
        inputs.append(
            Operand("bias", bias, (1, *bias.shape[1:]), lambda b, h, i, step, *refs: (h, 0, 0))
        )
    if plan.has_offset:
        inputs.append(Operand("scale", scale, (1, 1, block), row))
    if plan.packed:
        inputs.append(Operand("document", document, (1, 1, block), row))
    same = jax.ShapeDtypeStruct(query.shape, query.dtype)
    outputs = [Operand("out", same, (1, 1, dim, block), own)]
    if training:
        rows = jax.ShapeDtypeStruct((batch, heads, 1, length), float32)
        outputs.append(Operand("log_sum", rows, (1, 1, 1, block), own))
        if plan.half:
            outputs.append(Operand("rounding", same, (1, 1, dim, block), own))
        if plan.has_offset:
            live = jax.ShapeDtypeStruct((batch, heads, 1, plan.query_tiles), jnp.int32)
            outputs.append(Operand("mean", same, (1, 1, dim, block), own))
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
        "scores": pltpu.VMEM((plan.keys, queries), float32),
        "weights": pltpu.VMEM((plan.keys, queries), query.dtype),
    } | Bias.scratch(plan, backward=False)
    if plan.has_offset:
        scratch |= {
            "maximum": pltpu.VMEM((SUBLANES, queries), float32),
            "threshold": one_row,
            "live_sum": pltpu.VMEM((dim, queries), float32),
            "highest": pltpu.VMEM((-(-length // plan.keys // 8) * 8, queries), float32),
            "live_tile": pltpu.SMEM((1,), jnp.int32),
            "alive": pltpu.VMEM((plan.keys, queries), query.dtype),
        }
    found = launch(
        functools.partial(_kernel, plan, training),
        "lazy_forward" if training else "lazy_inference",
        (batch, heads, plan.query_tiles // tiles, steps),
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
