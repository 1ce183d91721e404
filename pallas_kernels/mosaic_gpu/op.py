"""Lazy Attention on Hopper GPUs, differentiable: four kernels and what joins them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import bias as bias_lib
from pallas_kernels.batching import over_batch
from pallas_kernels.mosaic_gpu import backward_bias as bias_kernel
from pallas_kernels.mosaic_gpu import config, row_facts
from pallas_kernels.mosaic_gpu.backward_key import backward_key
from pallas_kernels.mosaic_gpu.backward_query import backward_query
from pallas_kernels.mosaic_gpu.forward import forward
from pallas_kernels.mosaic_gpu.plan import EXPONENT_LIMIT, LOG2_E, UNIT, Plan
from pallas_kernels.mosaic_gpu.row_facts import Residuals
from pallas_kernels.types import AttentionSettings, Visibility
from pallas_kernels.varying import vary_alike
from pallas_kernels.visit import TileSizes, visit_ranges

# For measurements: False computes every visited tile in full. Read when a call is traced.
skip_dead_tiles = True

# Tests on a CPU put parameters of Pallas's interpret mode here. Read when a call is traced.
interpret: Any = None


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

    Source: docs/lazy_attention.md, sections "Definition" and "Gradients".
    """
    length, head_dim = query.shape[1], query.shape[3]
    padded_dim = config.padded_head_dim(head_dim)
    width = 0 if distance_bias is None else min(distance_bias.shape[1], length)
    plan = Plan(
        scale=settings.scale,
        skip_mass=settings.skip_mass,
        skip_dead=skip_dead_tiles,
        packed=packed,
        width=width,
        has_slope=distance_slope is not None,
        has_offset=offset is not None,
        blocks=config.blocks(padded_dim),
        interpret=interpret,
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
    out = _attention(*jax.tree.unflatten(tree, leaves), plan)
    return out[:, :length, :, :head_dim]


def _pad(x: Float[Array, "batch length n dim"], rows: int, columns: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, rows), (0, 0), (0, columns))) if rows or columns else x


def _pad_rows(x: Float[Array, "batch length *axes"], missing: int, **how: Any) -> Array:
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2), **how)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _attention(
    query, key, value, distance_bias, distance_slope, offset, visibility, plan
) -> Float[Array, "batch length heads head_dim"]:
    call = Kernels(query, key, value, distance_bias, distance_slope, offset, visibility, plan)
    return call.forward(call.visited(), training=False)[0]


def _attention_fwd(
    query, key, value, distance_bias, distance_slope, offset, visibility, plan
) -> tuple[Array, Any]:
    call = Kernels(query, key, value, distance_bias, distance_slope, offset, visibility, plan)
    first = call.visited()
    out, mean, rounding, log_total, live = call.forward(first, training=True)
    live = first if live is None else live
    saved = (query, key, value, distance_bias, distance_slope, offset, visibility)
    return out, (saved, first, live, Residuals(out, rounding, mean, log_total))


def _attention_bwd(plan: Plan, residuals: Any, d_out: Array) -> tuple[Any, ...]:
    saved, first, live, found = residuals
    call = Kernels(*(*saved, plan))
    d_query, rows, of_mean, far = call.backward_query(found, first, live, d_out)
    d_offset = None if of_mean is None else of_mean.sum(axis=(0, 2, 3))
    d_key, d_value = call.backward_key(rows, first, live, d_out)
    d_bias = d_slope = None
    distance_bias, distance_slope = call.distance_bias, call.distance_slope
    if distance_bias is not None:
        near = call.backward_bias(rows, first, live, d_out)

        def expand(distance_bias, distance_slope):
            return bias_lib.expand(distance_bias, distance_slope, near.shape[1])

        width = distance_bias.shape[1]
        _, vjp = jax.vjp(expand, distance_bias, distance_slope)
        d_bias, d_slope = vjp(near[:, : expand(distance_bias, distance_slope).shape[1]])
        if far is not None:
            far = far.sum(axis=(0, 2, 4))
            d_bias = d_bias.at[:, width - 1].add(far[:, 0])
            d_slope = d_slope - far[:, 1]
    return d_query, d_key, d_value, d_bias, d_slope, d_offset, None


_attention.defvjp(_attention_fwd, _attention_bwd)


class Kernels:
    """A call's arrays, and the launches that read them."""

    def __init__(
        self, query, key, value, distance_bias, distance_slope, offset, visibility, plan: Plan
    ):
        self.query, self.key, self.value = query, key, value
        self.distance_bias, self.distance_slope, self.offset = distance_bias, distance_slope, offset
        self.plan = plan
        _, self.length, self.heads, _ = query.shape
        self.units = -(-self.length // UNIT)
        self.falling, self.rising, self.tail = plan.table(distance_bias, distance_slope, self.heads)
        self.tau = jnp.zeros(self.heads, jnp.float32) if offset is None else offset
        missing = self.units * UNIT - self.length
        # A row of padding sees what the last row sees.
        self.document, self.offset_scale = (
            _pad_rows(x, missing, mode="edge") if missing else x
            for x in (visibility.first, visibility.offset_scale)
        )
        position = jnp.arange(self.units * UNIT, dtype=jnp.int32)
        self.count_inverse = 1.0 / (position - self.document + 1).astype(jnp.float32)
        self.first_visible = visibility.first

    def visited(self) -> Int[Array, "batch heads units"]:
        """Returns the first unit of keys that each unit of queries visits."""
        ranges = visit_ranges(
            self.query,
            self.key,
            self._bias(),
            self.offset,
            self.first_visible,
            scale=self.plan.scale,
            skip_mass=self.plan.skip_mass,
            tiles=TileSizes(UNIT, UNIT),
        )
        return ranges.first

    def _bias(self) -> Float[Array, "heads length"] | None:
        if self.distance_bias is None:
            return None
        return bias_lib.expand(self.distance_bias, self.distance_slope, self.length)

    def small(self) -> Bool[Array, "batch heads"]:
        """Returns whether no score of a head, less b(0), is large either way."""

        def largest_norm(x: Float[Array, "batch length n dim"]) -> Float[Array, "batch n"]:
            return jnp.sqrt(jnp.max(jnp.sum(x.astype(jnp.float32) ** 2, axis=-1), axis=1))

        query, key = largest_norm(self.query), largest_norm(self.key)
        bound = query * jnp.repeat(key, self.heads // key.shape[1], axis=1) * abs(self.plan.scale)
        bias = self._bias()
        if bias is not None:
            bound = bound + jnp.max(bias - bias[:, :1], axis=1)
        return bound * LOG2_E <= EXPONENT_LIMIT

    def forward(self, first: Array, *, training: bool) -> tuple[Any, ...]:
        """Launches the forward pass; returns what `forward.forward` returns."""
        plan = self.plan

        def run(groups: int, *arrays: Array) -> Any:
            del groups
            # None can't be returned through a batching rule.
            return tuple(x for x in forward(plan, training, *arrays) if x is not None)

        operands = (
            (self.query, False), (self.key, False), (self.value, False), (self.falling, True),
            (self.tail, True), (self.tau, True), (self.offset_scale, False),
            (self.count_inverse, False), (self.document if plan.packed else first, False),
            (first, False), (self.small().astype(jnp.int32), False),
        )  # fmt: skip
        results = list(_batched(run, *operands))
        out = results.pop(0)
        want_mean = training and plan.has_offset
        mean = results.pop(0) if want_mean else None
        rounding, log_total = (results.pop(0), results.pop(0)) if training else (None, None)
        return out, mean, rounding, log_total, results.pop(0) if want_mean else None

    def backward_query(
        self, residuals: Residuals, first: Array, live: Array, d_out: Array
    ) -> tuple[Array, Array, Array | None, Array | None]:
        """Launches the kernel for dQ; returns what `backward_query.backward_query` does."""
        plan = self.plan
        names = row_facts.names(plan)

        def run(groups: int, *arrays: Array) -> Any:
            del groups
            by_name = dict(zip((*names, "log_total"), arrays[12:], strict=True))
            found = Residuals(
                by_name["out"], by_name["rounding"], by_name.get("mean"), by_name["log_total"]
            )
            query, d_out, key, value, table, tail, *others = arrays[:12]
            results = backward_query(plan, query, d_out, key, value, table, tail, found, *others)
            return tuple(x for x in results if x is not None)

        operands = (
            (self.query, False), (d_out, False), (self.key, False), (self.value, False),
            (self.falling, True), (self.tail, True), (self.tau, True), (self.offset_scale, False),
            (self.count_inverse, False), (self.document if plan.packed else first, False),
            (first, False), (live, False),
            *((x, False) for x in residuals.tiles.values()), (residuals.log_total, False),
        )  # fmt: skip
        results = list(_batched(run, *operands))
        d_query, rows = results.pop(0), results.pop(0)
        of_mean = results.pop(0) if plan.has_offset else None
        return d_query, rows, of_mean, results.pop(0) if results else None

    def backward_key(self, rows: Array, first: Array, live: Array, d_out: Array) -> Any:
        """Launches the kernel for dK and dV."""
        plan = self.plan

        def run(groups: int, *arrays: Array) -> Any:
            del groups
            return backward_key(plan, *arrays)

        return _batched(
            run, (self.query, False), (d_out, False), (self.key, False), (self.value, False),
            (self.rising, True), (self.tail, True), (self.tau, True), (rows, False),
            (_last_query(first), False), (_last_query(live), False),
        )  # fmt: skip

    def backward_bias(
        self, rows: Array, first: Array, live: Array, d_out: Array
    ) -> Float[Array, "heads near"]:
        """Returns the gradient of b(x), over tiles with a distance inside the table."""
        plan = self.plan
        block = plan.blocks.backward_bias
        distances = bias_kernel.distances(plan, self.units)

        def run(groups: int, *arrays: Array) -> Any:
            *others, first, live = arrays
            parts = bias_kernel.chunks(plan, first.shape[0], self.heads, self.units)
            # Distances that only fill up the warpgroups have nothing to do.
            filled = distances + -distances % block.warpgroups
            ranges = _distance_ranges(first, live, distances, filled, parts)
            sums = bias_kernel.backward_bias(plan, *(*others, ranges))
            sums = sums.reshape(groups, -1, *sums.shape[2:]).sum(axis=1)
            return bias_lib.join_diagonals(sums[:, :, :distances, :-1])

        return _batched(
            run, (self.query, False), (d_out, False), (self.key, False), (self.value, False),
            (self.falling, True), (rows, False), (first, False), (live, False),
        ).sum(axis=0)  # fmt: skip


def _batched(run: Any, *operands: tuple[Array, bool]) -> Any:
    """Launches a kernel on arrays, each with whether the batch shares it; see `over_batch`."""
    arrays, parameters = zip(*operands, strict=True)

    def vary(groups: int, *arrays: Array) -> Any:
        results, tree = jax.tree.flatten(run(groups, *arrays))
        return jax.tree.unflatten(tree, vary_alike(*results, like=arrays))

    return over_batch(vary, parameters)(*arrays)


def _last_query(first: Int[Array, "batch heads units"]) -> Int[Array, "batch heads units"]:
    """Returns the last unit of queries whose range of keys, from `first` on, has each unit."""
    units = jnp.arange(first.shape[-1], dtype=jnp.int32)
    seen = (first[..., None] <= units) & (units <= units[:, None])
    return jnp.max(jnp.where(seen, units[:, None], 0), axis=-2)


def _distance_ranges(
    first: Int[Array, "batch heads units"],
    live: Int[Array, "batch heads units"],
    distances: int,
    filled: int,
    parts: int,
) -> Int[Array, "batch heads parts filled 3"]:
    """Returns what `backward_bias` wants to know of each distance and run of queries."""
    units = first.shape[-1]
    unit = jnp.arange(units, dtype=jnp.int32)
    distance = jnp.arange(filled, dtype=jnp.int32)[:, None]
    key = unit - distance
    size = -(-units // parts)
    part = jnp.arange(parts, dtype=jnp.int32)[:, None, None]
    exists = (key >= 0) & (unit // size == part) & (distance < distances)

    def inside(first: Array) -> Bool[Array, "batch heads parts filled units"]:
        return exists & (first[:, :, None, None] <= key)

    visited, alive = inside(first), inside(live)
    start = jnp.where(visited, unit, units).min(axis=-1)
    stop = jnp.where(visited, unit + 1, 0).max(axis=-1)
    return jnp.stack([start, jnp.where(alive, unit, units).min(axis=-1), stop], axis=-1)
