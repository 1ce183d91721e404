"""Lazy Attention on Hopper GPUs, differentiable: its kernels and what joins them."""

import dataclasses
import functools
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.batching import over_batch
from pallas_kernels.mosaic_gpu import backward_dbias, backward_dkv, backward_dq, config, forward
from pallas_kernels.mosaic_gpu.plan import UNIT, Plan
from pallas_kernels.mosaic_gpu.planning import by_triton, by_xla
from pallas_kernels.mosaic_gpu.planning.by_xla import Gradients, KeyRanges, Table, Visits
from pallas_kernels.mosaic_gpu.row_stats import Residuals
from pallas_kernels.own_settings import traced_by_own_settings
from pallas_kernels.types import AttentionSettings, Visibility
from pallas_kernels.varying import vary_alike

# For measurements: False computes every visited tile in full. Read when a call is traced.
skip_dead_tiles = True

# Tests on a CPU put parameters of Pallas's interpret mode here. Read when a call is traced.
interpret: Any = None


@traced_by_own_settings(narrow=True)
def attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    distance_bias: Float[Array, "heads width"] | None,
    distance_slope: Float[Array, " heads"] | None,
    offset: Float[Array, " heads"] | None,
    visibility: Visibility,
    settings: AttentionSettings,
    *,
    packed: bool,
    planner: Literal["triton", "xla"] | None = None,
) -> Float[Array, "batch length heads head_dim"]:
    """Returns Lazy Attention's output.

    Args:
      query: rotated queries, bfloat16 or float16.
      key: rotated keys of the same dtype; `kv_heads` divides `heads`.
      value: values of the same dtype.
      distance_bias: b(x) of distances 0 <= x < width, float32; None: no bias.
      distance_slope: of its tail, float32; None: b is 0 past the table.
      offset: tau of each head, float32; None: ordinary softmax.
      visibility: what each query sees.
      settings: scale and skip_mass.
      packed: whether some query does not see the first key of its row.
      planner: what plans the call: Triton kernels or plain JAX; None: the former where there
        is jax-triton.

    Source: docs/lazy_attention.md, sections "Definition" and "Gradients".
    """
    length, head_dim = query.shape[1], query.shape[3]
    padded_dim = config.padded_head_dim(head_dim)
    if offset is None and config.is_elastic(padded_dim, False):
        offset = jnp.zeros(query.shape[2], jnp.float32)
    width = 0 if distance_bias is None else min(distance_bias.shape[1], length)
    plan = Plan(
        scale=settings.scale,
        skip_mass=settings.skip_mass,
        skip_dead=skip_dead_tiles,
        packed=packed,
        width=width,
        has_slope=distance_slope is not None,
        has_offset=offset is not None,
        blocks=config.blocks(padded_dim, width, offset is not None),
        interpret=interpret,
        by_triton=planner == "triton"
        or (planner is None and interpret is None and by_triton.available()),
    )
    # TMA clips what lies past the end, but wants whole groups of 8 rows; interpret mode
    # wants whole tiles. A padding key is seen by padding queries alone.
    missing = -length % (8 if interpret is None else 128)
    query, key, value = (_pad(x, missing, padded_dim - head_dim) for x in (query, key, value))
    if missing:
        visibility = jax.tree.map(lambda x: _pad_rows(x, missing, mode="edge"), visibility)
    leaves, tree = jax.tree.flatten(
        (query, key, value, distance_bias, distance_slope, offset, visibility)
    )
    leaves = vary_alike(*leaves)
    whole = interpret is not None or bool(jax.typeof(leaves[0]).manual_axis_type.varying)
    plan = dataclasses.replace(plan, fetch_by_warpgroup=whole)
    out = _jitted_attention(*jax.tree.unflatten(tree, leaves), plan)
    return out[:, :length, :, :head_dim]


def _pad(x: Float[Array, "batch length n dim"], rows: int, columns: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, rows), (0, 0), (0, columns))) if rows or columns else x


def _pad_rows(x: Float[Array, "batch length *axes"], missing: int, **how: Any) -> Array:
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2), **how)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
@traced_by_own_settings(narrow=True)
def _attention(
    query, key, value, distance_bias, distance_slope, offset, visibility, plan
) -> Float[Array, "batch length heads head_dim"]:
    inputs = (query, key, value, distance_bias, distance_slope, offset, visibility)
    return _forward(plan, *inputs, training=False)[1]["out"]


@traced_by_own_settings(narrow=True)
def _attention_fwd(
    query, key, value, distance_bias, distance_slope, offset, visibility, plan
) -> tuple[Array, Any]:
    inputs = (query, key, value, distance_bias, distance_slope, offset, visibility)
    table, found = _forward(plan, *inputs, training=True)
    # Where a scan stacks residuals, XLA would run the kernel twice: once into the stack.
    found = jax.lax.optimization_barrier(found)
    # With an offset the backward pass asks nothing of the output.
    saved = found | {"out": None} if plan.has_offset else found
    return found["out"], (inputs, table, saved)


@traced_by_own_settings(narrow=True)
def _attention_bwd(plan: Plan, residuals: Any, d_out: Array) -> tuple[Any, ...]:
    inputs, table, saved = residuals
    query, key, value, distance_bias, distance_slope, offset, visibility = inputs
    by_row = {"query": query, "key": key, "value": value, "d_out": d_out}
    by_row |= {"first_visible": visibility.first, "offset_scale": visibility.offset_scale}
    shared = {"distance_bias": distance_bias, "distance_slope": distance_slope, "offset": offset}
    run = functools.partial(_backward_of_rows, plan)
    gradients = _over_batch(run, by_row | saved, shared | table._asdict())
    of_parameters = (gradients[name] for name in shared)
    of_parameters = (None if x is None else x.sum(axis=0) for x in of_parameters)
    return *(gradients[name] for name in ("query", "key", "value")), *of_parameters, None


_attention.defvjp(_attention_fwd, _attention_bwd)

# Layers that call it alike share one lowering of its kernels.
_jitted_attention = jax.jit(_attention, static_argnums=7)


def planning(plan: Plan) -> Any:
    """Returns the module that plans the call."""
    return by_triton if plan.by_triton else by_xla


def _forward(
    plan: Plan,
    query,
    key,
    value,
    distance_bias,
    distance_slope,
    offset,
    visibility,
    *,
    training: bool,
) -> tuple[Table, dict[str, Any]]:
    """Returns the bias in the kernels' form, and all that the forward pass finds."""
    shared = {"distance_bias": distance_bias, "distance_slope": distance_slope}

    def make_table(groups: int, distance_bias: Any, distance_slope: Any) -> dict[str, Any]:
        del groups
        length, heads = query.shape[-3:-1]
        found = planning(plan).table(plan, distance_bias, distance_slope, heads, length)
        return found._asdict()

    if distance_bias is None:
        table = Table(**make_table(1, **shared))
    else:
        table = Table(**_over_batch(make_table, {}, shared))
    by_row = {"query": query, "key": key, "value": value}
    by_row |= {"first_visible": visibility.first, "offset_scale": visibility.offset_scale}
    run = functools.partial(_forward_of_rows, plan, training)
    found = _over_batch(run, by_row, shared | {"offset": offset} | table._asdict())
    return table, found


def _over_batch(
    run: Any, by_row: dict[str, Array | None], shared: dict[str, Array | None]
) -> dict[str, Any]:
    """Runs kernels on arrays led by the batch axis and on shared ones; see `over_batch`.

    Args:
      run: called as run(groups, **by_row, **shared); returns a dictionary. Both may hold None.
      by_row: arrays that the batch axis leads.
      shared: arrays without a batch axis.
    """
    everything = by_row | shared
    given = {name: x for name, x in everything.items() if x is not None}
    missing: set[str] = set()

    def call(groups: int, *arrays: Array) -> dict[str, Array]:
        named = dict.fromkeys(everything) | dict(zip(given, arrays, strict=True))
        results = run(groups, **named)
        missing.update(name for name, x in results.items() if x is None)
        present = {name: x for name, x in results.items() if x is not None}
        return dict(zip(present, vary_alike(*present.values(), like=arrays), strict=True))

    # None can't be returned through a batching rule.
    found = over_batch(call, [name in shared for name in given])(*given.values())
    return dict.fromkeys(missing) | found


def _forward_of_rows(
    plan: Plan, training: bool, groups: int, maxima: Array | None, **arrays: Any
) -> dict[str, Array | None]:
    del groups
    call = Kernels(plan, **arrays)
    visits = call.visits(maxima)
    return call.forward(visits, training=training) | visits._asdict()


def _backward_of_rows(
    plan: Plan,
    groups: int,
    d_out: Array,
    first: Array,
    no_overflow: Array,
    work: Array,
    live: Array | None,
    maxima: Array | None,
    **arrays: Any,
) -> dict[str, Array | None]:
    del maxima
    residuals = Residuals(**{name: arrays.pop(name) for name in Residuals._fields})
    call = Kernels(plan, **arrays)
    live = first if live is None else live
    ranges = call.key_ranges(first, live, work)
    d_query, rows, of_offset, tail_sums = call.backward_query(
        residuals, first, live, no_overflow, ranges, d_out
    )
    d_key, d_value, sums = call.backward_key(rows, ranges, work, d_out)
    if plan.width and sums is None:
        sums = call.backward_bias(rows, ranges, d_out)
    of_parameters = call.gradients(groups, of_offset, sums, tail_sums)
    return {"query": d_query, "key": d_key, "value": d_value} | of_parameters._asdict()


class Kernels:
    """A call's arrays, and the launches that read them."""

    def __init__(
        self,
        plan: Plan,
        query: Float[Array, "batch length heads head_dim"],
        key: Float[Array, "batch length kv_heads head_dim"],
        value: Float[Array, "batch length kv_heads head_dim"],
        first_visible: Int[Array, "batch length"],
        offset_scale: Float[Array, "batch length"],
        distance_bias: Float[Array, "heads width"] | None,
        distance_slope: Float[Array, " heads"] | None,
        offset: Float[Array, " heads"] | None,
        falling: Float[Array, "heads rows 128"],
        rising: Float[Array, "heads rows 128"],
        tail: Float[Array, "heads 2"],
    ):
        self.plan, self.planning = plan, planning(plan)
        self.query, self.key, self.value = query, key, value
        self.distance_bias, self.distance_slope, self.offset = distance_bias, distance_slope, offset
        self.falling, self.rising, self.tail = falling, rising, tail
        self.first_visible = first_visible
        _, self.length, self.heads, _ = query.shape
        self.group = self.heads // key.shape[2]
        self.units = -(-self.length // UNIT)
        self.tau = jnp.zeros(self.heads, jnp.float32) if offset is None else offset
        missing = self.units * UNIT - self.length
        # A row of padding sees what the last row sees.
        self.segment_start, self.offset_scale = (
            _pad_rows(x, missing, mode="edge") if missing else x
            for x in (first_visible, offset_scale)
        )
        self.distances = plan.distances(self.units) if plan.width else 0

    def visits(self, maxima: Array | None) -> Visits:
        """Returns which tiles are visited, and whether scores are small."""
        return self.planning.visits(
            self.plan, self.query, self.key, self.first_visible,
            self.distance_bias, self.distance_slope, self.offset, maxima,
        )  # fmt: skip

    def key_ranges(self, first: Array, live: Array, work: Array) -> KeyRanges:
        """Returns the ranges of the backward pass, and the order of its kernels' work tiles."""
        block = self.plan.blocks.backward_bias
        batch = first.shape[0]
        orders = [
            f(self.plan, self.query, self.key) for f in (backward_dq.order, backward_dkv.order)
        ]
        distances = filled = parts = 0
        if self.distances and block is not None:
            distances = self.distances
            # Those that only fill up the warpgroups have nothing to do.
            filled = distances + -distances % block.warpgroups
            parts = backward_dbias.chunks(self.plan, batch, self.heads, self.units)
            shape = (batch, self.heads, parts, filled, 3)
            orders.append(backward_dbias.order(self.plan, self.query, self.key, shape))
        return self.planning.key_ranges(
            first, live, work, self.group, orders, distances, filled, parts
        )

    def forward(self, visits: Visits, *, training: bool) -> dict[str, Array | None]:
        """Launches the forward pass; returns by name what `forward.forward` does."""
        plan, first = self.plan, visits.first
        order = forward.order(plan, training, self.query, self.key)
        (tile_order,) = self.planning.tile_orders(visits.work, self.group, [order])
        segment_start = self.segment_start if plan.packed else first
        return forward.forward(
            plan, training, self.query, self.key, self.value, self.falling, self.tail, self.tau,
            self.offset_scale, segment_start, first, visits.no_overflow, tile_order,
        )  # fmt: skip

    def backward_query(
        self,
        residuals: Residuals,
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
            plan, self.query, d_out, self.key, self.value, self.falling, self.tail, residuals,
            self.tau, self.offset_scale, segment_start, first, live, no_overflow,
            ranges.tile_order[0],
        )  # fmt: skip

    def backward_key(self, rows: Array, ranges: KeyRanges, work: Array, d_out: Array) -> Any:
        """Launches the kernels for dK and dV, and returns them.

        And the sums of dS, see `backward_dkv.backward_dkv`.
        """

        masked = ranges.last
        if self.plan.packed:
            # Documents and windows begin later and later: units are masked from some one on.
            starts = self.segment_start[:, None, UNIT - 1 :: UNIT]
            keys = UNIT * jnp.arange(self.units)
            masked = jnp.sum(starts <= keys[:, None], axis=-1, dtype=jnp.int32)

        def run(wanted: tuple[str, ...], tile_order: Array) -> dict[str, Array]:
            return backward_dkv.backward_dkv(
                self.plan, wanted, self.query, d_out, self.key, self.value, self.rising, self.tail,
                self.tau, rows, ranges.last, ranges.last_live, masked, tile_order,
            )  # fmt: skip

        if self.plan.blocks.backward_value is None:
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
            self.plan, self.query, d_out, self.key, self.value, self.falling, rows,
            cast(Array, ranges.distances), ranges.tile_order[2],
        )  # fmt: skip

    def gradients(
        self, groups: int, of_offset: Array | None, sums: Array | None, tail_sums: Array | None
    ) -> Gradients:
        """Returns the gradients of bias, slope and offset for each group of the batch."""
        if of_offset is None and sums is None:
            return Gradients(None, None, None)
        width = None if self.distance_bias is None else self.distance_bias.shape[1]
        return self.planning.gradients(
            groups, width, self.distance_slope is not None, of_offset, sums, tail_sums,
            length=self.length, distances=self.distances,
        )  # fmt: skip
