"""Decoding on TPUs, in Pallas Mosaic: two sweeps over the cache, K first, then live values.

A program does one row of one key/value head: all its query heads and new queries, which are the
rows of its tiles. It goes over chunks of a few pages. The first sweep reads the keys of chunks
with a page that is not negligible and keeps their scores in VMEM, so that the log-sum-exp is
known when it ends. The second reads the values of chunks with a weight above 0; of softmax, of
all that were read. Chunks come from HBM by copies of the kernel's own, some ahead of their use,
and what is left out is not copied.

A chunk of keys is [head_dim, slots]: head sizes lie along sublanes, slots along lanes, so that a
head of 64 fills its vectors and none is padded. So the cache's memory should have its slots
innermost. XLA lays the cache of a compiled loop of steps out like that by itself; where a cache
comes from outside in JAX's own layout, it copies it.

Scores are in units of log2. The bias of a chunk is a part of one reversed table, which the
row's length moves along lanes.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import bias as bias_lib
from pallas_kernels.decode import pages, types
from pallas_kernels.decode.tpu_append import heads_a_block
from pallas_kernels.decode.tpu_program import COPIES, Plan, Program
from pallas_kernels.decode.types import PAGE, Call, Inputs, Settings
from pallas_kernels.own_settings import traced_by_own_settings
from pallas_kernels.problem import current_options
from pallas_kernels.tpu import config, support
from pallas_kernels.tpu.call import Operand, launch
from pallas_kernels.tpu.config import LANES
from pallas_kernels.tpu.kernel_types import Refs
from pallas_kernels.tpu.plan import LOG2_E
from pallas_kernels.tpu.tile import UNREACHABLE

# Pages of a chunk at most.
CHUNK_PAGES = 8


def make_plan(inputs: Inputs, settings: Settings) -> Plan:
    """Returns what the kernel is compiled for."""
    slots = inputs.pages * PAGE
    return Plan(
        new=inputs.new,
        group=inputs.group,
        head_dim=inputs.query.shape[-1],
        slots=slots,
        real_slots=inputs.slots,
        chunk=min(CHUNK_PAGES * PAGE, slots),
        settings=settings,
        has_bias=inputs.distance_bias is not None,
        has_offset=inputs.offset is not None,
        quantized=inputs.key_scales is not None,
    )


def unsupported(call: Call) -> str | None:
    """Returns why a TPU can't do a call, as the end of "... since ..."; None: it can."""
    head_dim, dtype = call.query.shape[-1], call.query.dtype
    if head_dim > support.MAX_HEAD_DIM:
        return f"head_dim is {head_dim}, above {support.MAX_HEAD_DIM}"
    if dtype not in ("float32", "bfloat16"):
        return f"inputs are {dtype}"
    generation = support.generation()
    assert generation is not None
    budget = config.vmem_limit(generation)
    for cache in call.caches:
        plan = make_plan(*call.of(cache))
        needed = plan.vmem_bytes(dtype.itemsize, cache.key.dtype.itemsize)
        if needed > budget:
            what = f"{plan.rows} rows of scores of {plan.slots} keys"
            return f"{what} take {needed} bytes of VMEM, above {budget}"
    return None


@traced_by_own_settings(narrow=True)
def attention(inputs: Inputs, settings: Settings) -> Float[Array, "batch new heads head_dim"]:
    """Returns the output; arguments as in `op.attention`."""
    plan = make_plan(inputs, settings)
    batch, kv_heads, rows, dim = len(inputs.lengths), inputs.kv_heads, plan.rows, plan.head_dim

    def cached(x: Array) -> Array:
        x = x.transpose(0, 1, 3, 4, 2)
        return jnp.pad(x, ((0, 0),) * 4 + ((0, plan.slots - plan.real_slots),))

    def own(b, h, *refs):
        return b, h, 0, 0

    key = cached(inputs.key)
    order = _order(plan, inputs, settings, key)
    operands = [
        Operand("order", order, (1, 1, 1, plan.chunks + 1), own, True),
        Operand("query", _by_row(plan, inputs.query), (1, 1, rows, dim), own),
        Operand("key", key, None),
        Operand("value", cached(inputs.value), None),
    ]
    if plan.has_bias:
        table = _bias_table(plan, inputs)
        operands.append(
            Operand("bias", table, (1, *table.shape[1:]), lambda b, h, *refs: (h, 0, 0))
        )
    if plan.has_offset:
        threshold = _thresholds(plan, inputs, settings)
        operands.append(Operand("threshold", threshold, (1, 1, rows, 1), own))
    if inputs.key_scales is not None and inputs.value_scales is not None:
        for name, x in (("key_scales", inputs.key_scales), ("value_scales", inputs.value_scales)):
            scales = inputs.of_layer(x)[:, :, None].astype(jnp.float32)
            operands.append(Operand(name, scales, (1, 1, *scales.shape[2:]), own, True))
    result = jax.ShapeDtypeStruct((batch, kv_heads, rows, dim), inputs.query.dtype)
    lanes = pltpu.VMEM((rows, LANES), jnp.float32)
    copies = pltpu.VMEM((COPIES, dim, plan.chunk), inputs.key.dtype)
    found = launch(
        lambda refs: Program(plan, refs).run(),
        "lazy_decode",
        (batch, kv_heads),
        2,
        {"lengths": inputs.lengths, "layer": inputs.layer.reshape(1)},
        operands,
        [Operand("out", result, (1, 1, rows, dim), own)],
        {
            "scores": pltpu.VMEM((plan.chunks, rows, plan.chunk), jnp.float32),
            "highest": pltpu.VMEM((plan.chunks, rows, LANES), jnp.float32),
            "maximum": lanes,
            "total": lanes,
            "weight": lanes,
            "sum": pltpu.VMEM((rows, dim), jnp.float32),
            "live": pltpu.SMEM((plan.chunks + 1,), jnp.int32),
            "key_copies": copies,
            "value_copies": copies,
            "key_copied": pltpu.SemaphoreType.DMA((COPIES,)),
            "value_copied": pltpu.SemaphoreType.DMA((COPIES,)),
        },
        interpret=current_options().interpret,
    )["out"]
    out = found[:, :, : plan.real_rows].reshape(batch, kv_heads, plan.new, plan.group, dim)
    out = out.transpose(0, 2, 1, 3, 4).reshape(inputs.query.shape)
    return types.finished(out, inputs, settings)


def _by_row(
    plan: Plan, x: Float[Array, "batch new heads d"], fill: float = 0.0
) -> Float[Array, "batch kv_heads rows d"]:
    """Returns numbers of each query as programs see them; rows that are none get `fill`."""
    batch, new, heads, dim = x.shape
    x = x.reshape(batch, new, heads // plan.group, plan.group, dim).transpose(0, 2, 1, 3, 4)
    x = x.reshape(batch, heads // plan.group, plan.real_rows, dim)
    more = ((0, 0), (0, 0), (0, plan.rows - plan.real_rows), (0, 0))
    return jnp.pad(x, more, constant_values=fill)


def _order(
    plan: Plan, inputs: Inputs, settings: Settings, key: Array
) -> Int[Array, "batch kv_heads 1 chunks+1"]:
    """Returns how many chunks each program must read, and then which."""
    skips = inputs.key_norms is not None and settings.skip_mass > 0
    page = pages.visited(inputs, settings, _own_keys(plan, inputs, key) if skips else None)
    size = plan.chunk // PAGE
    page = jnp.pad(page, ((0, 0), (0, 0), (0, plan.chunks * size - page.shape[2])))
    needed = page.reshape(*page.shape[:2], plan.chunks, size).any(axis=-1)
    chunk = jnp.arange(plan.chunks, dtype=jnp.int32)
    listed = jnp.sort(jnp.where(needed, chunk, plan.chunks), axis=-1)
    count = needed.sum(axis=-1, dtype=jnp.int32, keepdims=True)
    # What comes after them is read ahead, but not used.
    listed = jnp.minimum(listed, plan.chunks - 1)
    return jnp.concatenate([count, listed], axis=-1)[:, :, None]


def _own_keys(plan: Plan, inputs: Inputs, key: Array) -> Float[Array, "batch new kv_heads d"]:
    """Returns the keys at the queries' own positions, as the cache holds them.

    XLA would bring all of the cache into another form to look them up.
    """
    _, batch, heads, dim, _ = key.shape
    size = heads_a_block(heads, dim)
    slot = types.positions(inputs) % inputs.slots

    def page(b, h, i, slots, layer):
        return layer[0], b, h, 0, slots[b * plan.new + i] // PAGE

    def kernel(refs: Refs) -> None:
        at = refs.slots[pl.program_id(0) * plan.new + pl.program_id(2)] % PAGE
        old = refs.key[0, 0].astype(jnp.float32)
        lane = jax.lax.broadcasted_iota(jnp.int32, old.shape, 2)
        # A v4 turns no column of sublanes into lanes.
        refs.own[0, 0] = jnp.sum(jnp.where(lane == at, old, 0.0), axis=2, keepdims=True)

    own = jax.ShapeDtypeStruct((batch, plan.new, heads, dim, 1), jnp.float32)
    return launch(
        kernel,
        "lazy_own_keys",
        (batch, heads // size, plan.new),
        3,
        {"slots": slot.reshape(-1), "layer": inputs.layer.reshape(1)},
        [Operand("key", key, (1, 1, size, dim, PAGE), page)],
        [Operand("own", own, (1, 1, size, dim, 1), lambda b, h, i, *refs: (b, i, h, 0, 0))],
        {},
        interpret=current_options().interpret,
    )["own"][..., 0]


def _bias_table(plan: Plan, inputs: Inputs) -> Float[Array, "kv_heads bias_rows bias_lanes"]:
    """Returns the bias in units of log2; lane x of a row has the distance origin - x, less
    how far the row's query is before the newest."""
    assert inputs.distance_bias is not None
    table, slope = inputs.distance_bias.astype(jnp.float32), inputs.distance_slope
    slope = None if slope is None else slope.astype(jnp.float32)
    reach = plan.origin + 1
    values = bias_lib.expand(table, slope, reach)
    values = jnp.pad(values, ((0, 0), (0, reach - values.shape[1])))[:, ::-1] * LOG2_E
    values = jnp.pad(values, ((0, 0), (0, plan.bias_lanes + plan.new - reach)), mode="edge")
    turns = [values[:, plan.new - 1 - i :][:, : plan.bias_lanes] for i in range(plan.new)]
    x = jnp.stack(turns, axis=0).reshape(plan.new, -1, plan.group, plan.bias_lanes)
    x = x.transpose(1, 0, 2, 3).reshape(-1, plan.real_rows, plan.bias_lanes)
    return jnp.pad(x, ((0, 0), (0, plan.bias_rows - plan.real_rows), (0, 0)))


def _thresholds(
    plan: Plan, inputs: Inputs, settings: Settings
) -> Float[Array, "batch kv_heads rows 1"]:
    """Returns what a weight must exceed; rows that are none have no weight."""
    assert inputs.offset is not None
    scale = types.offset_scales(inputs, settings)[:, :, None, None]
    threshold = -inputs.offset.astype(jnp.float32)[:, None] * scale
    threshold = jnp.where(threshold >= 1, UNREACHABLE, threshold)
    return _by_row(plan, threshold, UNREACHABLE)
