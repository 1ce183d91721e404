"""The planning of a call in a few small Triton kernels: six launches in a training step.

Functions, arguments and results are those of `by_xla`, where the arguments are described.
"""

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic_gpu.plan import BLOCK, EXPONENT_LIMIT, LEAD, Plan
from pallas_kernels.mosaic_gpu.planning.static import ROWS, Static
from pallas_kernels.mosaic_gpu.planning.types import KeyRanges, ParameterGradients, Table, Visits
from pallas_kernels.mosaic_gpu.scheduler import TileOrder
from pallas_kernels.problem import Inputs, current_options
from pallas_kernels.triton import call
from pallas_kernels.triton.config import Block, padded_head_dim, power_of_two

# Blocks x blocks of a program's bounds.
_TILE = 4096
# Distances of a program that adds up the table's gradient.
_DISTANCES = 256
# Where each kernel is. They are imported when one is launched, for Triton may be missing.
_MODULES = {
    "lazy_table": "table",
    "lazy_norms": "visits",
    "lazy_visits": "visits",
    "lazy_tile_order": "order",
    "lazy_key_ranges": "key_ranges",
    "lazy_gradients": "gradients",
}
# Where it isn't 4.
_WARPS = {"lazy_gradients": 16}


def available() -> bool:
    """Returns whether Triton kernels can be lowered."""
    if not all(importlib.util.find_spec(package) for package in ("triton", "jax_triton")):
        return False
    # JAX has the class only where its plugin for GPUs is installed.
    lowers = hasattr(importlib.import_module("jaxlib.gpu_triton"), "TritonKernel")
    return lowers or current_options().launch_triton is not None


def table(
    plan: Plan,
    distance_bias: Float[Array, "heads width"] | None,
    distance_slope: Float[Array, " heads"] | None,
    length: int,
) -> Table:
    """Returns the bias in the kernels' form, and what `visits` wants of it."""
    if distance_bias is None:
        return Table(*plan.table(None, None), None)
    heads, blocks, rows = plan.heads, -(-length // BLOCK), plan.table_rows
    static = dict(
        length=length,
        heads=heads,
        blocks=blocks,
        width=distance_bias.shape[1],
        reach=plan.reach,
        near=plan.near,
        entries=rows * 64,
        lead=LEAD,
        maxima_row=_maxima_row(blocks),
        has_slope=distance_slope is not None,
    )
    shapes = [(heads, rows, 128), (heads, rows, 128), (heads, 2), (heads, _maxima_row(blocks))]
    slope = jnp.zeros(heads, jnp.float32) if distance_slope is None else distance_slope
    return Table(*_launch("lazy_table", (heads, 2), static, shapes, distance_bias, slope))


def visits(plan: Plan, inputs: Inputs, table: Table) -> Visits:
    """Returns which tiles are visited, and whether no exponential can overflow."""
    batch, length, heads, _ = inputs.query.shape
    blocks = -(-length // BLOCK)
    at_once = _blocks_at_once(blocks)
    static = _of_call(plan, inputs) | dict(at_once=at_once, exponent_limit=EXPONENT_LIMIT)
    programs = -(-blocks // at_once)
    shapes = [((batch, heads, n), jnp.int32) for n in (blocks, 1, programs)]
    first, no_overflow, work = _launch(
        "lazy_visits",
        (programs, heads, batch),
        static,
        shapes,
        norms(plan, inputs, table),
        inputs.segment_start if plan.packed else None,
        inputs.distance_bias,
        table.maxima,
        inputs.offset,
    )
    return Visits(first, no_overflow[:, :, 0], work)


def norms(plan: Plan, inputs: Inputs, table: Table) -> Float[Array, "batch 3 heads blocks"]:
    """Returns of each block the largest norms of queries, times the scale, and of keys, and the
    least of what is known of its rows' log-sum-exps; infinite where one is NaN."""
    batch, _, heads, _ = inputs.query.shape
    static = _of_call(plan, inputs)
    blocks = static["blocks"]
    segment_start = inputs.segment_start if plan.packed else None
    arrays = inputs.query, inputs.key, segment_start, inputs.distance_bias, table.maxima
    shapes = [(batch, 3, heads, blocks)]
    return _launch("lazy_norms", (blocks * heads, batch), static, shapes, *arrays)[0]


def _of_call(plan: Plan, inputs: Inputs) -> dict[str, Any]:
    """Returns what is static of a call."""
    _, length, heads, head_dim = inputs.query.shape
    bias, blocks = inputs.distance_bias, -(-length // BLOCK)
    return dict(
        length=length,
        heads=heads,
        group=heads // inputs.key.shape[2],
        head_dim=head_dim,
        head_dim_padded=padded_head_dim(head_dim),
        blocks=blocks,
        maxima_row=_maxima_row(blocks),
        width=0 if bias is None else bias.shape[1],
        has_offset=inputs.offset is not None,
        packed=plan.packed,
        scale=plan.scale,
        size_of_scale=abs(plan.scale),
        skip_mass=plan.skip_mass,
    )


def tile_orders(
    work: Int[Array, "batch heads parts"], group: int, orders: Sequence[TileOrder]
) -> list[Int[Array, " work_tiles+1"]]:
    """Returns the numbers of work tiles as they are handed out, in one order."""
    (order,) = orders
    static = _ranked(work, group, orders)
    shapes = [((order.work_tiles + 1,), jnp.int32)]
    return _launch("lazy_tile_order", (static["kv_pairs"],), static, shapes, work)


def _ranked(
    work: Int[Array, "batch heads parts"], group: int, orders: Sequence[TileOrder]
) -> dict[str, Any]:
    """Returns what is static of work and orders."""
    batch, heads, parts = work.shape
    return dict(kv_pairs=batch * heads // group, work_parts=group * parts, orders=tuple(orders))


def key_ranges(
    first: Int[Array, "batch heads blocks"],
    live: Int[Array, "batch heads blocks"],
    work: Int[Array, "batch heads parts"],
    group: int,
    orders: Sequence[TileOrder],
    distances: int,
    filled: int,
    parts: int,
) -> KeyRanges:
    """Returns the ranges of the backward pass, and the order of its work tiles."""
    batch, heads, blocks = first.shape
    at_once = _blocks_at_once(blocks)
    shapes: list[Any] = [(first.shape, jnp.int32), (first.shape, jnp.int32)]
    # Something must be there.
    shapes.append(((batch, heads, max(parts, 1), max(filled, 1), 3), jnp.int32))
    work_tiles = [order.work_tiles for order in orders]
    shapes += [((n + 1,), jnp.int32) for n in (*work_tiles, 0)[:3]]
    static = _ranked(work, group, orders)
    static |= dict(heads=heads, group=group, blocks=blocks, at_once=at_once)
    parts_asked = parts if distances else 0
    static |= dict(distances=distances, filled=max(filled, 1), parts=parts_asked)
    static["part"] = -(-blocks // max(parts_asked, 1))
    grid = (max(-(-blocks // at_once), parts), heads, batch)
    last, last_live, found, *found_orders = _launch(
        "lazy_key_ranges", grid, static, shapes, first, live, work
    )
    return KeyRanges(last, last_live, found if distances else None, found_orders[: len(orders)])


def gradients(
    groups: int,
    width: int | None,
    has_slope: bool,
    of_offset: Float[Array, "batch heads blocks 64"] | None,
    sums: Float[Array, "batch parts heads filled columns"] | None,
    tail_sums: Float[Array, "batch heads blocks 2 64"] | None,
    *,
    length: int,
    distances: int,
) -> ParameterGradients:
    """Returns the gradients of the parameters, from what the kernels leave."""
    given = next(x for x in (of_offset, sums) if x is not None)
    heads = given.shape[1 if of_offset is not None else 2]
    width, blocks = width or 0, -(-length // BLOCK)
    static = dict(
        length=length,
        heads=heads,
        blocks=blocks,
        row_runs=-(-blocks * BLOCK // ROWS),
        width=width,
        has_slope=has_slope,
        has_offset=of_offset is not None,
        rows=given.shape[0] // groups,
        has_tail_sums=tail_sums is not None,
        distances=distances,
    )
    at_once = _DISTANCES
    if sums is not None:
        straight = sums.shape[4] == BLOCK
        static |= dict(filled=sums.shape[3], parts=sums.shape[1], straight=straight)
        # One part for each block of keys: more programs, each with fewer distances.
        at_once = BLOCK if straight else at_once
    static |= dict(at_once=at_once)
    grid = (heads, groups, 1 + -(-width // at_once))
    shapes = [(groups, heads, max(width, 1)), (groups, heads), (groups, heads)]
    found = _launch("lazy_gradients", grid, static, shapes, of_offset, sums, tail_sums)
    d_bias, d_slope, d_offset = found
    return ParameterGradients(
        d_bias if width else None,
        d_slope if has_slope else None,
        None if of_offset is None else d_offset,
    )


def _maxima_row(blocks: int) -> int:
    """Returns the numbers of a head that `lazy_table` leaves for the visits: see `Table.maxima`."""
    return blocks + 2 * BLOCK


def _blocks_at_once(blocks: int) -> int:
    """Returns how many of a row's blocks a program takes, with all blocks on the other side."""
    padded = power_of_two(blocks)
    return max(1, min(padded, _TILE // padded))


def _launch(
    name: str, grid: tuple[int, ...], static: dict[str, Any], shapes: list[Any],
    *arrays: Array | None,
) -> list[Array]:  # fmt: skip
    """Launches the kernel of that name; shapes with or without a dtype, which else is float32.

    Arrays that are None are not read.
    """
    given = next(x for x in arrays if x is not None)
    operands = [given if x is None else x for x in arrays]
    with_dtypes = (x if isinstance(x[0], tuple) else (x, jnp.float32) for x in shapes)
    outputs = [jax.ShapeDtypeStruct(*x) for x in with_dtypes]
    block = Block(queries=BLOCK, keys=BLOCK, warps=_WARPS.get(name, 4), stages=1)
    module = importlib.import_module(f"pallas_kernels.mosaic_gpu.planning.{_MODULES[name]}")
    return call.launch(getattr(module, name), operands, outputs, grid, block, Static(**static))
