"""Lazy Attention on Hopper GPUs, in Pallas Mosaic GPU: a backend of `attention.py`."""

from types import ModuleType

import jax
from jaxtyping import Array, Float

from pallas_kernels.mosaic_gpu import backward_dbias, backward_dkv, backward_dq, config, mean_k
from pallas_kernels.mosaic_gpu import forward as forward_kernel
from pallas_kernels.mosaic_gpu.call import Call
from pallas_kernels.mosaic_gpu.plan import Plan
from pallas_kernels.mosaic_gpu.planning import by_triton, by_xla
from pallas_kernels.mosaic_gpu.planning.types import KeyRanges, ParameterGradients, Table, Visits
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
    planned_by = problem.planner
    if planned_by is None:
        planned_by = "triton" if not interpreted and by_triton.available() else "xla"
    return Plan(
        **problem.facts() | {"has_offset": elastic},
        tunings=config.tunings(head_dim, problem.width, elastic),
        by_triton=planned_by == "triton",
        fetch_by_warpgroup=interpreted or bool(varies),
    )


def table(
    plan: Plan,
    distance_bias: Float[Array, "heads width"] | None,
    distance_slope: Float[Array, " heads"] | None,
    length: int,
) -> Table:
    """Returns the bias in the kernels' form; one of zeros if there is none."""
    return planner(plan).table(plan, distance_bias, distance_slope, length)


def ranges(plan: Plan, inputs: Inputs, table: Table, *, training: bool) -> Visits:
    """Returns which tiles are visited, and whether no exponential can overflow."""
    visits = planner(plan).visits(plan, inputs, table)
    # As for residuals.
    return jax.lax.optimization_barrier(visits) if training else visits


def forward(
    plan: Plan, inputs: Inputs, table: Table, ranges: Visits, *, training: bool
) -> tuple[Float[Array, "batch length heads head_dim"], Residuals | None]:
    """Returns the output and, with `training`, the residuals: see `forward.forward`."""
    call = Call(plan, inputs, table)
    order = forward_kernel.order(call, training)
    (tile_order,) = planner(plan).tile_orders(ranges.work, call.group, [order])
    found = forward_kernel.forward(call, training, ranges, tile_order)
    if not training:
        return found["out"], None
    # Where a scan stacks residuals, XLA would run the kernel twice: once into the stack.
    found = jax.lax.optimization_barrier(found)
    of_keys = plan.has_offset
    return found["out"], Residuals(
        lse=found["lse"],
        # With an offset the backward pass asks nothing of the output.
        out=None if of_keys else found["out"],
        rounding=found.get("rounding"),
        live=found.get("live"),
        mean_k=tuple(found[name] for name in mean_k.NAMES) if of_keys else None,
        past=found.get("past"),
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
    call = Call(plan, inputs, table)
    of_keys = key_ranges(call, ranges, residuals.live)
    d_query, rows, of_offset, tail_sums = backward_dq.backward_dq(
        call, residuals, ranges, of_keys.tile_order[0], d_out
    )
    d_key, d_value, sums = gradients_of_keys(call, rows, ranges, of_keys, d_out)
    if plan.width and sums is None:
        sums = backward_dbias.backward_dbias(call, rows, of_keys, d_out)
    of_parameters = gradients_of_parameters(call, groups, of_offset, sums, tail_sums)
    return Gradients(
        query=d_query,
        key=d_key,
        value=d_value,
        distance_bias=of_parameters.distance_bias,
        distance_slope=of_parameters.distance_slope,
        offset=None if inputs.offset is None else of_parameters.offset,
    )


def planner(plan: Plan) -> ModuleType:
    """Returns the module that plans the call."""
    return by_triton if plan.by_triton else by_xla


def key_ranges(call: Call, visits: Visits, live: Array | None) -> KeyRanges:
    """Returns the ranges of the backward pass, and the order of its kernels' work tiles.

    `live` is that of the residuals.
    """
    orders = [backward_dq.order(call), backward_dkv.order(call)]
    tuning, distances, filled, parts = call.plan.tunings.backward_dbias, 0, 0, 0
    if call.plan.width and tuning is not None:
        distances = call.plan.distances(call.blocks)
        # Those that only fill up the warpgroups have nothing to do.
        filled = distances + -distances % tuning.warpgroups
        parts = backward_dbias.chunks(call)
        orders.append(backward_dbias.order(call, parts, filled))
    live = visits.first if live is None else live
    return planner(call.plan).key_ranges(
        visits.first, live, visits.work, call.group, orders, distances, filled, parts
    )


def gradients_of_keys(
    call: Call, rows: Array, visits: Visits, ranges: KeyRanges, d_out: Array
) -> tuple[Array, Array, Array | None]:
    """Returns dK, dV and the sums of dS, see `backward_dkv.backward_dkv`, by one kernel or two."""

    def run(wanted: tuple[str, ...], tile_order: Array) -> dict[str, Array]:
        return backward_dkv.backward_dkv(call, wanted, rows, ranges, tile_order, d_out)

    if call.plan.tunings.backward_dv is None:
        found = run(("key", "value"), ranges.tile_order[1])
    else:
        orders = [backward_dkv.order(call)]
        (tile_order,) = planner(call.plan).tile_orders(visits.work, call.group, orders)
        found = run(("key",), ranges.tile_order[1]) | run(("value",), tile_order)
    return found["d_key"], found["d_value"], found.get("sums")


def gradients_of_parameters(
    call: Call, groups: int, of_offset: Array | None, sums: Array | None, tail_sums: Array | None
) -> ParameterGradients:
    """Returns the gradients of bias, slope and offset for each group of the batch."""
    if of_offset is None and sums is None:
        return ParameterGradients(None, None, None)
    bias, slope = call.inputs.distance_bias, call.inputs.distance_slope
    return planner(call.plan).gradients(
        groups, None if bias is None else bias.shape[1], slope is not None,
        of_offset, sums, tail_sums, length=call.length,
        distances=call.plan.distances(call.blocks) if call.plan.width else 0,
    )  # fmt: skip
