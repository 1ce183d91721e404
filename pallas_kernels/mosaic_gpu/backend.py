"""Lazy Attention on Hopper GPUs, in Pallas Mosaic GPU: a backend of `attention.py`."""

from types import ModuleType
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.mosaic_gpu import (
    backward_dbias,
    backward_dkv,
    backward_dq,
    config,
    row_stats,
)
from pallas_kernels.mosaic_gpu import forward as forward_kernel
from pallas_kernels.mosaic_gpu.plan import BLOCK, Plan
from pallas_kernels.mosaic_gpu.planning import by_triton, by_xla
from pallas_kernels.mosaic_gpu.planning.by_xla import Gradients as GradientsOfParameters
from pallas_kernels.mosaic_gpu.planning.by_xla import KeyRanges, Table, Visits
from pallas_kernels.problem import Gradients, Inputs, Problem, Residuals

PLAIN_JAX = False


def plan(problem: Problem, inputs: Inputs | None = None) -> Plan:
    """Returns what is static: the call, its tunings, and who plans it.

    Args:
      problem: the call.
      inputs: its arrays; None: they are none of a `shard_map`.
    """
    head_dim = config.padded_head_dim(problem.head_dim)
    # Where there is no kernel for softmax, it is Elastic-Softmax with tau 0.
    elastic = config.is_elastic(head_dim, problem.has_offset)
    interpreted = problem.interpret is not None
    varies = inputs is not None and jax.typeof(inputs.query).manual_axis_type.varying
    planner = problem.planner
    if planner is None:
        planner = "triton" if not interpreted and by_triton.available() else "xla"
    return Plan(
        **problem.facts() | {"has_offset": elastic},
        tunings=config.tunings(head_dim, problem.width, elastic),
        by_triton=planner == "triton",
        fetch_by_warpgroup=interpreted or bool(varies),
    )


def table(
    plan: Plan,
    distance_bias: Float[Array, "heads width"] | None,
    distance_slope: Float[Array, " heads"] | None,
    length: int,
) -> Table:
    """Returns the bias in the kernels' form; one of zeros if there is none."""
    return planning(plan).table(plan, distance_bias, distance_slope, plan.heads, length)


def ranges(plan: Plan, inputs: Inputs, table: Table, *, training: bool) -> Visits:
    """Returns which tiles are visited, and whether no exponential can overflow."""
    visits = Kernels(plan, inputs, table).visits(table.maxima)
    # As for residuals.
    return jax.lax.optimization_barrier(visits) if training else visits


def forward(
    plan: Plan, inputs: Inputs, table: Table, ranges: Visits, *, training: bool
) -> tuple[Float[Array, "batch length heads head_dim"], Residuals | None]:
    """Returns the output and, with `training`, the residuals: see `row_stats.Residuals`.

    `live` is the first block of keys, of each block of queries, that may be live.
    """
    found: Any = Kernels(plan, inputs, table).forward(ranges, training=training)
    if not training:
        return found["out"], None
    # Where a scan stacks residuals, XLA would run the kernel twice: once into the stack.
    found = jax.lax.optimization_barrier(found)
    left, right = found["mean_k_left"], found["mean_k_right"]
    return found["out"], Residuals(
        lse=found["lse"],
        # With an offset the backward pass asks nothing of the output.
        out=None if plan.has_offset else found["out"],
        rounding=found["rounding"],
        live=found["live"],
        mean_k=None if left is None else (left, right),
        past=found["past"],
    )


def backward(
    plan: Plan,
    inputs: Inputs,
    table: Table,
    ranges: Visits,
    residuals: Residuals,
    d_out: Float[Array, "batch length heads head_dim"],
    groups: int,
) -> Gradients:
    """Returns the gradients."""
    kernels = Kernels(plan, inputs, table)
    first, work = ranges.first, ranges.work
    live = first if residuals.live is None else residuals.live
    of_keys = kernels.key_ranges(first, live, work)
    left, right = (None, None) if residuals.mean_k is None else residuals.mean_k
    found = row_stats.Residuals(
        residuals.lse, residuals.out, residuals.rounding, left, right, residuals.past
    )
    d_query, rows, of_offset, tail_sums = kernels.backward_query(
        found, first, live, ranges.no_overflow, of_keys, d_out
    )
    d_key, d_value, sums = kernels.backward_key(rows, of_keys, work, d_out)
    if plan.width and sums is None:
        sums = kernels.backward_bias(rows, of_keys, d_out)
    of_parameters = kernels.gradients(groups, of_offset, sums, tail_sums)
    return Gradients(
        query=d_query,
        key=d_key,
        value=d_value,
        distance_bias=of_parameters.distance_bias,
        distance_slope=of_parameters.distance_slope,
        offset=None if inputs.offset is None else of_parameters.offset,
    )


def planning(plan: Plan) -> ModuleType:
    """Returns the module that plans the call."""
    return by_triton if plan.by_triton else by_xla


class Kernels:
    """A call's arrays, and the launches that read them."""

    def __init__(self, plan: Plan, inputs: Inputs, table: Table):
        self.plan, self.planning = plan, planning(plan)
        self.query, self.key, self.value = inputs.query, inputs.key, inputs.value
        self.distance_bias, self.distance_slope = inputs.distance_bias, inputs.distance_slope
        self.table, self.tail = table, table.tail
        self.inputs, self.offset = inputs, inputs.offset
        _, self.length, self.heads, _ = inputs.query.shape
        self.group = self.heads // inputs.key.shape[2]
        self.blocks = -(-self.length // BLOCK)
        self.tau = jnp.zeros(self.heads, jnp.float32) if self.offset is None else self.offset
        missing = self.blocks * BLOCK - self.length
        # A row of padding sees what the last row sees.
        self.segment_start, self.offset_scale = (
            jnp.pad(x, ((0, 0), (0, missing)), mode="edge") if missing else x
            for x in (inputs.segment_start, inputs.offset_scale)
        )
        self.distances = plan.distances(self.blocks) if plan.width else 0

    def visits(self, maxima: Array | None) -> Visits:
        """Returns which tiles are visited, and whether no exponential can overflow."""
        return self.planning.visits(
            self.plan, self.query, self.key, self.inputs.segment_start,
            self.distance_bias, self.distance_slope, self.offset, maxima,
        )  # fmt: skip

    def key_ranges(self, first: Array, live: Array, work: Array) -> KeyRanges:
        """Returns the ranges of the backward pass, and the order of its kernels' work tiles."""
        tuning = self.plan.tunings.backward_bias
        batch = first.shape[0]
        orders = [
            f(self.plan, self.query, self.key) for f in (backward_dq.order, backward_dkv.order)
        ]
        distances = filled = parts = 0
        if self.distances and tuning is not None:
            distances = self.distances
            # Those that only fill up the warpgroups have nothing to do.
            filled = distances + -distances % tuning.warpgroups
            parts = backward_dbias.chunks(self.plan, batch, self.heads, self.blocks)
            shape = (batch, self.heads, parts, filled, 3)
            orders.append(backward_dbias.order(self.plan, self.query, self.key, shape))
        return self.planning.key_ranges(
            first, live, work, self.group, orders, distances, filled, parts
        )

    def forward(self, visits: Visits, *, training: bool) -> dict[str, Array | None]:
        """Launches the forward pass; returns by name what `forward.forward` does."""
        plan, first = self.plan, visits.first
        order = forward_kernel.order(plan, training, self.query, self.key)
        (tile_order,) = self.planning.tile_orders(visits.work, self.group, [order])
        segment_start = self.segment_start if plan.packed else first
        return forward_kernel.forward(
            plan, training, self.query, self.key, self.value, self.table.for_queries, self.tail,
            self.tau, self.offset_scale, segment_start, first, visits.no_overflow, tile_order,
        )  # fmt: skip

    def backward_query(
        self,
        residuals: row_stats.Residuals,
        first: Array,
        live: Array,
        no_overflow: Array,
        ranges: KeyRanges,
        d_out: Array,
    ) -> tuple[Array, Array, Array | None, Array | None]:
        """Launches the kernel for dQ; returns what `backward_dq.backward_dq` does."""
        plan = self.plan
        segment_start = self.segment_start if plan.packed else first
        return backward_dq.backward_dq(
            plan, self.query, d_out, self.key, self.value, self.table.for_queries, self.tail,
            residuals, self.tau, self.offset_scale, segment_start, first, live, no_overflow,
            ranges.tile_order[0],
        )  # fmt: skip

    def backward_key(
        self, rows: Array, ranges: KeyRanges, work: Array, d_out: Array
    ) -> tuple[Array, Array, Array | None]:
        """Launches the kernels for dK and dV.

        Returns dK, dV and the sums of dS, see `backward_dkv.backward_dkv`.
        """
        masked = ranges.last
        if self.plan.packed:
            # Documents and windows begin later and later: blocks are masked from some one on.
            starts = self.segment_start[:, None, BLOCK - 1 :: BLOCK]
            keys = BLOCK * jnp.arange(self.blocks)
            masked = jnp.sum(starts <= keys[:, None], axis=-1, dtype=jnp.int32)

        def run(wanted: tuple[str, ...], tile_order: Array) -> dict[str, Array]:
            return backward_dkv.backward_dkv(
                self.plan, wanted, self.query, d_out, self.key, self.value, self.table.for_keys,
                self.tail, self.tau, rows, ranges.last, ranges.last_live, masked, tile_order,
            )  # fmt: skip

        if self.plan.tunings.backward_value is None:
            found = run(("key", "value"), ranges.tile_order[1])
        else:
            order = backward_dkv.order(self.plan, self.query, self.key)
            (tile_order,) = self.planning.tile_orders(work, self.group, [order])
            found = run(("key",), ranges.tile_order[1]) | run(("value",), tile_order)
        return found["d_key"], found["d_value"], found.get("sums")

    def backward_bias(
        self, rows: Array, ranges: KeyRanges, d_out: Array
    ) -> Float[Array, "batch parts heads filled 128"]:
        """Launches the kernel for the gradient of the bias, over tiles inside the table."""
        return backward_dbias.backward_dbias(
            self.plan, self.query, d_out, self.key, self.value, self.table.for_queries, rows,
            cast(Array, ranges.distances), ranges.tile_order[2],
        )  # fmt: skip

    def gradients(
        self, groups: int, of_offset: Array | None, sums: Array | None, tail_sums: Array | None
    ) -> GradientsOfParameters:
        """Returns the gradients of bias, slope and offset for each group of the batch."""
        if of_offset is None and sums is None:
            return GradientsOfParameters(None, None, None)
        width = None if self.distance_bias is None else self.distance_bias.shape[1]
        return self.planning.gradients(
            groups, width, self.distance_slope is not None, of_offset, sums, tail_sums,
            length=self.length, distances=self.distances,
        )  # fmt: skip
