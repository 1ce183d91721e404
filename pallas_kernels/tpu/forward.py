"""The forward pass: log-sum-exp first, then what survives.

A step does a few tiles of queries of one head, with the keys of its head in VMEM. The first
sweep walks from the diagonal backwards over the tiles that are not negligible, sums the
exponentials and keeps each tile's largest scores; these and the final log-sum-exp tell the
farthest live tile. The second sweep goes over the live ones. Without an offset one sweep does it
all.

Keys that don't fit into VMEM are cut into chunks, a step each: from the diagonal's chunk to the
first for the first sweep, and back for the second.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.problem import Inputs, Residuals
from pallas_kernels.tpu.buffers import (
    ALONE,
    HALF,
    Buffers,
    Layout,
    Sets,
    over_pairs,
    strips,
    unknown_zero,
)
from pallas_kernels.tpu.call import Operand, launch
from pallas_kernels.tpu.config import LANES
from pallas_kernels.tpu.kernel_types import Index, Ref, Refs, Strips
from pallas_kernels.tpu.plan import SUBLANES, Plan
from pallas_kernels.tpu.tile import (
    DEAD_SLACK,
    EVERY,
    LAST_FIRST,
    LOWEST,
    MASKED,
    UNREACHABLE,
    Bias,
    at_tile,
    dot,
    thresholds,
    views,
    visible,
)

# References that hold the queries of a step.
_OF_QUERIES = ("query", "scale", "segment_start", "out", "lse_out", "live_v_mean", "rounding")

# Tiles that are told dead or live at a time.
_MARKS = 8


def forward(
    plan: Plan,
    inputs: Inputs,
    table: Float[Array, "heads padded_length"] | None,
    ranges: Int[Array, "batch heads query_tiles"],
    *,
    training: bool,
) -> tuple[Float[Array, "batch length heads head_dim"], Residuals | None]:
    """Launches the forward pass, from b(x) and the first key tile that each query tile visits.

    Returns:
      the output; with `training` the residuals: `lse` the log2-sum-exp2 of each query [batch,
      heads, 1, padded], `live_v` the mean of the values of live entries over all visible ones
      and `rounding` what out - offset * live_v lost to rounding, both [batch, heads, padded_dim,
      padded]; `live` the first live key tile of each query tile [batch, heads, query_tiles].
    """
    query, value = plan.to_kernel(inputs.query), plan.to_kernel(inputs.value)
    key = plan.to_kernel_rows(inputs.key)
    batch, heads, dim, length = query.shape
    queries, float32 = plan.queries, jnp.float32
    chunk = length // plan.forward_chunks
    tiles = tiles_a_step(plan)
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

    def bias_of(b, h, i, step, *refs):
        return h, 0, 0

    def live_of(b, h, i, step, *refs):
        return b, h, 0, 0

    operands = [
        Operand("query", query, (1, 1, dim, block), own),
        Operand("key", key, (1, 1, chunk, dim), keys),
        Operand("value", value, (1, 1, dim, chunk), values),
    ]
    if table is not None:
        bias = plan.bias(table)
        operands.append(Operand("bias", bias, (1, *bias.shape[1:]), bias_of))
    if plan.has_offset:
        operands.append(Operand("scale", plan.rows(inputs.offset_scale), (1, 1, block), row))
    if plan.packed:
        segment_start = plan.rows(inputs.segment_start, mode="edge")
        operands.append(Operand("segment_start", segment_start, (1, 1, block), row))
    same = jax.ShapeDtypeStruct(query.shape, query.dtype)
    outputs = [Operand("out", same, (1, 1, dim, block), own)]
    if training:
        rows = jax.ShapeDtypeStruct((batch, heads, 1, length), float32)
        outputs.append(Operand("lse_out", rows, (1, 1, 1, block), own))
        if plan.half:
            outputs.append(Operand("rounding", same, (1, 1, dim, block), own))
        if plan.has_offset:
            live = jax.ShapeDtypeStruct((batch, heads, 1, plan.query_tiles), jnp.int32)
            outputs.append(Operand("live_v_mean", same, (1, 1, dim, block), own))
            outputs.append(Operand("live", live, (1, 1, *live.shape[2:]), live_of))
    one_row, largest = (pltpu.VMEM((n, queries), float32) for n in (1, SUBLANES))
    scratch = {"sum": pltpu.VMEM((dim, queries), float32), "lse": one_row}
    scratch |= layout(plan, training).scratch() | Bias.scratch(plan, backward=False)
    if plan.has_offset:
        sums = pltpu.VMEM((2 * SUBLANES, queries), float32)
        scratch |= dict(sums_0=sums, sums_1=sums, largest_0=largest, largest_1=largest)
        scratch |= {
            "threshold": one_row,
            "live_v_sum": pltpu.VMEM((dim, queries), float32),
            "highest": pltpu.VMEM((length // plan.keys * SUBLANES, queries), float32),
            "live_tile": pltpu.SMEM((1,), jnp.int32),
        }
    else:
        scratch["total"] = pltpu.VMEM((SUBLANES, queries), float32)
    scalars = {"first": ranges.reshape(-1)}
    # Scalar memory holds something, if there are no offsets.
    scalars["tau"] = jnp.zeros(1, float32) if inputs.offset is None else inputs.offset
    found = launch(
        functools.partial(_kernel, plan, training),
        "lazy_forward" if training else "lazy_inference",
        (batch, heads, plan.query_tiles // tiles, steps),
        2,
        scalars,
        operands,
        outputs,
        scratch,
        interpret=plan.interpret,
    )
    out = plan.from_kernel(found["out"])
    if not training:
        return out, None
    return out, Residuals(
        lse=found["lse_out"],
        out=out,
        rounding=found.get("rounding"),
        live=found["live"][:, :, 0] if "live" in found else None,
        live_v=found.get("live_v_mean"),
    )


def _chunk_index(
    plan: Plan, refs: tuple[Ref, ...], b: Index, h: Index, i: Index, step: Index, second: bool
) -> Index:
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


def _kernel(plan: Plan, training: bool, refs: Refs) -> None:
    start = (pl.program_id(2) == 0) & (pl.program_id(3) == 0)
    pl.when(start)(Bias(plan, refs).start)
    tiles = tiles_a_step(plan)
    if tiles == 1:
        QueryTile(plan, training, refs, 0).run()
    else:

        @pl.loop(0, tiles)
        def _(within):
            QueryTile(plan, training, refs, within).run()


def layout(plan: Plan, training: bool) -> Layout:
    """Returns the buffers of a turn."""
    results = ("weights", "alive") if training and plan.has_offset else ("weights",)
    return Layout(plan, ("scores",), results)


def tiles_a_step(plan: Plan) -> int:
    """Returns the tiles of queries of one step."""
    return plan.tiles_a_step if plan.forward_chunks == 1 else 1


def fold(x: Array, combine: Callable[[Array, Array], Array]) -> Array:
    """Combines keys that are a multiple of eight apart: [keys, queries] -> [8, queries]."""
    parts = [x[at : at + SUBLANES] for at in range(0, x.shape[0], SUBLANES)]
    while len(parts) > 1:
        pairs = list(zip(parts[::2], parts[1::2], strict=False))
        parts = [combine(a, b) for a, b in pairs] + parts[2 * len(pairs) :]
    return parts[0]


class QueryTile:
    """One tile of queries: the sweeps over its keys, and what they do to a tile."""

    def __init__(self, plan: Plan, training: bool, refs: Refs, within: Index):
        self.plan, self.training = plan, training
        self.head, self.step = pl.program_id(1), pl.program_id(3)
        self.query_tile = pl.program_id(2) * tiles_a_step(plan) + within
        row = pl.program_id(0) * plan.heads + self.head
        self.first = refs.first[row * plan.query_tiles + self.query_tile]
        self.diagonal = self.query_tile * plan.ratio
        self.refs = views(refs, _OF_QUERIES, at_tile(within, plan.queries))
        zero = jnp.minimum(self.first, 0)
        self.zero = zero
        self.buffers = Buffers(plan, refs, layout(plan, training))
        self.free = Bias(plan, refs), self.buffers
        self.in_order = Bias(plan, refs, zero), Buffers(plan, refs, layout(plan, training), zero)
        self.chunk_tiles = plan.padded_length // plan.forward_chunks // plan.keys

    def run(self) -> None:
        """Does one query tile."""
        chunks, last = self.plan.forward_chunks, pl.num_programs(3) - 1

        def first_sweep(chunk: Index, first: Index) -> None:
            def body(
                tile: Index, base: Index, raw: Strips, sets: Sets, skipped: int | None
            ) -> None:
                self.add_exponentials(tile, raw, skipped)

            self.one_by_one(chunk, first, body)

        def only_sweep(chunk: Index, first: Index) -> None:
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

    def chunk_range(self, chunk: Index, first: Index) -> tuple[Index, Index, Index]:
        """Returns a chunk's first tile, and its tiles from `first` to the diagonal."""
        base = chunk * self.chunk_tiles
        stop = jnp.minimum(self.diagonal, base + self.chunk_tiles)
        return base, jnp.minimum(jnp.maximum(first, base), stop), stop

    def if_visited(self, chunk: Index, first: Index, sweep: Callable[[Index, Index], None]) -> None:
        """Runs `sweep(chunk, first)` if the chunk has tiles from `first` to the diagonal."""
        base = chunk * self.chunk_tiles
        visited = (base <= self.diagonal) & (base + self.chunk_tiles > first)
        pl.when(visited)(lambda: sweep(chunk, first))

    def on_own_chunk(
        self, base: Index, then: Callable[[], None], otherwise: Callable[[], None]
    ) -> None:
        """Does what is to be done at the diagonal if it lies in this chunk."""
        if self.plan.forward_chunks == 1:
            then()
        else:
            own = (self.diagonal >= base) & (self.diagonal < base + self.chunk_tiles)
            pl.when(own)(then)
            pl.when(jnp.logical_not(own))(otherwise)

    def one_by_one(self, chunk: Index, first: Index, body: Callable[..., None]) -> None:
        """Runs `body(tile, base, raw scores, sets, skipped)`, from the diagonal backwards.

        Leaves the diagonal's raw scores, unless keys are cut into chunks.
        """
        plan = self.plan
        base, start, stop = self.chunk_range(chunk, first)

        def prepare(tile: Index, into: int) -> None:
            after = self.diagonal if plan.forward_chunks == 1 else base
            self.prepare(jnp.where(tile < start, after, tile), base, into)

        def on_diagonal() -> None:
            for crossed in range(plan.ratio):
                tile, skipped = self.diagonal + crossed, crossed * plan.keys
                raw = self.raw_scores(tile, base, skipped)
                body(tile, base, raw.__getitem__, ALONE, skipped)

        self.on_own_chunk(base, on_diagonal, lambda: None)
        prepare(stop - 1, ALONE.ahead)

        def turn(n: Index, sets: Sets) -> None:
            tile = stop - 1 - n
            body(tile, base, self.prepared(sets.scores), sets, None)
            prepare(tile - 1, sets.ahead)

        over_pairs(stop - start, turn, alternate=False)

    def second_sweep(self, chunk: Index, first: Index) -> None:
        """Adds the values of a chunk's tiles, from the diagonal backwards."""
        plan = self.plan
        base, start, stop = self.chunk_range(chunk, first)
        last = self.diagonal + plan.ratio - 1

        def on_diagonal() -> None:
            for crossed in range(plan.ratio):
                tile, skipped = self.diagonal + crossed, crossed * plan.keys
                raw = self.prepared(ALONE.scores)
                if crossed or plan.forward_chunks > 1:
                    raw = self.raw_scores(tile, base, skipped).__getitem__
                if crossed:
                    self.multiply(tile - 1, base, ALONE.pending, skipped - plan.keys)
                self.weigh(tile, raw, ALONE, skipped)
            if plan.ratio > 1:
                clear(slice(0, (plan.ratio - 1) * plan.keys))

        def clear(cut: slice) -> None:
            nothing = jnp.zeros((plan.keys, plan.queries), self.buffers.dtype)
            for field in ("weights", "alive") if self.training else ("weights",):
                self.buffers.put(ALONE.results, field, nothing[:, cut], cut)

        self.on_own_chunk(base, on_diagonal, lambda: clear(EVERY))
        before = jnp.minimum(last, base + self.chunk_tiles - 1)
        self.prepare(jnp.maximum(stop - 1, base), base, ALONE.ahead)

        def turn(n: Index, sets: Sets) -> None:
            tile = stop - 1 - n
            self.multiply(jnp.where(n == 0, before, tile + 1), base, sets.pending)
            self.weigh(tile, self.prepared(sets.scores), sets)
            self.prepare(jnp.maximum(tile - 1, base), base, sets.ahead)

        over_pairs(stop - start, turn)
        self.multiply(jnp.where(start == stop, before, start), base, ALONE.pending)

    def start(self) -> None:
        """Before the first sweep."""
        refs, half = self.refs, (SUBLANES, self.plan.queries)
        if self.plan.has_offset:
            for ref in (refs.sums_0, refs.sums_1):
                ref[...] = jnp.concatenate([jnp.full(half, LOWEST), jnp.zeros(half)], axis=0)
        else:
            refs.total[...] = jnp.zeros_like(refs.total)
            refs.lse[...] = jnp.full_like(refs.lse, LOWEST)
            refs.sum[...] = jnp.zeros_like(refs.sum)

    def between(self) -> None:
        """After the first sweep: log-sum-exp, thresholds, and the first live tile."""
        plan, refs = self.plan, self.refs
        maxima = jnp.concatenate([ref[:SUBLANES, :] for ref in (refs.sums_0, refs.sums_1)], axis=0)
        totals = jnp.concatenate([ref[SUBLANES:, :] for ref in (refs.sums_0, refs.sums_1)], axis=0)
        maximum = jnp.max(maxima, axis=0, keepdims=True)
        total = jnp.sum(totals * jnp.exp2(maxima - maximum), axis=0, keepdims=True)
        lse = maximum + jnp.log2(total)
        threshold = thresholds(plan, refs.tau[self.head], refs.scale[...], self.query_tile)
        refs.lse[...] = lse
        refs.threshold[...] = threshold
        refs.sum[...] = jnp.zeros_like(refs.sum)
        if self.training:
            refs.live_v_sum[...] = jnp.zeros_like(refs.live_v_sum)
        refs.live_tile[0] = self.first
        if plan.skip_dead:
            logarithm = jnp.log2(jnp.where(threshold > 0, threshold, 1))
            # At 0 or below every key may count.
            bar = jnp.where(threshold > 0, lse + logarithm - DEAD_SLACK, -math.inf)

            def farthest(group: Index, found: Array) -> Array:
                for n in range(_MARKS):
                    tile = jnp.minimum(self.first + group * _MARKS + n, self.diagonal - 1)
                    # Not a number is not below anything.
                    dead = refs.highest[at_tile(tile, SUBLANES), :] <= bar
                    nearer = jnp.where(dead, UNREACHABLE, tile.astype(jnp.float32))
                    found = jnp.minimum(found, nearer)
                return found

            none = jnp.full((SUBLANES, plan.queries), self.diagonal, jnp.float32)
            groups = (self.diagonal - self.first + _MARKS - 1) // _MARKS
            found = jax.lax.fori_loop(0, groups, farthest, none)
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
            mean = refs.live_v_sum[...] * refs.scale[...]
            refs.live_v_mean[...] = mean.astype(dtype)
            left = mean - mean.astype(dtype).astype(jnp.float32)
            rounding = rounding - refs.tau[self.head] * left
            lse = refs.lse[...]
            tile = jax.lax.broadcasted_iota(jnp.int32, refs.live.shape[2:], 1)
            before = jnp.where(self.query_tile == 0, 0, refs.live[0, 0])
            refs.live[0, 0] = jnp.where(tile == self.query_tile, refs.live_tile[0], before)
        else:
            lse = refs.lse[...] + jnp.log2(total)
        # With this a row without mass adds nothing to any gradient.
        refs.lse_out[...] = jnp.where(lse == -math.inf, UNREACHABLE, lse)
        if plan.half:
            refs.rounding[...] = rounding.astype(dtype)

    def raw_scores(self, tile: Index, base: Index, skipped: int = 0) -> Array:
        """Returns K Q of a tile; `base` is the first tile in VMEM."""
        refs = self.refs
        key = refs.key[0, 0, at_tile(tile - base, self.plan.keys), :]
        return dot(key, refs.query[:, skipped:], LAST_FIRST)

    def prepare(self, tile: Index, base: Index, into: int) -> None:
        """Stores the raw scores of the tile that the next turn works on."""
        self.buffers.put(into, "scores", self.raw_scores(tile, base), EVERY)

    def prepared(self, of: int) -> Strips:
        """Returns what `prepare` stored, by keys."""
        return lambda keys: self.buffers.load(of, "scores", keys, EVERY)

    def scores(
        self, tile: Index, raw: Array, keys: slice, skipped: int | None
    ) -> tuple[Array, Array | None]:
        """Returns the scores of some keys of a tile from their raw ones, and what is seen of them.

        So many queries as are skipped are cut off; None: the tile is not on the diagonal.
        """
        plan, refs = self.plan, self.refs
        on_diagonal, skipped = None if skipped is None else keys.start, skipped or 0
        scores = raw * plan.score_scale
        if plan.has_bias:
            scores = scores + self.free[0].tile(self.diagonal - tile, keys, skipped)
        segment_start = refs.segment_start[:, skipped:] if plan.packed else None
        key = tile * plan.keys + keys.start
        return scores, visible(segment_start, key, scores.shape, on_diagonal)

    def add_exponentials(self, tile: Index, raw: Strips, skipped: int | None = None) -> None:
        """First sweep: a maximum and a sum for each of sixteen classes of keys.

        Those of a strip that are equal modulo eight are of one class, of every other strip.
        Classes of one strip know nothing of those of the next one, so that both can be
        under way. Each half of them has its largest scores of the tile, too.
        """
        plan, refs = self.plan, self.refs
        cut, size = slice(skipped or 0, None), plan.strips.large
        # In order: see `buffers`. On v6e the sums' order is enough, and more costs spills.
        row = unknown_zero(self.zero)
        row_of_largest = row if plan.query_first else 0
        for largest in (refs.largest_0, refs.largest_1):
            largest[:, cut] = jnp.full((SUBLANES, plan.queries), LOWEST)[:, cut]
        for n, at in enumerate(range(0, plan.keys, size)):
            keys, sums = slice(at, at + size), (refs.sums_0, refs.sums_1)[n % 2]
            largest = (refs.largest_0, refs.largest_1)[n % 2]
            scores, seen = self.scores(tile, raw(keys), keys, skipped)
            if seen is not None:
                scores = jnp.where(seen, scores, MASKED)
            vectors = [scores[at : at + SUBLANES] for at in range(0, size, SUBLANES)]
            highest = functools.reduce(jnp.maximum, vectors)
            largest[pl.ds(row_of_largest, SUBLANES), cut] = jnp.maximum(largest[:, cut], highest)
            before = sums[:SUBLANES, cut]
            maximum = jnp.maximum(before, highest)
            total = sums[SUBLANES:, cut] * jnp.exp2(before - maximum)
            for a, b in zip(vectors[::2], vectors[1::2], strict=True):
                total = total + (jnp.exp2(a - maximum) + jnp.exp2(b - maximum))
            sums[:SUBLANES, cut] = maximum
            sums[pl.ds(row + SUBLANES, SUBLANES), cut] = total
        if skipped is None and plan.skip_dead:
            highest = jnp.maximum(refs.largest_0[...], refs.largest_1[...])
            refs.highest[at_tile(tile, SUBLANES), :] = highest

    def weigh(self, tile: Index, raw: Strips, sets: Sets, skipped: int | None = None) -> None:
        """Second sweep: stores a tile's weights."""
        refs, cut = self.refs, slice(skipped or 0, None)
        bias, buffers = self.in_order if sets.in_order else self.free
        sizes, dtype = self.plan.strips, buffers.dtype
        size = sizes.small if self.training else sizes.large
        for keys in strips(self.plan, size if sets.in_order else HALF):
            scores, seen = self.scores(tile, raw(keys), keys, skipped)
            softmax = jnp.exp2(scores - refs.lse[:, cut])
            weights = jnp.maximum(softmax - refs.threshold[:, cut], 0)
            if seen is not None:
                weights = jnp.where(seen, weights, 0)
            buffers.store(sets.results, "weights", keys, weights.astype(dtype), cut)
            if self.training:
                # Not a number must come through.
                alive = jnp.where(weights == 0, 0.0, 1.0)
                buffers.store(sets.results, "alive", keys, alive.astype(dtype), cut)
            bias.fence(keys, weights[:SUBLANES, :LANES])

    def multiply(self, tile: Index, base: Index, of: int, skipped: int = 0) -> None:
        """Second sweep: multiplies values by the weights that `weigh` stored."""
        refs, cut = self.refs, slice(skipped, None)
        value = refs.value[0, 0, :, at_tile(tile - base, self.plan.keys)]
        refs.sum[:, cut] += dot(value, self.buffers.whole(of, "weights", cut), LAST_FIRST)
        if self.training:
            alive = self.buffers.whole(of, "alive", cut)
            refs.live_v_sum[:, cut] += dot(value, alive, LAST_FIRST)

    def add_softmax(
        self, tile: Index, base: Index, raw: Strips, sets: Sets, skipped: int | None = None
    ) -> None:
        """The only sweep where there is no offset."""
        refs, cut = self.refs, slice(skipped or 0, None)
        bias, buffers = self.in_order if sets.in_order else self.free
        parts = strips(self.plan, self.plan.strips.large if sets.in_order else HALF)

        highest = jnp.full((SUBLANES, self.plan.queries), LOWEST)[:, cut]
        for keys in parts:
            scores, seen = self.scores(tile, raw(keys), keys, skipped)
            if seen is not None:
                scores = jnp.where(seen, scores, MASKED)
            highest = jnp.maximum(highest, fold(scores, jnp.maximum))
            buffers.store(sets.scores, "scores", keys, scores, cut)
            bias.fence(keys, scores[:SUBLANES, :LANES])
        maximum = jnp.max(highest, axis=0, keepdims=True)
        maximum = jnp.maximum(refs.lse[:, cut], maximum)
        shrink = jnp.exp2(refs.lse[:, cut] - maximum)
        total = refs.total[:, cut] * shrink
        for keys in parts:
            weights = jnp.exp2(buffers.load(sets.scores, "scores", keys, cut) - maximum)
            total += fold(weights, jnp.add)
            buffers.store(sets.results, "weights", keys, weights.astype(buffers.dtype), cut)
        refs.lse[:, cut], refs.total[:, cut] = maximum, total
        value = refs.value[0, 0, :, at_tile(tile - base, self.plan.keys)]
        added = dot(value, buffers.whole(sets.results, "weights", cut), LAST_FIRST)
        refs.sum[:, cut] = refs.sum[:, cut] * shrink + added
