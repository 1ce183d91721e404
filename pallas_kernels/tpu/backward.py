"""The launch of the backward pass: dQ, dK, dV and the gradient of the bias in one.

A step does a few tiles of queries of one head, with a chunk of its head's keys, and of
their gradients, in VMEM: see `backward_tiles`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import bias as bias_lib
from pallas_kernels.problem import Gradients, Inputs, Residuals
from pallas_kernels.tpu.backward_tiles import QueryTile, layout
from pallas_kernels.tpu.call import Operand, launch
from pallas_kernels.tpu.plan import Plan
from pallas_kernels.tpu.tile import Bias


def _start(plan: Plan, refs: Any) -> None:
    """Clears the sums over queries and over the heads of a group."""
    member, step = pl.program_id(3), pl.program_id(4)

    @pl.when((member == 0) & (step == 0))
    def _():
        refs.d_key[...] = jnp.zeros_like(refs.d_key)
        refs.d_value[...] = jnp.zeros_like(refs.d_value)

    if plan.has_bias:

        @pl.when(step == 0)
        def _():
            Bias(plan, refs).start()
            Bias(plan, refs).clear()


def _kernel(plan: Plan, refs: Any) -> None:
    _start(plan, refs)
    if plan.tiles_a_step == 1:
        QueryTile(plan, refs, 0).run()
    else:

        @pl.loop(0, plan.tiles_a_step)
        def _(within):
            QueryTile(plan, refs, within).run()

    if plan.has_bias:
        pl.when(pl.program_id(4) == plan.steps - 1)(Bias(plan, refs).finish)


def backward(
    plan: Plan,
    inputs: Inputs,
    table: Float[Array, "heads padded_length"] | None,
    ranges: Int[Array, "batch heads query_tiles"],
    residuals: Residuals,
    d_out: Float[Array, "batch length heads head_dim"],
    groups: int,
) -> Gradients:
    """Launches the backward pass; returns the gradients.

    Args:
      plan: of the call.
      inputs: its arrays.
      table: as for `forward.forward`.
      ranges: as there.
      residuals: from there.
      d_out: gradient of the output.
      groups: of the batch, each with gradients of its own of bias and offset.
    """
    found = _launch(plan, inputs, table, ranges, residuals, d_out)

    def from_keys(x: Array, like: Array) -> Array:
        return plan.from_kernel(x.swapaxes(2, 3)).astype(like.dtype)

    def by_group(x: Array) -> Array:
        return x.reshape(groups, -1, *x.shape[1:])

    d_bias = d_slope = d_offset = None
    if inputs.distance_bias is not None:
        sums = by_group(found["d_bias"].sum(axis=1)).sum(axis=1)
        width = inputs.distance_bias.shape[1]
        d_values = plan.bias_gradient(sums)
        d_bias, d_slope = bias_lib.adjoint(d_values, width, has_slope=plan.has_slope)
    if plan.has_offset:
        d_offset = by_group(found["pull"].sum(axis=1)).sum(axis=(1, 3, 4))
    return Gradients(
        query=plan.from_kernel(found["d_query"]).astype(inputs.query.dtype),
        key=from_keys(plan.scale * found["d_key"], inputs.key),
        value=from_keys(found["d_value"], inputs.value),
        distance_bias=d_bias,
        distance_slope=d_slope,
        offset=d_offset,
    )


def _launch(
    plan: Plan, inputs: Inputs, table: Any, ranges: Any, residuals: Residuals, d_out: Array
) -> dict[str, Array]:
    """Returns what the kernel writes, by name.

    Gradients of query [batch, heads, padded_dim, padded]; of key, before its factor `scale`, and
    of value [batch, kv_heads, padded, padded_dim], float32; of `Plan.bias`, before its factor,
    [batch, chunks, heads, 8, bias_length], float32; and each query's part in that of the offset,
    [batch, chunks, heads, 1, padded], float32. The last two only if the call has them.
    """
    query, key_columns = plan.to_kernel(inputs.query), plan.to_kernel(inputs.key)
    key, value = plan.to_kernel_rows(inputs.key), plan.to_kernel_rows(inputs.value)
    assert residuals.out is not None
    out, d_out = plan.to_kernel(residuals.out), plan.to_kernel(d_out)
    batch, heads, dim, length = query.shape
    queries, chunks, float32 = plan.queries, plan.backward_chunks, jnp.float32
    chunk = length // chunks

    def head(h, g):
        return h * plan.group + g

    def own(b, h, c, g, i, *refs):
        return b, head(h, g), 0, i

    def rows(b, h, c, g, i, *refs):
        return b, h, c, 0

    def columns(b, h, c, g, i, *refs):
        return b, h, 0, c

    def row(b, h, c, g, i, *refs):
        return b, 0, i

    block = queries * plan.tiles_a_step
    tile = (1, 1, dim, block)
    operands = [
        Operand("query", query, tile, own),
        Operand("key", key, (1, 1, chunk, dim), rows),
        Operand("value", value, (1, 1, chunk, dim), rows),
        Operand("key_columns", key_columns, (1, 1, dim, chunk), columns),
        Operand("log_sum", residuals.lse, (1, 1, 1, block), own),
        Operand("out", out, tile, own),
        Operand("d_out", d_out, tile, own),
    ]
    outputs = [
        Operand(
            name,
            jax.ShapeDtypeStruct((batch, plan.key_heads, length, dim), float32),
            (1, 1, chunk, dim),
            lambda b, h, c, g, i, *refs: (b, h, c, 0),
        )
        for name in ("d_key", "d_value")
    ]
    scratch = {
        "sum": pltpu.VMEM((dim, queries), float32),
        "delta": pltpu.VMEM((1, queries), float32),
    }
    scratch |= layout(plan).scratch() | Bias.scratch(plan, backward=True)
    aliases = {}
    if chunks == 1:
        same = jax.ShapeDtypeStruct(query.shape, query.dtype)
        outputs.append(Operand("d_query", same, tile, own))
    else:
        # Each chunk adds its part in place.
        operands.append(Operand("no_d_query", jnp.zeros(query.shape, float32), None))
        outputs.append(Operand("d_query", jax.ShapeDtypeStruct(query.shape, float32), None))
        aliases = {"no_d_query": "d_query"}
        scratch["before"] = pltpu.VMEM((dim, queries), float32)
    if plan.half:
        operands.append(Operand("rounding", residuals.rounding, tile, own))
    if plan.packed:
        document = plan.rows(inputs.segment_start, mode="edge")
        operands.append(Operand("document", document, (1, 1, block), row))
    scalars = {"first": plan.ranges(ranges)}
    if plan.has_offset:
        assert residuals.live is not None
        scalars |= {"live": plan.ranges(residuals.live), "tau": plan.tau(inputs.offset)}
        operands.append(Operand("scale", plan.rows(inputs.offset_scale), (1, 1, block), row))
        operands.append(Operand("mean", residuals.live_v, tile, own))
        pulls = jax.ShapeDtypeStruct((batch, chunks, heads, 1, length), float32)
        outputs.append(
            Operand(
                "pull",
                pulls,
                (1, 1, 1, 1, block),
                lambda b, h, c, g, i, *refs: (b, c, head(h, g), 0, i),
            )
        )
        scratch["threshold"] = pltpu.VMEM((1, queries), float32)
    if table is not None:
        bias = plan.bias(table)
        operands.append(
            Operand(
                "bias",
                bias,
                (1, *bias.shape[1:]),
                lambda b, h, c, g, i, *refs: (head(h, g), 0, 0),
            )
        )
        sums = jax.ShapeDtypeStruct((batch, chunks, *bias.shape), float32)
        outputs.append(
            Operand(
                "d_bias",
                sums,
                (1, 1, 1, *bias.shape[1:]),
                lambda b, h, c, g, i, *refs: (b, c, head(h, g), 0, 0),
            )
        )
    return launch(
        functools.partial(_kernel, plan),
        "lazy_backward",
        (batch, plan.key_heads, chunks, plan.group, plan.steps),
        2,
        scalars,
        operands,
        outputs,
        scratch,
        aliases,
        plan.interpret,
    )
