"""The gradient of the queries.

With m the live entries, dP = dO V^T, and Y = P K from the forward pass:

    delta_i = sum_j P_ij m_ij dP_ij     dQ = scale ((P m dP) K - delta Y)

A CTA takes work tile after work tile: 64 queries of one head a warpgroup. It goes over those
of their key tiles that may be live, from the diagonal backwards, and sums up delta, and what
dtau takes, on the way. Where no exponential is too large, all of this is summed with
exponentials for P, and divided by their sum at the end.

Tiles past the bias table also add to the gradient of its tail, to which what the forward pass
has summed there adds the dead ones. Without an offset delta is known before, dO . O: dO is there
in any case, and the output is fetched while the work tile before is in work. Then
dS = P (dP - delta).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic_gpu import (
    bias_table,
    config,
    launch,
    layout,
    mean_k,
    memory,
    pipeline,
    weight_sums,
)
from pallas_kernels.mosaic_gpu.bias_table import TileKind
from pallas_kernels.mosaic_gpu.call import Call
from pallas_kernels.mosaic_gpu.kernel_types import Ref, Scalar, Scratch, TilesConsumed
from pallas_kernels.mosaic_gpu.mlir import ROWS, TILE
from pallas_kernels.mosaic_gpu.pipeline import Slots
from pallas_kernels.mosaic_gpu.plan import BLOCK, MASKED, UNREACHABLE, RowStat, threshold
from pallas_kernels.mosaic_gpu.planning.types import Visits
from pallas_kernels.mosaic_gpu.scheduler import TileOrder
from pallas_kernels.problem import Residuals

# What delta is found from without an offset, in the order it is fetched in.
_OUTPUTS = ("out", "rounding")


def backward_dq(
    call: Call,
    residuals: Residuals,
    visits: Visits,
    tile_order: Int[Array, " work_tiles+1"],
    d_out: Float[Array, "batch length heads head_dim"],
) -> tuple[Array, Array, Array | None, Array | None]:
    """Launches the kernel.

    Returns:
      d_query; what `RowStat` says of each query [batch, heads, blocks, kinds, 64]; with an offset
      what each query adds to the gradient of tau [batch, heads, blocks, 64]; and if the bias
      has a slope, for each query the sum of dS over tiles past the table, and of dS times the
      distance past its end [batch, heads, blocks, 2, 64].
    """
    kernel = _Kernel(call)
    first, table = visits.first, call.table
    live = first if residuals.live is None else residuals.live
    # What is not read must only be there.
    segment_start = call.segment_start if call.plan.packed else first
    operands = dict(query=call.query, d_out=d_out, key=call.key, value=call.value)
    operands |= dict(table=table.for_queries, tail=table.tail, offset=call.offset)
    operands |= dict(offset_scale=call.offset_scale, segment_start=segment_start, first=first)
    operands |= dict(live=live, no_overflow=visits.no_overflow, tile_order=tile_order)
    operands |= dict(ones=weight_sums.ones(kernel.dtype), lse=residuals.lse)
    if residuals.mean_k is not None:
        operands |= zip(mean_k.NAMES, residuals.mean_k, strict=True)
    saved = dict(out=residuals.out, rounding=residuals.rounding, past=residuals.past)
    operands |= {name: x for name, x in saved.items() if x is not None}
    found = kernel.launch(WorkTile, operands, kernel.results)
    return found["d_query"], found["rows"], found.get("of_offset"), found.get("tail_sums")


def order(call: Call) -> TileOrder:
    """Returns the order of the kernel's work tiles."""
    rows = call.plan.tunings.backward_dq.rows
    return TileOrder.of_queries(
        call.batch, call.heads, call.group, call.length, rows, call.head_dim
    )


class _Kernel(launch.Kernel):
    """The kernel's static facts.

    Attributes:
      want_tail: the gradient of the bias's tail is wanted.
      out_stages: slots for the output, which delta is found from without an offset.
      results: types of what the kernel returns, by name.
    """

    name = "lazy_backward_dq"

    def __init__(self, call: Call):
        plan, tuning = call.plan, call.plan.tunings.backward_dq
        used, self.out_stages = config.query_tiles(tuning, call.head_dim, plan.has_offset)
        super().__init__(call, tuning, order(call), used)
        self.want_tail = plan.has_tail(self.length)
        of_blocks = (self.batch, self.heads, self.blocks)
        self.results = {"d_query": jax.ShapeDtypeStruct(call.query.shape, self.dtype)}
        kinds = 4 if plan.packed else 3
        self.results["rows"] = jax.ShapeDtypeStruct((*of_blocks, kinds, BLOCK), jnp.float32)
        if plan.has_offset:
            self.results["of_offset"] = jax.ShapeDtypeStruct((*of_blocks, BLOCK), jnp.float32)
        if self.want_tail:
            self.results["tail_sums"] = jax.ShapeDtypeStruct((*of_blocks, 2, BLOCK), jnp.float32)

    def scratch(self) -> Scratch:
        """Returns the types of SMEM buffers."""
        tuning, rows = self.tuning, self.tiled(self.tuning.warpgroups)
        tile = self.tiled(tuning.stages)
        scratch = dict(query_smem=rows, d_out_smem=rows, key_smem=tile, value_smem=tile)
        if self.plan.has_offset:
            scratch |= weight_sums.scratch(self.dtype)
        if self.out_stages:
            shape = (self.out_stages, tuning.warpgroups, ROWS, self.head_dim)
            scratch["out_smem"] = pipeline.tiled(shape, self.dtype)
        if tuning.in_registers:
            # Else the queries' own place, which they need to the end.
            scratch["d_query_smem"] = rows
        return scratch

    def slots(self) -> dict[str, Slots]:
        """Returns the slots of each pipeline."""
        tiles, warpgroups = Slots(self.tuning.stages), self.tuning.warpgroups
        query, table = Slots(1, copies=2 * warpgroups), Slots(self.table_slots)
        slots = {"key": tiles, "value": tiles, "query": query, "table": table}
        return slots | ({"out": Slots(self.out_stages, warpgroups)} if self.out_stages else {})

    def consumed(self, work_tiles: Scalar, tiles_consumed: TilesConsumed) -> dict[str, Scalar]:
        """Returns how many tiles of each pipeline a CTA consumed."""
        keys, values = tiles_consumed
        tiles = {"key": keys, "value": values, "query": work_tiles, "table": work_tiles}
        return tiles | ({"out": 2 * work_tiles} if self.out_stages else {})


class _Sums(NamedTuple):
    """What is summed over the tiles of 64 queries, per lane.

    Attributes:
      delta: P m dP; None without an offset, like the next.
      alive: m dP.
      past: of dS, or without delta's part, over tiles past the table; () if not wanted.
    """

    delta: Array | None
    alive: Array | None
    past: tuple[Array, ...]


class _Found(NamedTuple):
    """What all tiles of 64 queries give, of whole rows.

    Attributes:
      d_query: before the scale.
      delta, alive, past: see `_Sums`; delta also without an offset.
    """

    d_query: Float[Array, "64 head_dim"]
    delta: Array
    alive: Array | None
    past: tuple[Array, ...]


class WorkTile(launch.WorkTile):
    """64 queries of one head a warpgroup; `tiles_consumed` are tiles of keys, and of values.

    Everything is counted in steps from the CTA's last tile of keys backwards.

    Attributes:
      lse, threshold: what `RowStat` says of each query; `threshold` is None without an offset.
      known_delta: the same; None with an offset, where it is found on the way.
      last_segment_start: first key that the last query sees; None unless rows hold several
        documents or have a window.
    """

    kernel: _Kernel
    threshold: Array | None
    known_delta: Array | None
    last_segment_start: Scalar | None

    def __init__(self, cta: launch.Cta, number: Scalar, n: Scalar, tiles_consumed: TilesConsumed):
        super().__init__(cta, number, n, tiles_consumed)
        self.block0 = self.tile * self.tuning.warpgroups
        last_block = jnp.int32(self.kernel.blocks - 1)
        self.last = lax.min(self.block0 + self.tuning.warpgroups - 1, last_block)
        self.keys = self.pipelines["key"].after(self.tiles_consumed[0])
        self.values = self.pipelines["value"].after(self.tiles_consumed[1])
        self.queries, self.tables = self.pipelines["query"], self.pipelines["table"]
        # Tiles of keys and of values go together.
        self.both = ((self.keys, 0), (self.values, 0))
        if self.kernel.out_stages:
            self.outs = self.pipelines["out"].after(2 * self.n)

    def load_warp(self) -> TilesConsumed:
        """Fetches all that the CTA reads; returns `tiles_consumed` of the next work tile."""
        h = self.head
        key_head = lax.div(h, jnp.int32(self.kernel.group))

        @pipeline.fetching(self.plan)
        def _():
            self.load_own(self.queries, ("query", "d_out"), h)
            self.load_table(self.tables, self.n, h)
            if self.kernel.out_stages:
                self.load_outputs()

        self.prefetch_row_stats()
        if self.plan.has_offset:
            self.prefetch_mean_k()
        # What is read here takes time, so it comes after the first copies.
        steps = self.count_steps()

        @pipeline.fetching(self.plan)
        def _():
            @pl.loop(0, steps)
            def _(n):
                slot = self.keys.producer_acquire(n)
                self.load_tile(self.keys, slot, ("key",), self.last - n, key_head)
                slot = self.values.producer_acquire(n)
                self.load_tile(self.values, slot, ("value",), self.last - n, key_head)

        return self.next_consumed(steps)

    def compute_warpgroup(self) -> TilesConsumed:
        """Does all for one warpgroup's queries; returns `tiles_consumed` of the next work tile."""
        ref, plan, kernel, b, h = self.ref, self.plan, self.kernel, self.batch, self.head
        steps = self.count_steps()
        block = self.block0 + self.warpgroup
        self.exists = block < kernel.blocks
        self.block = lax.min(block, jnp.int32(kernel.blocks - 1))
        self.query0 = self.block * BLOCK
        self.bias_tail = (ref["tail"][h, 0], ref["tail"][h, 1])
        # Steps from the diagonal of the CTA to this warpgroup's, and to its last tile.
        self.begin = self.last - self.block
        first = ref["live" if plan.has_offset else "first"][b, h, self.block]
        self.end = lax.select(self.exists, self.last - first + 1, self.begin)
        if plan.has_offset:
            self.offset = ref["offset"][h]
        self.queries.consumer_wait(self.n)
        self.find_row_stats()
        self.query, self.d_out = self.own("query"), self.own("d_out")
        if self.release_early:
            self.queries.consumer_release(self.n, loading=True)
        self.table = ref["table_smem"].at[self.tables.consumer_wait(self.n)]

        pipeline.skip(0, self.begin, *self.both)
        accs = [kernel.sum_type]
        accs += [weight_sums.ACC] if plan.has_offset else []

        def sum_tiles(divided: bool) -> _Found:
            return pl.run_scoped(functools.partial(self.sum_tiles, divided), *accs)

        if kernel.dtype == jnp.bfloat16:
            no_overflow = ref["no_overflow"][b, h] != 0
            if plan.has_offset:
                # The other way also serves where unseen entries must be told from seen ones.
                no_overflow = no_overflow & (self.offset <= 0)
            found = lax.cond(no_overflow, lambda: sum_tiles(False), lambda: sum_tiles(True))
        else:
            found = sum_tiles(True)
        pipeline.skip(self.end, steps, *self.both)
        self.tables.consumer_release(self.n)
        self.store(found)
        return self.next_consumed(steps)

    def sum_tiles(self, divided: bool, *accs: Ref) -> _Found:
        """Goes over the tiles that may be live.

        With `divided` exponentials are divided by their sum at once; else at the end. `accs` are
        of d_query, and with an offset of the sums of weights as they were rounded.
        """
        plan, begin, end = self.plan, self.begin, self.end
        zero = self.per_row(0.0)
        of_offset = zero if plan.has_offset else None
        sums = _Sums(of_offset, of_offset, (zero, zero) if self.kernel.want_tail else ())

        def loop(kind, start, stop, sums):
            step = functools.partial(self.step, divided, kind, accs)
            return pipeline.steps(start, stop, self.tuning.ahead, step, sums, *self.both)

        if divided and self.kernel.dtype == jnp.bfloat16:
            # Rare, so one loop for all.
            sums = loop(TileKind.MASKED, begin, end, sums)
        else:
            masked = self.first_masked(self.last, self.last_segment_start)
            sums = bias_table.loops(
                plan, self.kernel.length, begin, begin, end, loop, sums, masked=masked
            )
        d_query = accs[0][...]
        if self.tuning.stages > 1:
            # The last products have been waited for only now.
            pl.when(end > begin)(lambda: self.keys.consumer_release(end - 1))
        finish = functools.partial(layout.finish_sums, interpret=self.interpret)
        past = [finish(x) for x in sums.past]
        if sums.delta is None:
            assert self.known_delta is not None
            delta = self.known_delta
        else:
            delta = finish(sums.delta)
            # The mean of the keys times what the tensor cores took for the weights' sum.
            of_mean = weight_sums.total(accs[1], interpret=self.interpret)
            y = self.load_mean_k()
            d_query = d_query - lax.broadcast_in_dim(of_mean, y.shape, [0]) * y
        if not divided:
            factor = jnp.exp2(-self.lse)
            d_query = d_query * lax.broadcast_in_dim(factor, d_query.shape, [0])
            past = [x * factor for x in past]
            delta = delta if sums.delta is None else delta * factor
        alive = None if sums.alive is None else finish(sums.alive)
        return _Found(d_query, delta, alive, tuple(past))

    def store(self, found: _Found) -> None:
        """Writes the results of the queries that exist, and gives the queries back."""
        ref, b, h = self.ref, self.batch, self.head
        of_offset, past = None, found.past
        if found.alive is not None:
            of_offset = found.alive * self.offset_scale
            # The forward pass has summed the weights of all tiles there, dead ones too.
            past = tuple(
                x - found.delta * self.load_row(ref["past"].at[b, h, self.block, n])
                for n, x in enumerate(past)
            )

        @pl.when(self.exists)
        def _():
            # What the work tile before has written is read by now.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            own = "d_query_smem" if self.tuning.in_registers else "query_smem"
            smem = ref[own].at[self.warpgroup]
            smem[...] = (found.d_query * self.plan.scale).astype(self.kernel.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem, ref["d_query"].at[b, pl.ds(self.query0, ROWS), h])
            for n, x in enumerate(past):
                ref["tail_sums"][b, h, self.block, n] = x
            self.write_row_stats(found.delta, of_offset)

        self.release_own(self.queries)

    def load_outputs(self) -> None:
        """Fetches the output and its rounding; in the warp that fetches."""
        for number, name in enumerate(_OUTPUTS):
            slot = self.outs.producer_acquire(number)
            for n in range(self.tuning.warpgroups):
                source = self.ref[name].at[self.batch, self.own_rows(n), self.head]
                target = self.ref["out_smem"].at[slot, n]
                plgpu.copy_gmem_to_smem(source, target, self.outs.full.at[slot])

    def prefetch_row_stats(self) -> None:
        """Brings what `find_row_stats` loads into the first cache; in all that fetch."""
        found = [self.ref["lse"].at[self.batch, self.head]]
        if self.plan.has_offset:
            found.append(self.ref["offset_scale"].at[self.batch])
        if self.plan.packed:
            found.append(self.ref["segment_start"].at[self.batch])
        for x in found:
            memory.prefetch(x, self.block0 * BLOCK, self.tuning.rows, interpret=self.interpret)

    def find_row_stats(self) -> None:
        """Finds what is known of the queries, once the CTA's own operands have arrived."""
        ref, plan, b, h = self.ref, self.plan, self.batch, self.head

        def row(x: Ref) -> Array:
            return self.load_row(x.at[pl.ds(self.block * BLOCK, BLOCK)])

        self.lse = row(ref["lse"].at[b, h])
        # Rows without mass, whose output is NaN, have no part in any gradient.
        massless = self.lse == UNREACHABLE
        self.last_segment_start = self.known_delta = self.threshold = None
        if plan.packed:
            self.segment_start = row(ref["segment_start"].at[b])
            # Documents and windows begin later and later: the last query's masks the most.
            self.last_segment_start = ref["segment_start"][b, self.block * BLOCK + BLOCK - 1]
        if plan.has_offset:
            self.offset_scale = row(ref["offset_scale"].at[b])
            limit = threshold(ref["offset"][h], self.offset_scale)
            self.threshold = jnp.where(massless, UNREACHABLE, limit)
            return

        def tile(x: Ref) -> Array:
            x = x[...] if self.interpret else plgpu.load(x, layout=TILE, optimized=False)
            return x.astype(jnp.float32)

        d_out = tile(ref["d_out_smem"].at[self.warpgroup])

        def dot(number: int) -> Array:
            slot = self.outs.consumer_wait(number)
            x = tile(ref["out_smem"].at[slot, self.warpgroup])
            product = self.lane_sums(d_out * x)
            self.outs.consumer_release(number, loading=True)
            return product

        delta = layout.finish_sums(dot(0) + dot(1), interpret=self.interpret)
        self.known_delta = jnp.where(massless, 0.0, delta)

    def write_row_stats(self, delta: Array, of_offset: Array | None) -> None:
        """Writes down what the other kernels want to know of each query."""
        b, h = self.batch, self.head
        rows = self.ref["rows"].at[b, h, self.block]
        rows[RowStat.LSE] = self.lse
        rows[RowStat.DELTA] = delta
        rows[RowStat.THRESHOLD] = delta * 0.0 if self.threshold is None else self.threshold
        if self.plan.packed:
            rows[RowStat.SEGMENT_START] = self.segment_start.astype(jnp.float32)
        if of_offset is not None:
            self.ref["of_offset"][b, h, self.block] = of_offset

    def prefetch_mean_k(self) -> None:
        """Brings the mean of the work tile's keys into L2; in all that fetch."""
        for n in range(self.tuning.warpgroups):
            block = lax.min(self.block0 + n, jnp.int32(self.kernel.blocks - 1))
            for name in mean_k.NAMES:
                half = self.ref[name].at[self.batch, self.head, block]
                words = ROWS * self.kernel.head_dim // 2
                memory.prefetch_tile(half, words, interpret=self.interpret)

    def load_mean_k(self) -> Float[Array, "64 head_dim"]:
        """Returns the mean of the keys."""
        halves = [self.ref[name].at[self.batch, self.head, self.block] for name in mean_k.NAMES]
        return memory.load_registers(halves, interpret=self.interpret)

    def own_rows(self, n: int) -> pl.Slice:
        """Returns the queries of warpgroup n."""
        return pl.ds((self.block0 + n) * ROWS, ROWS)

    def count_steps(self) -> Scalar:
        """Returns how many key tiles of the CTA's may be live; without an offset all visited."""
        last = jnp.int32(self.kernel.blocks - 1)
        blocks = [lax.min(self.block0 + n, last) for n in range(self.tuning.warpgroups)]
        first = self.ref["live" if self.plan.has_offset else "first"]
        starts = [first[self.batch, self.head, block] for block in blocks]
        return self.last - functools.reduce(lax.min, starts) + 1

    def next_consumed(self, steps: Scalar) -> TilesConsumed:
        """Returns `tiles_consumed` of the next work tile."""
        return self.tiles_consumed[0] + steps, self.tiles_consumed[1] + steps

    def softmax(
        self, kind: TileKind, x: Array, bias: Array | float, key0: Scalar, divided: bool
    ) -> Array:
        """Returns softmax weights of a tile from its products, or only exponentials."""
        x = x * self.plan.exponent_scale + bias
        if self.plan.packed and kind is TileKind.MASKED:
            x = self.where_in_segment(x, key0, MASKED)
        return jnp.exp2(x - self.spread(self.lse) if divided else x)

    def lane_sums(self, x: Array) -> Array:
        """Returns the sum of each row, per lane."""
        return layout.lane_sums(x, False, interpret=self.interpret)

    def seen_sums(self, x: Array, key0: Scalar, kind: TileKind) -> Array:
        """Returns sums per lane over what the queries see, if tau is above 0; else over all."""
        if kind is TileKind.TAIL:
            return self.lane_sums(x)
        hidden = key0 == self.query0
        last_start = self.last_segment_start if kind is TileKind.MASKED else None
        if last_start is not None:
            hidden = hidden | (key0 < last_start)

        def masked():
            seen = layout.where_seen(
                x, self.query0 - key0, 0.0, rows_are_keys=False, interpret=self.interpret
            )
            return seen if last_start is None else self.where_in_segment(seen, key0, 0.0)

        return lax.cond(
            hidden & (self.offset > 0),
            lambda: self.lane_sums(masked()),
            lambda: self.lane_sums(x),
        )

    def step(
        self,
        divided: bool,
        kind: TileKind,
        accs: tuple[Ref, ...],
        n: Scalar,
        slots: tuple[Scalar, Scalar],
        wait: Callable[[], None],
        sums: _Sums,
    ) -> _Sums:
        """Adds a tile."""
        # Products that begin with a number known only now need no wait of their own.
        begin = 0.0 * self.lse if self.known_delta is None else -self.known_delta
        less = self.spread(begin)
        key0 = (self.last - n) * BLOCK
        bias, _ = self.tile_bias(kind, key0, whole=True)
        key_slot, value_slot = slots

        def products(s_acc, d_acc):
            d_begun = pipeline.begin_with(d_acc, less, self.interpret)
            plgpu.wgmma(s_acc, self.query(), self.ref["key_smem"].at[key_slot].T)
            plgpu.wgmma(d_acc, self.d_out(), self.ref["value_smem"].at[value_slot].T)
            x = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
            self.release_before(n, key_slot)
            wait()
            return self.softmax(kind, x, bias, key0, divided), pipeline.finish(d_acc, d_begun)

        tile = plgpu.ACC((ROWS, BLOCK), jnp.float32)
        p, d_weights = pl.run_scoped(products, tile, tile)
        self.values.consumer_release_slot(value_slot)
        limit = self.threshold
        if limit is not None:
            if not divided:
                limit = limit * jnp.exp2(self.lse)
            d_weights = jnp.where(p > self.spread(limit), d_weights, 0.0)
        weighted = p * d_weights
        spare = self.spare()
        x = layout.pack(weighted, self.kernel.dtype, relu=False, interpret=self.interpret)
        if self.plan.has_offset:
            weight_sums.add(accs[1], x, self.ref, spare)
        pipeline.multiply(accs[0], x, self.ref["key_smem"].at[key_slot], spare)
        if self.tuning.stages == 1:
            # Nothing can be fetched before.
            plgpu.wgmma_wait(0)
            self.keys.consumer_release_slot(key_slot)
        # Else while that is under way.
        delta, alive, past = sums
        if delta is not None and alive is not None:
            delta = delta + self.lane_sums(weighted)
            if divided:
                # A weight of tau / n is no weight where nothing is seen.
                alive = alive + self.seen_sums(d_weights, key0, kind)
            else:
                alive = alive + self.lane_sums(d_weights)
        if past:
            tile_distance = self.query0 - key0
            past = bias_table.add_tail_sums(
                self.plan, past, weighted, tile_distance, kind, interpret=self.interpret
            )
        return _Sums(delta, alive, past)

    def release_before(self, n: Scalar, slot: Scalar) -> None:
        """Gives back the keys of the step before this one, unless this is the first.

        What reads them last is left in flight while the next step's products begin; those who
        have waited for these need not wait for it again.
        """
        if self.tuning.stages == 1:
            return
        before = self.keys.preceding(slot)
        pl.when(n > self.begin)(lambda: self.keys.consumer_release_slot(before))
