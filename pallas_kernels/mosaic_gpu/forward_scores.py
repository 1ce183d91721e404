"""Scores of one warpgroup's 64 queries, a tile of keys after the other: bias, masks, loops."""

import functools
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.mosaic_gpu import layout, memory, pipeline, tile_kind
from pallas_kernels.mosaic_gpu.mlir import ROW, ROWS
from pallas_kernels.mosaic_gpu.plan import MASKED, UNIT
from pallas_kernels.mosaic_gpu.tile_kind import TileKind


class Scores:
    """What both sweeps of the forward pass know of a warpgroup's queries and do with them.

    `forward_queries.Queries` finds out where they begin and end, and what they see.
    """

    def __init__(self, work_tile: Any):
        # `forward.WorkTile`, which imports this.
        self.all, self.kernel, self.ref = work_tile, work_tile.kernel, work_tile.ref
        self.plan, self.block, self.interpret = work_tile.plan, work_tile.block, work_tile.interpret
        self.warpgroup = work_tile.warpgroup
        self.query0 = work_tile.query0 + ROWS * self.warpgroup
        self.rows = pl.ds(self.query0, ROWS)
        self.shape = (ROWS, UNIT)
        # Set by `forward_queries.Queries.compute`; not all of them by every call.
        self.begin: Any = None
        self.offset: Any = None
        self.segment_start: Any = None
        self.last_segment_start: Any = None
        self.bias_tail: Any = None
        self.query: Any = None
        self.table: Any = None

    def spread(self, x: Float[Array, "64"]) -> Float[Array, "64 64"]:
        """Returns a row vector repeated along its rows."""
        return lax.broadcast_in_dim(x, self.shape, [0])

    def per_row(self, x: Any, dtype: Any = jnp.float32) -> Array:
        """Returns a row vector of one number."""
        return plgpu.layout_cast(jnp.full((ROWS,), x, dtype), ROW)

    def load_rows(self, name: str) -> Array:
        """Returns this warpgroup's rows of an array [batch, padded]."""
        # Past the end of the sequence, anything that is there.
        start = lax.min(self.query0, jnp.int32(self.ref[name].shape[1] - ROWS))
        return plgpu.load(
            self.ref[name].at[self.all.batch, pl.ds(start, ROWS)], layout=ROW, optimized=False
        )

    def steps(self, end: Any, body: Any, carry: Any, keys: Any, values: tuple = ()) -> Any:
        """Does what `pipeline.steps` does, for this warpgroup's tiles before `end`."""
        return pipeline.steps(self.begin, end, self.block.ahead, body, carry, keys, late=values)

    def steps_by_distance(
        self, end: Any, body: Any, carry: Any, keys: Any, values: tuple = ()
    ) -> Any:
        """Does what `steps` does, see `tile_kind.loops`; body is called with `kind` first."""

        def loop(kind, start, stop, carry):
            step = functools.partial(body, kind)
            return pipeline.steps(start, stop, self.block.ahead, step, carry, keys, late=values)

        units, masked = self.block.keys // UNIT, None
        if self.plan.packed:
            unseen = self.last_segment_start + (self.block.keys - 1)
            masked = self.all.last + 1 - lax.div(unseen, jnp.int32(self.block.keys))
        return tile_kind.loops(
            self.plan, self.kernel.length, self.begin, self.begin, end, loop, carry,
            masked=masked, units=units,
        )  # fmt: skip

    def scores(
        self,
        step: Any,
        slot: Any,
        wait: Any,
        use: Any,
        carry: Any,
        *,
        keep: bool = False,
        whole: bool = False,
        kind: TileKind = TileKind.MASKED,
    ) -> Any:
        """Goes over the units of a key tile, the last first, with their scores.

        The products of all units are issued at once, so that the tensor cores have work while
        one unit's scores are used. Releases the keys, unless told to keep them.

        Args:
          step: where the tile lies, see `forward.WorkTile.last`.
          slot: of the tile.
          wait: called when all products are issued, see `pipeline.steps`.
          use: called as use(x, rest, key0, unit, carry) with scores, what is to be added to
            them, the first key and the index of the unit; returns the carry, and how many
            products it left in flight. Scores are masked where causality wants it: the table
            holds `MASKED` there.
          carry: for the first call.
          keep: the keys are needed once more.
          whole: nothing is left to be added.
          kind: see `tile_kind.loops`.

        Returns:
          the last carry.
        """
        block, plan = self.all, self.plan
        units = list(reversed(range(self.block.keys // UNIT)))

        key0 = [(block.last - step) * self.block.keys + unit * UNIT for unit in units]
        # Behind products in the queue to memory, loads would wait for the tensor cores.
        biases, rests = zip(*(self.bias(x, whole, kind) for x in key0), strict=True)

        def run(*accs):
            result, in_flight = carry, 0
            for acc, unit in zip(accs, units, strict=True):
                keys = self.ref["key_smem"].at[slot, pl.ds(unit * UNIT, UNIT)]
                plgpu.wgmma(acc, self.query(), keys.T)
            wait()
            for n, unit in enumerate(units):
                left = len(units) - 1 - n
                x = plgpu.wgmma_accumulator_load(accs[n], wait_n=left + in_flight)
                if unit == 0 and not keep:
                    block.keys.consumer_release_slot(slot)
                x = x * plan.exponent_scale + biases[n]
                result, issued = use(x, rests[n], key0[n], unit, result)
                in_flight += issued
            return result

        return pl.run_scoped(run, *(plgpu.ACC(self.shape, jnp.float32) for _ in units))

    def bias(self, key0: Any, whole: bool, kind: TileKind) -> tuple[Any, Any]:
        """Returns a unit's bias, and what is still to be added to it: nothing with `whole`."""
        plan, apart = self.plan, self.query0 - key0
        if kind is TileKind.TAIL:
            return tile_kind.bias(
                plan, apart, self.bias_tail, falling=True, whole=whole, interpret=self.interpret
            )
        start, rest = plan.bias_of_tile(apart, UNIT, self.bias_tail, falling=True)
        plus = rest if whole else 0.0
        bias = memory.gather(self.table, start, UNIT, interpret=self.interpret, plus=plus)
        return bias, rest

    def where_in_segment(self, x: Array, key0: Any, otherwise: float) -> Array:
        """Returns x for keys in the query's document or after its start, else another number."""
        return layout.where_from(x, self.segment_start - key0, otherwise, interpret=self.interpret)

    def hide_segments(self, x: Array, key0: Any, kind: TileKind = TileKind.MASKED) -> Array:
        """Returns scores with those of other documents masked, see `tile_kind.loops`."""
        masked = self.plan.packed and kind is TileKind.MASKED
        return self.where_in_segment(x, key0, MASKED) if masked else x

    def hide(self, weights: Array, key0: Any, no_overflow: bool) -> Array:
        """Returns weights that are not above 0 where nothing is seen.

        Documents are not masked before. And tau / n would be a weight if it is above 0, which
        with `no_overflow` it is not.
        """
        unseen = -1.0 if self.plan.has_offset else 0.0

        def masked():
            return layout.where_seen(
                weights, self.query0 - key0, unseen, rows_are_keys=False, interpret=self.interpret
            )

        x = weights
        if self.plan.has_offset and not no_overflow:
            hidden = (self.offset > 0) & (key0 + UNIT > self.query0)
            x = lax.cond(hidden, masked, lambda: weights)
        return self.where_in_segment(x, key0, unseen) if self.plan.packed else x
