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
from jaxtyping import Array

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
    groups: int,
    query: Array,
    key: Array,
    value: Array,
    key_columns: Array,
    bias: Array,
    tau: Array,
    scale: Array,
    document: Array,
    first: Array,
    live: Array,
    log_sum: Array,
    out: Array,
    mean: Array,
    rounding: Array,
    d_out: Array,
) -> tuple[Array, Array, Array, Array, Array]:
    """Launches the backward pass.

    Args:
      plan: of the call.
      groups: see `batching.over_batch`; only dummies need it.
      query: as in `forward.forward`, and so the others up to `first`.
      key: see `query`.
      value: likewise upright, [batch, kv_heads, length, head_dim].
      key_columns: `key` as [batch, kv_heads, head_dim, length].
      bias: see `query`.
      tau: see `query`.
      scale: see `query`.
      document: see `query`.
      first: see `query`.
      live: as returned by `forward.forward`, and so the others up to `rounding`.
      log_sum: see `live`.
      out: see `live`.
      mean: see `live`.
      rounding: see `live`.
      d_out: gradient of `out`.

    Returns:
      gradients of query [batch, heads, head_dim, length]; of key, before its factor `scale`,
      and of value [batch, kv_heads, length, head_dim], float32; of `Plan.bias`, before its
      factor, [batch, heads, 8, bias_length], float32; and each query's part in that of the
      offset, [batch, heads, 1, length], float32. Dummies for what the call has not.
    """
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
    inputs = [
        Operand("query", query, tile, own),
        Operand("key", key, (1, 1, chunk, dim), rows),
        Operand("value", value, (1, 1, chunk, dim), rows),
        Operand("key_columns", key_columns, (1, 1, dim, chunk), columns),
        Operand("log_sum", log_sum, (1, 1, 1, block), own),
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
        inputs.append(Operand("no_d_query", jnp.zeros(query.shape, float32), None))
        outputs.append(Operand("d_query", jax.ShapeDtypeStruct(query.shape, float32), None))
        aliases = {"no_d_query": "d_query"}
        scratch["before"] = pltpu.VMEM((dim, queries), float32)
    if plan.half:
        inputs.append(Operand("rounding", rounding, tile, own))
    if plan.packed:
        inputs.append(Operand("document", document, (1, 1, block), row))
    scalars = {"first": plan.ranges(first)}
    if plan.has_offset:
        scalars |= {"live": plan.ranges(live), "tau": tau}
        inputs.append(Operand("scale", scale, (1, 1, block), row))
        inputs.append(Operand("mean", mean, tile, own))
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
    if plan.has_bias:
        inputs.append(
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
    found = launch(
        functools.partial(_kernel, plan),
        "lazy_backward",
        (batch, plan.key_heads, chunks, plan.group, plan.steps),
        2,
        scalars,
        inputs,
        outputs,
        scratch,
        aliases,
    )
    nothing = jnp.zeros(groups, float32)
    return (
        found["d_query"],
        found["d_key"],
        found["d_value"],
        found["d_bias"].sum(axis=1) if plan.has_bias else nothing,
        found["pull"].sum(axis=1) if plan.has_offset else nothing,
    )
