"""The launch of the forward pass: log-sum-exp first, then what survives.

A step does a few tiles of queries of one head, with the keys of its head in VMEM: see
`forward_sweeps`. Keys that don't fit into VMEM are cut into chunks, a step each: from the
diagonal's chunk to the first for the first sweep, and back for the second.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.problem import Inputs, Residuals
from pallas_kernels.tpu.call import Operand, launch
from pallas_kernels.tpu.forward_sweeps import Sweeps
from pallas_kernels.tpu.forward_tile import layout, tiles_a_step
from pallas_kernels.tpu.plan import SUBLANES, Plan
from pallas_kernels.tpu.tile import Bias


def _chunk_index(plan: Plan, refs: Any, b: Any, h: Any, i: Any, step: Any, second: bool) -> Any:
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


def _kernel(plan: Plan, training: bool, refs: Any) -> None:
    start = (pl.program_id(2) == 0) & (pl.program_id(3) == 0)
    pl.when(start)(Bias(plan, refs).start)
    tiles = tiles_a_step(plan)
    if tiles == 1:
        Sweeps(plan, training, refs, 0).run()
    else:

        @pl.loop(0, tiles)
        def _(within):
            Sweeps(plan, training, refs, within).run()


def forward(
    plan: Plan,
    inputs: Inputs,
    table: Float[Array, "heads padded_length"] | None,
    ranges: Int[Array, "batch heads query_tiles"],
    *,
    training: bool,
) -> tuple[Float[Array, "batch length heads head_dim"], Residuals | None]:
    """Launches the forward pass.

    Args:
      plan: of the call.
      inputs: its arrays.
      table: b(x) of every distance.
      ranges: first key tile that each query tile visits.
      training: also return residuals.

    Returns:
      the output; with `training` the residuals: `lse` the log2-sum-exp2 of each query [batch,
      heads, 1, padded], `live_v` the mean of the values of live entries over all visible ones
      and `rounding` what out - offset * mean lost to rounding, both [batch, heads, padded_dim,
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

    operands = [
        Operand("query", query, (1, 1, dim, block), own),
        Operand("key", key, (1, 1, chunk, dim), keys),
        Operand("value", value, (1, 1, dim, chunk), values),
    ]
    if table is not None:
        bias = plan.bias(table)
        operands.append(
            Operand("bias", bias, (1, *bias.shape[1:]), lambda b, h, i, step, *refs: (h, 0, 0))
        )
    if plan.has_offset:
        operands.append(Operand("scale", plan.rows(inputs.offset_scale), (1, 1, block), row))
    if plan.packed:
        document = plan.rows(inputs.segment_start, mode="edge")
        operands.append(Operand("document", document, (1, 1, block), row))
    same = jax.ShapeDtypeStruct(query.shape, query.dtype)
    outputs = [Operand("out", same, (1, 1, dim, block), own)]
    if training:
        rows = jax.ShapeDtypeStruct((batch, heads, 1, length), float32)
        outputs.append(Operand("log_sum", rows, (1, 1, 1, block), own))
        if plan.half:
            outputs.append(Operand("rounding", same, (1, 1, dim, block), own))
        if plan.has_offset:
            live = jax.ShapeDtypeStruct((batch, heads, 1, plan.query_tiles), jnp.int32)
            outputs.append(Operand("mean", same, (1, 1, dim, block), own))
            outputs.append(
                Operand(
                    "live",
                    live,
                    (1, 1, 1, plan.query_tiles),
                    lambda b, h, i, step, *refs: (b, h, 0, 0),
                )
            )
    one_row = pltpu.VMEM((1, queries), float32)
    scratch = {
        "sum": pltpu.VMEM((dim, queries), float32),
        "log_total": one_row,
    }
    scratch |= layout(plan, training).scratch() | Bias.scratch(plan, backward=False)
    if plan.has_offset:
        scratch |= {
            "sums_0": pltpu.VMEM((2 * SUBLANES, queries), float32),
            "sums_1": pltpu.VMEM((2 * SUBLANES, queries), float32),
            "largest_0": pltpu.VMEM((SUBLANES, queries), float32),
            "largest_1": pltpu.VMEM((SUBLANES, queries), float32),
            "threshold": one_row,
            "live_sum": pltpu.VMEM((dim, queries), float32),
            "highest": pltpu.VMEM((length // plan.keys * SUBLANES, queries), float32),
            "live_tile": pltpu.SMEM((1,), jnp.int32),
        }
    else:
        scratch["total"] = pltpu.VMEM((SUBLANES, queries), float32)
    found = launch(
        functools.partial(_kernel, plan, training),
        "lazy_forward" if training else "lazy_inference",
        (batch, heads, plan.query_tiles // tiles, steps),
        2,
        {"first": plan.ranges(ranges), "tau": plan.tau(inputs.offset)},
        operands,
        outputs,
        scratch,
        interpret=plan.interpret,
    )
    out = plan.from_kernel(found["out"])
    if not training:
        return out, None
    return out, Residuals(
        lse=found["log_sum"],
        out=out,
        rounding=found.get("rounding"),
        live=found["live"][:, :, 0] if "live" in found else None,
        live_v=found.get("mean"),
    )
