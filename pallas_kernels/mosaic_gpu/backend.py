"""Lazy Attention on Hopper GPUs, in Pallas Mosaic GPU: a backend of `attention.py`."""

from types import ModuleType

import jax
from jaxtyping import Array, Float

from pallas_kernels.mosaic_gpu import backward_dbias, backward_dkv, backward_dq, config, mean_k
from pallas_kernels.mosaic_gpu import forward as forward_kernel
from pallas_kernels.mosaic_gpu.call import Call
from pallas_kernels.mosaic_gpu.plan import Plan
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
    visits = Kernels(plan, inputs, table).visits()
    # As for residuals.
    return jax.lax.optimization_barrier(visits) if training else visits


def forward(
    plan: Plan, inputs: Inputs, table: Table, ranges: Visits, *, training: bool
) -> tuple[Float[Array, "batch length heads head_dim"], Residuals | None]:
    """Returns the output and, with `training`, the residuals: see `forward.forward`."""
    return Kernels(plan, inputs, table).forward(ranges, training=training)


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
    of_keys = kernels.key_ranges(ranges, residuals.live)
    d_query, rows, of_offset, tail_sums = kernels.backward_query(ranges, residuals, of_keys, d_out)
    d_key, d_value, sums = kernels.backward_key(rows, ranges, of_keys, d_out)
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


class Kernels(Call):
    """A call, and what is launched for it, in this order."""

    def visits(self) -> Visits:
        """Returns which tiles are visited, and whether no exponential can overflow."""
        return planning(self.plan).visits(self.plan, self.inputs, self.table)

    def forward(self, visits: Visits, *, training: bool) -> tuple[Array, Residuals | None]:
        """Returns the output and, with `training`, the residuals."""
        order = forward_kernel.order(self, training)
        (tile_order,) = planning(self.plan).tile_orders(visits.work, self.group, [order])
        found = forward_kernel.forward(self, training, visits, tile_order)
        if not training:
            return found["out"], None
        # Where a scan stacks residuals, XLA would run the kernel twice: once into the stack.
        found = jax.lax.optimization_barrier(found)
        of_keys = self.plan.has_offset
        return found["out"], Residuals(
            lse=found["lse"],
            # With an offset the backward pass asks nothing of the output.
            out=None if of_keys else found["out"],
            rounding=found.get("rounding"),
            live=found.get("live"),
            mean_k=tuple(found[name] for name in mean_k.NAMES) if of_keys else None,
            past=found.get("past"),
        )

    def key_ranges(self, visits: Visits, live: Array | None) -> KeyRanges:
        """Returns the ranges of the backward pass, and the order of its kernels' work tiles.

        `live` is that of the residuals.
        """
        orders = [backward_dq.order(self), backward_dkv.order(self)]
        tuning, distances, filled, parts = self.plan.tunings.backward_bias, 0, 0, 0
        if self.plan.width and tuning is not None:
            distances = self.plan.distances(self.blocks)
            # Those that only fill up the warpgroups have nothing to do.
            filled = distances + -distances % tuning.warpgroups
            parts = backward_dbias.chunks(self)
            orders.append(backward_dbias.order(self, parts, filled))
        live = visits.first if live is None else live
        return planning(self.plan).key_ranges(
            visits.first, live, visits.work, self.group, orders, distances, filled, parts
        )

    def backward_query(
        self, visits: Visits, residuals: Residuals, ranges: KeyRanges, d_out: Array
    ) -> tuple[Array, Array, Array | None, Array | None]:
        """Launches the kernel for dQ; returns what `backward_dq.backward_dq` does."""
        return backward_dq.backward_dq(self, residuals, visits, ranges.tile_order[0], d_out)

    def backward_key(
        self, rows: Array, visits: Visits, ranges: KeyRanges, d_out: Array
    ) -> tuple[Array, Array, Array | None]:
        """Launches the kernels for dK and dV.

        Returns dK, dV and the sums of dS, see `backward_dkv.backward_dkv`.
        """

        def run(wanted: tuple[str, ...], tile_order: Array) -> dict[str, Array]:
            return backward_dkv.backward_dkv(self, wanted, rows, ranges, tile_order, d_out)

        if self.plan.tunings.backward_value is None:
            found = run(("key", "value"), ranges.tile_order[1])
        else:
            orders = [backward_dkv.order(self)]
            (tile_order,) = planning(self.plan).tile_orders(visits.work, self.group, orders)
            found = run(("key",), ranges.tile_order[1]) | run(("value",), tile_order)
        return found["d_key"], found["d_value"], found.get("sums")

    def backward_bias(
        self, rows: Array, ranges: KeyRanges, d_out: Array
    ) -> Float[Array, "batch parts heads filled 128"]:
        """Launches the kernel for the gradient of the bias, over tiles inside the table."""
        assert ranges.distances is not None
        order = ranges.tile_order[2]
        return backward_dbias.backward_dbias(self, rows, ranges.distances, order, d_out)

    def gradients(
        self, groups: int, of_offset: Array | None, sums: Array | None, tail_sums: Array | None
    ) -> GradientsOfParameters:
        """Returns the gradients of bias, slope and offset for each group of the batch."""
        if of_offset is None and sums is None:
            return GradientsOfParameters(None, None, None)
        bias, slope = self.inputs.distance_bias, self.inputs.distance_slope
        return planning(self.plan).gradients(
            groups, None if bias is None else bias.shape[1], slope is not None,
            of_offset, sums, tail_sums, length=self.length,
            distances=self.plan.distances(self.blocks) if self.plan.width else 0,
        )  # fmt: skip
