"""Lazy Attention on TPUs, in Pallas Mosaic: a backend of `attention.py`."""

from jaxtyping import Array, Float, Int

from pallas_kernels import bias as bias_lib
from pallas_kernels.problem import Inputs, Problem
from pallas_kernels.tpu import config
from pallas_kernels.tpu.backward import backward
from pallas_kernels.tpu.forward import forward
from pallas_kernels.tpu.plan import Plan
from pallas_kernels.tpu.support import generation
from pallas_kernels.visit import visit_ranges

__all__ = ["PLAIN_JAX", "backward", "forward", "plan", "ranges", "table"]

PLAIN_JAX = False


def plan(problem: Problem, inputs: Inputs | None = None) -> Plan:
    """Returns what is static: the call, and how it is laid out in the TPU's memories.

    Raises:
      ValueError: if a launch would not fit into them.
    """
    del inputs
    tpu = generation()
    assert tpu is not None
    itemsize, head_dim, length = problem.itemsize, problem.head_dim, problem.length
    block = config.block(tpu, itemsize, head_dim, length)
    padded = -(-length // block.queries) * block.queries
    dim = config.padded_head_dim(head_dim)
    turned, forward_chunks, backward_chunks = config.layout(tpu, block, padded, dim, itemsize)
    return Plan(
        **problem.facts(),
        block=block,
        strips=config.strips(turned, block.queries),
        query_first=tpu in config.QUERY_FIRST,
        turned=turned,
        tiles_a_step=config.tiles_a_step(tpu, block, padded, dim, itemsize),
        forward_chunks=forward_chunks,
        backward_chunks=backward_chunks,
    )


def table(
    plan: Plan,
    distance_bias: Float[Array, "heads width"] | None,
    distance_slope: Float[Array, " heads"] | None,
    length: int,
) -> Float[Array, "heads padded_length"] | None:
    """Returns b(x) of every distance; None: there is no bias."""
    del length
    if distance_bias is None:
        return None
    return bias_lib.expand(distance_bias, distance_slope, plan.padded_length)


def ranges(
    plan: Plan,
    inputs: Inputs,
    table: Float[Array, "heads padded_length"] | None,
    *,
    training: bool,
) -> Int[Array, "batch heads query_tiles"]:
    """Returns the first key tile that each query tile visits."""
    del training
    return visit_ranges(
        inputs.query,
        inputs.key,
        None if table is None else table[:, : plan.length],
        inputs.offset,
        inputs.segment_start,
        scale=plan.scale,
        skip_mass=plan.skip_mass,
        tiles=plan.block,
    ).first
