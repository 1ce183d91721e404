"""Lazy Attention on NVIDIA GPUs, in Triton: a backend of `attention.py`."""

from jaxtyping import Array, Float, Int

from pallas_kernels import bias as bias_lib
from pallas_kernels.gpu import compute_capability
from pallas_kernels.problem import Gradients, Inputs, Problem, Residuals
from pallas_kernels.triton import config
from pallas_kernels.triton.backward_dbias import backward_dbias
from pallas_kernels.triton.backward_dkv import backward_dkv
from pallas_kernels.triton.backward_dq import backward_dq
from pallas_kernels.triton.forward import forward
from pallas_kernels.triton.plan import Plan, Table
from pallas_kernels.visit import visit_ranges

__all__ = ["PLAIN_JAX", "backward", "forward", "plan", "ranges", "table"]

PLAIN_JAX = False


def plan(problem: Problem, inputs: Inputs | None = None) -> Plan:
    """Returns what is static: the call, and its blocks on the GPU at hand."""
    del inputs
    capability = compute_capability()
    assert capability is not None
    blocks = config.blocks(capability, problem.itemsize, problem.head_dim)
    return Plan(**problem.facts(), capability=capability, blocks=blocks)


def table(
    plan: Plan,
    distance_bias: Float[Array, "heads width"] | None,
    distance_slope: Float[Array, " heads"] | None,
    length: int,
) -> Table | None:
    """Returns the bias as the kernels read it; None: there is none."""
    del length
    return plan.table(distance_bias, distance_slope)


def ranges(
    plan: Plan, inputs: Inputs, table: Table | None, *, training: bool
) -> Int[Array, "batch heads query_tiles"]:
    """Returns the first key tile that each query tile of the forward pass visits."""
    del table
    bias = None
    if inputs.distance_bias is not None:
        length = inputs.query.shape[1]
        bias = bias_lib.expand(inputs.distance_bias, inputs.distance_slope, length)
    block = plan.blocks.forward if training else plan.blocks.inference
    return visit_ranges(
        inputs.query,
        inputs.key,
        bias,
        inputs.offset,
        inputs.segment_start,
        scale=plan.scale,
        skip_mass=plan.skip_mass,
        tiles=block.tiles,
    ).first


def backward(
    plan: Plan,
    inputs: Inputs,
    table: Table | None,
    ranges: Int[Array, "batch heads query_tiles"],
    residuals: Residuals,
    d_out: Float[Array, "batch length heads head_dim"],
    groups: int,
) -> Gradients:
    """Returns the gradients, in three launches."""
    known = plan, inputs, table, ranges, residuals
    d_query, row_stats, d_offset, past = backward_dq(*known, d_out)
    d_key, d_value = backward_dkv(*known, row_stats, d_out)

    def by_group(x: Array) -> Array:
        return x.reshape(groups, -1, *x.shape[1:])

    d_bias = d_slope = None
    if inputs.distance_bias is not None:
        assert table is not None
        near = backward_dbias(plan, inputs, table, ranges, residuals, row_stats, d_out, groups)
        d_bias, d_slope = bias_lib.adjoint(
            near,
            inputs.distance_bias.shape[1],
            has_slope=plan.has_slope,
            past=by_group(past).sum(axis=(1, 3)) if plan.has_slope else None,
        )
    return Gradients(
        query=d_query,
        key=d_key,
        value=d_value,
        distance_bias=d_bias,
        distance_slope=d_slope,
        offset=by_group(d_offset).sum(axis=(1, 3)) if plan.has_offset else None,
    )
